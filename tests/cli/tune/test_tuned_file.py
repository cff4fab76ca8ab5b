"""The file with the settings that were found."""

from pathlib import Path

from serve_app.cli.tune.tuned_file import tuned_text
from serve_app.tuning.verdict import Verdict, verdict
from tests.cli.tune.builders import TEXT, at, document, ended, setup


def found(folder: Path) -> tuple[str, Verdict]:
    """What is written, and the verdict."""
    of = setup(folder)
    best = verdict(of.task.objective, of.task.space, ended(of))
    return tuned_text(of, ended(of), best), best


def test_the_settings_are_in_it_with_what_they_bring(tmp_path: Path) -> None:
    """And with the number of starts that had them."""
    text, best = found(tmp_path)
    assert best.gain is not None
    assert document(text)["applications"][1]["deployments"] == [{"name": "Model", "num_replicas": 2}]
    (line,) = [line for line in text.splitlines() if "num_replicas" in line]
    assert "# tuned: about +" in line
    assert line.endswith("% throughput, from 3 starts")


def test_everything_else_stays_with_its_comments(tmp_path: Path) -> None:
    """All lines of the file are in it."""
    lines = found(tmp_path)[0].splitlines()
    assert [line for line in TEXT.splitlines() if line not in lines] == []


def test_fields_of_the_engine_and_those_that_go_are_written(tmp_path: Path) -> None:
    """A field that the file says and the best settings leave out is taken away."""
    text = TEXT.replace("dtype: float32", "dtype: float32\n    max_num_seqs: 4").replace("pt   #", "vllm   #")
    of = setup(tmp_path, text, free=("max_num_seqs",))
    point = at(of, **{"engine_args.max_num_batched_tokens": 2048, "max_num_seqs": None})
    trials = ended(of)
    written = document(
        tuned_text(of, trials, Verdict(point, verdict(of.task.objective, of.task.space, trials).score, None, ""))
    )
    args = written["applications"][1]["args"]
    assert args["engine_args"] == {"max_num_batched_tokens": 2048}
    assert "max_num_seqs" not in args


def test_if_the_file_is_the_best_it_is_written_as_it_is(tmp_path: Path) -> None:
    """Nothing is added."""
    of = setup(tmp_path)
    trials = ended(of)[:1]
    assert tuned_text(of, trials, verdict(of.task.objective, of.task.space, trials)) == TEXT


def test_a_comment_of_the_user_stays_beside_ours(tmp_path: Path) -> None:
    """On a line that changes."""
    text = TEXT.replace("dtype: float32", "dtype: float32\n    max_num_seqs: 4   # the card is small")
    of = setup(tmp_path, text, free=("max_num_seqs",))
    best = Verdict(at(of, max_num_seqs=16), verdict(of.task.objective, of.task.space, ended(of)).score, None, "")
    (line,) = [line for line in tuned_text(of, ended(of), best).splitlines() if "max_num_seqs" in line]
    assert line.startswith("    max_num_seqs: 16")
    assert line.endswith("It was: the card is small")


def test_fields_that_models_share_change_for_one_alone(tmp_path: Path) -> None:
    """An alias of YAML would change both."""
    shared = TEXT.replace("  args:\n", "  args: &common\n") + (
        "- name: second\n  import_path: serve_app.app:model\n  route_prefix: /models/second\n  args: *common\n"
    )
    for name, other in (("demo", "second"), ("second", "demo")):
        of = setup(tmp_path, shared, models=(name,))
        point = tuple((key, 4 if key[1] == "max_num_seqs" else value) for key, value in of.task.space.default)
        best = Verdict(point, verdict(of.task.objective, of.task.space, []).score, None, "")
        args = {item["name"]: item.get("args") for item in document(tuned_text(of, [], best))["applications"]}
        assert (args[name].get("max_num_seqs"), args[other].get("max_num_seqs")) == (4, None)


def test_lists_are_indented_as_they_were(tmp_path: Path) -> None:
    """Every line of the file is in what is written."""
    head, tail = TEXT.split("applications:\n")
    text = f"{head}applications:\n" + "".join(f"  {line}\n" for line in tail.splitlines())
    of = setup(tmp_path, text)
    lines = tuned_text(of, ended(of), verdict(of.task.objective, of.task.space, ended(of))).splitlines()
    assert [line for line in text.splitlines() if line not in lines] == []
