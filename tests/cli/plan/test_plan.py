"""`serve-app plan` as a user types it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from serve_app.cli.main import main
from serve_app.cli.plan import plan as plan_module
from serve_app.cli.plan.write import fixed_text
from serve_app.config import ModelConfig
from serve_app.facts.checkpoint import DEMO_MODEL
from serve_app.facts.inventory import Device, Inventory
from serve_app.planning.plan import Change, Fix
from serve_app.status.beside import Holding, Running, RunningModel
from tests.planning.model_requests import CONFIGS

GIB = 2**30
FILE = """\
# our two boxes
applications:
- {name: router, import_path: "serve_app.app:router", route_prefix: /}
- name: q
  import_path: serve_app.app:model
  route_prefix: /models/q
  args:
    model: CONFIG            # a comment that must stay
    infer_backend: auto
    max_model_len: 4096
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config file with one model."""
    path = tmp_path / "serve.yaml"
    path.write_text(FILE.replace("CONFIG", str(CONFIGS / "qwen2-7b")))
    return path


def test_the_table_tells_shares_reasons_and_room(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader sees what goes where, why, and for how many requests."""
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["plan", str(file), "--gpus", "8GiB,24GiB"]) == 0
    out = capsys.readouterr().out
    assert "n1:1       q                            14.19" in out
    assert "because vLLM is the faster engine" in out
    assert "15 requests of 4096 tokens" not in out
    assert "requests of 4096 tokens at once, 224.0 MiB each on a rank" in out
    assert out.rstrip().endswith("Everything fits.")


