"""Models that swap, as a user of `serve-app plan` and `serve-app check` sees them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli import check as check_module
from serve_app.cli.main import main
from serve_app.facts.inventory import Inventory, parse_gpus
from tests.builders import node
from tests.planning.model_requests import CONFIGS

SWAP = {"policy": "swap", "pool_memory": {0: "40GiB", "cpu": "64GiB"}}


def application(name: str, **args: Any) -> dict[str, Any]:
    """A model of vLLM with 14 GiB of weights."""
    settings = {"model": str(CONFIGS / "qwen2-7b"), "infer_backend": "vllm", "max_model_len": 4096, **args}
    return {"name": name, "import_path": "serve_app.app:model", "route_prefix": f"/models/{name}", "args": settings}


def written(folder: Path, *models: dict[str, Any], **router: Any) -> Path:
    """A config file with a router and these models."""
    front = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/", "args": router}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [front, *models]}, sort_keys=False))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three models that swap, of which one fits, and one that holds its memory."""
    b = application("b", infer_backend="pt", residency=SWAP)
    return written(tmp_path, application("a", residency=SWAP), b, application("c", residency=SWAP), application("p"))


def printed(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What a command prints to both streams, with prose on one line each."""
    assert main(words) == code
    out, err = capsys.readouterr()
    return " ".join(out.split()), " ".join(err.split())


def test_the_plan_has_a_table_and_sentences_for_a_pool(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each takes, who is resident together, what is kept, and the worst wait."""
    monkeypatch.setenv("COLUMNS", "100")
    out, err = printed(["plan", str(file), "--gpus", "80GiB,24GiB"], 0, capsys)
    assert "n1:0 pools 40.00 GiB of models that swap" in out
    assert "n1:0 spare 40.00 GiB of 80.00 GiB" in out
    assert "Pool 'default', each model as if it were resident alone: device model weights" in out
    assert "n1:0 a 14.19 3.55 ~2.36 ~0.58 ~0.55 ~21.22" in out
    assert "n1:0 pool 40.00 GiB, parked models keep ~2.80 of it" in out
    assert "pool 'default': 3 models share 40.00 GiB of n1:0 resident together are at most: a and b; or b and c" in out
    assert "some are stopped to free what they keep: a and b; or b and c" in out
    assert "the weights of all take 42.56 GiB of host memory, and requests that stand still up to " in out
    assert "; the pool may take 64.00 GiB of it" in out
    assert "b: ~2.4 s to wake from a copy of 14.19 GiB, ~30 s to start" in out
    assert "a request waits for its model for at most" in out
    assert out.endswith("Everything fits.")
    assert err == "" or err.startswith("note: a request may wait")


def test_what_a_hint_says_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the least KV cache and a smaller batch, two of three are resident, and none of them before."""
    path = written(tmp_path, *(application(name, residency=SWAP) for name in "abc"))
    out, _ = printed(["plan", str(path), "--gpus", "80GiB"], 0, capsys)
    assert "no two of them are resident together" in out
    assert "no other model is resident beside a. 3.33 GiB of its KV cache is more than" in out
    assert "kv_cache_memory_bytes: 256MiB is the least" in out
    small = {"residency": SWAP, "kv_cache_memory_bytes": "256MiB", "max_num_seqs": 64}
    path = written(tmp_path, *(application(name, **small) for name in "abc"))
    out, _ = printed(["plan", str(path), "--gpus", "80GiB"], 0, capsys)
    assert "resident together are at most: a and b; or a and c; or b and c" in out
    assert "no other model is resident beside" not in out


def test_json_has_pools(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes of a card add up, and the sets, copies and waits are data."""
    assert main(["plan", str(file), "--gpus", "80GiB,24GiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (pool,) = plan["pools"]
    assert pool["budget_bytes"] == {"n1:0": 40 * 2**30}
    assert pool["resident_sets"] == pool["crowded_sets"] == [["a", "b"], ["b", "c"]]
    assert [model["name"] for model in pool["models"]] == ["a", "b", "c"]
    assert pool["models"][0]["leases"] == [{"n1:0": pool["models"][0]["ranks"][0]["share_bytes"]}]
    assert pool["copies"]["bytes"] == sum(model["copy_bytes"] + model["still_bytes"] for model in pool["models"])
    assert pool["guessed_longest_wait_s"] > 0
    for gpu in plan["gpus"]:
        assert gpu["planned_bytes"] + gpu["pool_bytes"] + gpu["spare_bytes"] == gpu["free_bytes"]


def test_a_model_that_fits_not_even_alone_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a larger pool as the fix."""
    path = written(tmp_path, application("a", residency={**SWAP, "pool_memory": {0: "12GiB", "cpu": "64GiB"}}))
    out, _ = printed(["plan", str(path), "--gpus", "24GiB"], 1, capsys)
    assert "PROBLEM a: vllm" in out
    assert "It does not fit even alone in the pool 'default', which has 12.00 GiB of n1:0" in out
    assert "fix: residency.pool_memory: {0: " in out
    assert "cpu: 64GiB}" in out
    assert out.endswith("1 model does not fit.")


def test_the_other_outputs_know_pools_too(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The terms of a model that swaps, the comparison, the picture and the file with what was chosen."""
    gpus = ["--gpus", "80GiB,24GiB"]
    out, _ = printed(["plan", str(file), *gpus, "--explain", "a"], 0, capsys)
    assert "a: vllm because" in out
    svg, other = tmp_path / "plan.svg", tmp_path / "other.yaml"
    _, err = printed(["plan", str(file), *gpus, "--svg", str(svg), "--write", str(other)], 0, capsys)
    assert "pools of models that swap" in svg.read_text()
    assert "Models that swap stay in it as they were" in err
    before, after = (yaml.safe_load(path.read_text())["applications"] for path in (file, other))
    assert before[:4] == after[:4]
    assert after[4]["args"]["kv_cache_memory_bytes"]
    out, _ = printed(["plan", str(file), *gpus, "--compare", str(other)], 0, capsys)
    assert "40.00 GiB in pools" in out
    assert "while it is resident in the pool default" in out


def test_pool_memory_that_differs_is_refused_with_both_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command that reads the file."""
    other = {**SWAP, "pool_memory": {0: "20GiB"}}
    path = written(tmp_path, application("a", residency=SWAP), application("b", residency=other))
    for words in (["plan", str(path), "--gpus", "80GiB"], ["check", str(path)], ["run", str(path)]):
        _, err = printed(words, 2, capsys)
        assert "b: residency.pool_memory is {0: 20.00 GiB}, but that of 'a' is {0: 40.00 GiB, cpu: 64.00 GiB}" in err


def test_a_wait_that_the_router_cuts_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The note is on stderr, because stdout may be JSON."""
    models = [application(name, residency={**SWAP, "drain_s": 300}) for name in "abc"]
    path = written(tmp_path, *models, first_byte_timeout_s=120)
    _, err = printed(["plan", str(path), "--gpus", "80GiB", "--json"], 0, capsys)
    assert "note: a request may wait for" in err
    assert "but first_byte_timeout_s of the router is 120, after which it gets 504" in err
    path = written(tmp_path, *models, first_byte_timeout_s=7200)
    assert printed(["plan", str(path), "--gpus", "80GiB", "--json"], 0, capsys)[1] == ""


@pytest.mark.parametrize(("size", "code"), [("40GiB", 0), ("12GiB", 1)])
def test_check_says_what_a_model_takes_of_its_pool(
    size: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or why it has no place there."""
    inventory = Inventory(parse_gpus("80GiB").devices)
    monkeypatch.setattr(check_module, "_cluster", lambda address: ([node(gpus=1)], inventory, {}, "a cluster"))
    path = written(tmp_path, application("a", residency={**SWAP, "pool_memory": {0: size}}))
    out, _ = printed(["check", str(path)], code, capsys)
    if code:
        assert "NO a: It does not fit even alone in the pool 'default'" in out
        assert "Fix: residency.pool_memory: {0: " in out
    else:
        assert "ok a: a replica takes 1 CPU, and 21.22 GiB of n1:0 of the pool 'default' while it is resident" in out