def test_json_has_the_documented_fields(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For scripts; the parts of a share add up to it."""
    assert main(["plan", str(file), "--gpus", "2x12GiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (model,) = plan["models"]
    assert (plan["fits"], model["backend"], model["tensor_parallel_size"]) == (True, "vllm", 2)
    for rank, gpu in zip(model["ranks"], plan["gpus"], strict=True):
        terms = ("weights_bytes", "kv_cache_bytes", "activation_bytes", "graph_bytes", "context_bytes")
        assert sum(rank[term] for term in terms) == rank["share_bytes"] == gpu["planned_bytes"]
        assert gpu["spare_bytes"] == gpu["free_bytes"] - gpu["planned_bytes"]
        assert (rank["gpu"], rank["certainty"]["weights"]) == (gpu["id"], "exact")


def test_what_does_not_fit_exits_1_with_the_line_that_cures_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exact line of YAML."""
    assert main(["plan", str(file), "--gpus", "8GiB"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM q: " in out
    assert "needs 14.94 GiB for weights" in out
    assert "    fix: one more 10 GiB card on n1" in out


def test_write_pins_what_was_chosen(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Comments stay, and the config is one that the engine takes; planned again it is the same."""
    out = tmp_path / "out.yaml"
    assert main(["plan", str(file), "--gpus", "2x12GiB", "--write", str(out)]) == 0
    first = capsys.readouterr().out
    text = out.read_text()
    assert "# our two boxes" in text
    assert "# a comment that must stay" in text
    config = ModelConfig.from_args(yaml.safe_load(text)["applications"][1]["args"])
    assert (config.infer_backend, config.tensor_parallel_size, config.max_model_len) == ("vllm", 2, 4096)
    assert 0 < config.engine_args["gpu_memory_utilization"] <= 1
    assert main(["plan", str(out), "--gpus", "2x12GiB"]) == 0
    again = capsys.readouterr().out

    def share(text: str) -> list[str]:
        return next(line for line in text.splitlines() if line.startswith("n1:0  ")).split()[:3]

    assert share(again) == share(first)


def test_one_model_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """As the help says."""
    arguments = ["plan", "--model", str(CONFIGS / "llama-3-70b"), "--infer-backend", "vllm", "--gpus", "8xH100"]
    assert main([*arguments, "--tensor-parallel-size", "3"]) == 1
    assert "fix: tensor_parallel_size: 4" in capsys.readouterr().out
    assert main([*arguments, "--tensor-parallel-size", "4", "--max-model-len", "8192"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "name a Serve config file"),
        (["plan", "--model", "serve-app/demo", "--gpus", "8gb"], "Write 8GB"),
        (["plan", "/nowhere.yaml", "--gpus", "8GiB"], "No such file"),
        (["plan", "--model", "serve-app/demo", "--max-memory", "{0: 3gb}", "--gpus", "8GiB"], "Write 3GB"),
        (["plan", "--model", "serve-app/demo", "--gpus", "8GiB", "--inventory", "x"], "not both"),
        (["plan", "--model", "serve-app/demo", "--gpus", "8GiB", "--beside-running"], "and --gpus does not. Leave one"),
        (["plan", "--model", "serve-app/demo", "--what", "fits", "--beside-running"], "and --what does not. Leave one"),
    ],
)
def test_wrong_input_exits_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With what and where."""
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_what_fits_is_a_table_and_data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models have rows, with how long and how many; one that fits nowhere makes the exit code 1."""
    monkeypatch.delenv("COLUMNS", raising=False)  # xdist sets it.
    models = ["plan", "--model", DEMO_MODEL, "--model", str(CONFIGS / "llama-3-70b"), "--what", "fits"]
    assert main([*models, "--gpus", "24GiB"]) == 1
    table = capsys.readouterr().out
    assert re.search(r"demo +vllm +1 +2,048 +\d+ +n1:0", table)
    assert re.search(r"llama-3-70b +vllm +1 +does not fit", table)
    assert main([*models, "--gpus", "2x80GiB", "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)
    assert {way["model"] for way in ways if way["requests"]} == {"demo", "llama-3-70b"}


def test_compare_shows_two_files_beside_each_other(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is that of the second file. What differs is in one row."""
    monkeypatch.delenv("COLUMNS", raising=False)  # xdist sets it.
    monkeypatch.chdir(tmp_path)  # A table with long paths as titles would not fit.
    for name in ("one.yaml", "other.yaml"):
        (tmp_path / name).write_text(file.read_text())
    arguments = ["plan", "one.yaml", "--gpus", "24GiB,24GiB", "--compare", "other.yaml"]
    assert main(arguments) == 0
    same = [line for line in capsys.readouterr().out.splitlines() if "verdict" in line]
    assert len(same) == 1
    assert same[0].split() == ["verdict", "fits", "fits"]
    assert main([*arguments[:-1], "one.yaml", "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert one == two


def test_explain_shows_every_term(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its factors, as text and as data that adds up; a name that is not there is answered by those that are."""
    assert main(["plan", str(file), "--gpus", "24GiB", "--explain", "q"]) == 0
    out = capsys.readouterr().out
    assert (
        "logits and their copy = copies (2) × max_num_seqs (256) × vocabulary (152,064) × bytes of a float32 (4)" in out
    )
    assert "(2%) are never planned" in out
    assert main(["plan", str(file), "--gpus", "24GiB", "--explain", "q", "--json"]) == 0
    ((rank,),) = [model["ranks"] for model in json.loads(capsys.readouterr().out)]
    for kind in ("activation", "graph", "context"):
        assert sum(term["bytes"] for term in rank["terms"][kind]) == rank[f"{kind}_bytes"]
    assert main(["plan", str(file), "--gpus", "24GiB", "--explain", "nobody"]) == 2
    assert "there is no such model. The plan has q." in capsys.readouterr().err
    assert main(["plan", str(file), "--gpus", "8GiB", "--explain", "nobody"]) == 2
    assert "there is no such model. The plan has q." in capsys.readouterr().err
    assert main(["plan", str(file), "--gpus", "24GiB", "--explain", "q", "--what", "fits"]) == 2


@pytest.mark.parametrize("backend", ["vllm", "pt"])
def test_explain_names_limits_and_the_layers_of_each_part(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A request's KV cache is told for each of vLLM's stages, which have other numbers of layers."""
    asked = ["plan", "--model", str(CONFIGS / "qwen2-7b"), "--infer-backend", backend, "--max-model-len", "4096"]
    limited = ["--max-memory", "{0: 6GiB, 1: 15GiB}", "--gpus", "8GiB,16GiB", "--explain", "qwen2-7b"]
    assert main([*asked, *limited]) == 0
    out = capsys.readouterr().out
    first, second = out.index("n1:0: 8.00 GiB"), out.index("n1:1: 16.00 GiB")
    limits = [out.index(f"max_memory allows {size} GiB of it") for size in ("6.00", "15.00")]
    assert min(first, second) < min(limits) < max(first, second) < max(limits)
    assert "embedding, layers 0 to " in out
    assert "to 27, norm and head" in out
    sizes = re.findall(r"one request of 4,096 tokens takes ([\d.]+) MiB of KV cache here", out)
    if backend == "vllm":  # A layer takes 8 MiB for 4096 tokens: 2 × 4 heads × 128 × 2 bytes.
        assert sum(map(float, sizes)) == pytest.approx(28 * 8, abs=0.1)
    else:
        assert not sizes


@pytest.mark.parametrize(
    ("field", "gpus", "words"),
    [
        ("pipeline_layers: [27, 1]", "24GiB,8GiB", "n1:1: layer 27, norm and head"),
        ("pipeline_layers: [27, 1]", "24GiB,2GiB", "stage 2 of 2 on n1:1 (layer 27) takes"),
        ("pipeline_parallel_size: 3", "20GiB,8GiB", "loses the memory of 1 card; gains"),
    ],
)
def test_one_layer_and_one_card_are_singular(
    field: str, gpus: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the plan, in its problems and in its fixes."""
    file = tmp_path / "x.yaml"
    file.write_text(
        "applications:\n- {name: q, import_path: 'serve_app.app:model', route_prefix: /models/q, args: {model: "
        f"'{CONFIGS / 'qwen2-7b'}', infer_backend: vllm, max_model_len: 4096, {field}}}}}\n"
    )
    main(["plan", str(file), "--gpus", gpus])
    assert words in " ".join(capsys.readouterr().out.split())


def test_a_model_without_a_file_can_go_over_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It plans as the same fields in a file do, and a file has the field itself."""
    model = str(CONFIGS / "qwen2-7b")
    fields = ["--infer-backend", "vllm", "--pipeline-parallel-size", "2", "--max-model-len", "4096"]
    asked = ["plan", "--model", model, *fields, "--gpus", "12GiB;12GiB", "--json"]
    assert main(asked) == 1
    capsys.readouterr()
    assert main([*asked, "--nnodes", "2"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["models"]
    assert {rank["gpu"] for rank in planned["ranks"]} == {"n1:0", "n2:0"}
    file = tmp_path / "x.yaml"
    file.write_text("applications: []")
    assert main(["plan", str(file), "--nnodes", "2"]) == 2
    assert "--nnodes goes with --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "gpus", "ranks"),
    [
        (["--infer-backend", "vllm"], "8GiB", 1),
        (["--infer-backend", "pt"], "8GiB", 1),
        (["--infer-backend", "pt", "--max-memory", "{0: 4GB, 1: 3GB}"], "8GiB,8GiB", 2),
        (["--infer-backend", "vllm", "--tensor-parallel-size", "2"], "2x6GiB", 2),
        (["--infer-backend", "vllm", "--pipeline-parallel-size", "2"], "8GiB,6GiB", 2),
    ],
)
def test_a_model_without_a_place_is_explained_by_its_nearest_attempt(
    options: list[str], gpus: str, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terms add up to more than the cards have, by what the problem says is missing."""
    asked = ["plan", "--model", str(CONFIGS / "qwen2-7b"), *options, "--gpus", gpus, "--explain", "qwen2-7b"]
    assert main(asked) == 1
    out = capsys.readouterr().out
    assert out.startswith("qwen2-7b has no place. ")
    assert "The attempt that came nearest needs this:" in out
    assert "logits and" in out
    assert main([*asked, "--json"]) == 1
    (model,) = json.loads(capsys.readouterr().out)
    assert model["problem"]["code"] == "over_commit"
    assert len(model["ranks"]) == ranks
    total = sum(
        float(size.removesuffix("GiB")) * int(count or 1) for count, size in re.findall(r"(?:(\d)x)?(\d+GiB)", gpus)
    )
    rooms = 0.98 * total * GIB if "--max-memory" not in options else 7e9
    over = sum(rank["share_bytes"] for rank in model["ranks"]) - rooms
    missing = model["problem"]["missing_bytes"]
    if "--tensor-parallel-size" in options:
        missing *= 2  # It is that of one rank.
    assert over > 0
    if "--pipeline-parallel-size" not in options:  # There each card got all that is missing.
        assert missing == pytest.approx(over, rel=0.02)


def test_a_model_of_which_there_are_no_figures_is_said_to_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Three ranks cannot split its heads, so nothing was counted."""
    asked = ["plan", "--model", str(CONFIGS / "qwen2-7b"), "--infer-backend", "vllm", "--tensor-parallel-size", "3"]
    assert main([*asked, "--gpus", "3x24GiB", "--explain", "qwen2-7b"]) == 1
    assert "There are no figures to explain" in capsys.readouterr().out
    assert main([*asked, "--gpus", "3x24GiB", "--explain", "qwen2-7b", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0].keys() == {"problem"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "app:model\n  route_prefix: /models/q",
            "app:modle\n  route_prefix: /models/q",
            "Did you mean 'serve_app.app:model'",
        ),
        (
            "    max_model_len: 4096",
            "    max_model_len: 4096\n  deployments: [{name: Model, num_replica: 2}]",
            "num_replica",
        ),
    ],
)
def test_what_check_refuses_is_not_planned(
    file: Path, old: str, new: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typo would leave a model or its replicas out of the plan, which would then say that everything fits."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert main(["plan", str(file), "--gpus", "24GiB"]) == 2
    assert words in capsys.readouterr().err


def test_a_plan_says_that_what_was_asked_for_fits(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--for` is answered where it fits, too."""
    assert main(["plan", str(file), "--gpus", "24GiB", "--for", "4x2000"]) == 0
    assert "its KV cache holds the 4 requests of 2000 tokens at once" in " ".join(capsys.readouterr().out.split())


def test_explain_names_vllms_own_code_where_it_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without formulas has its weights from there, by a shipped answer, and others from their tensors."""
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path))
    asked = ["plan", "--infer-backend", "vllm", "--gpus", "80GiB"]
    for name, words in (
        ("gpt-oss-20b", "vLLM's own code builds from config.json"),
        ("qwen2-7b", "tensors of the check"),
    ):
        assert main([*asked, "--model", str(CONFIGS / name), "--explain", name]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  weights")]
        assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", DEMO_MODEL, "--device", "cpu", "--gpus", "24GiB"], "--gpus has none. Leave one out."),
        ([str(CONFIGS)], "this is a folder. A Ray Serve config file (YAML) is needed."),
        ([str(CONFIGS / "qwen2-7b")], f"To plan the model in it, give --model {CONFIGS / 'qwen2-7b'}."),
    ],
)
def test_what_contradicts_itself_or_is_another_thing_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what was expected."""
    assert main(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (["--max-memory", "{0: 24GB, 1: 24GB, 2: 16GB}"], "infer_backend: pt"),
        (["--pipeline-parallel-size", "3"], "infer_backend: pt, num_gpus: 3, without pipeline_parallel_size"),
    ],
)
def test_the_other_backend_comes_before_a_card(
    options: list[str], fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model for which there are no formulas, what transformers says is shipped, though vLLM is to run it."""
    model = ["--model", str(CONFIGS / "gemma-3-27b-it"), "--infer-backend", "vllm", "--max-model-len", "4096"]
    assert main(["plan", *model, *options, "--gpus", "24GiB,24GiB,16GiB", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert fix in [each["text"] for each in problem["fixes"]]
    assert all(each["field"] != "gpus" for each in problem["fixes"])


def test_a_plan_beside_what_runs_names_what_it_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What others hold is not there, and the model of the file counts once."""
    card = Device("n1", 0, "L4", 24 * GIB, 6 * GIB, by_index=True)
    models = [RunningModel(name, [Holding("n1:0", 9 * GIB, 9 * GIB)]) for name in ("q", "other")]
    monkeypatch.setattr(plan_module, "_running_cluster", lambda _: (Inventory((card,)), Running(models)))
    file = tmp_path / "q.yaml"
    args = f"{{model: {DEMO_MODEL}, infer_backend: pt, max_memory: {{0: 14GiB}}}}"
    file.write_text(f"applications:\n- {{name: NAME, import_path: 'serve_app.app:model', args: {args}}}\n")
    text = file.read_text()
    file.write_text(text.replace("NAME", "q"))
    assert main(["plan", str(file), "--beside-running", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["gpus"][0]["free_bytes"] == 15 * GIB
    assert err == "note: What q holds now counts as free, because the plan has it anew.\n"
    file.write_text(text.replace("NAME", "new"))
    main(["plan", str(file), "--beside-running", "--json"])
    out, err = capsys.readouterr()
    assert (json.loads(out)["gpus"][0]["free_bytes"], err) == (6 * GIB, "")


def test_fixes_are_written_into_the_file(file: Path) -> None:
    """Into the lines of their model, below others and instead of them, and its comments stay. A card is no line."""
    text = file.read_text() + "    residency: {policy: swap, pool_memory: {0: 1GiB}}\n"
    pool = Fix("q", (Change("residency.pool_memory", {0: "9GiB"}),))
    shorter = Fix("q", (Change("max_model_len", None), Change("max_num_seqs", 8)))
    fixed = fixed_text([pool, shorter], text)
    assert fixed is not None
    args = yaml.safe_load(fixed)["applications"][1]["args"]
    assert args["residency"] == {"policy": "swap", "pool_memory": {0: "9GiB"}}
    assert (args["max_num_seqs"], "max_model_len" in args) == (8, False)
    assert "# our two boxes" in fixed
    assert fixed_text([Fix("", (Change("gpus", {"size": "16GiB", "node": "n1"}),))], text) is None
    assert fixed_text([Fix("q", (Change("num_replicas", 1),))], text) is None
