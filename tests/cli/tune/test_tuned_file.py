"""The file with the settings that were found."""

from pathlib import Path

from serve_app.cli.tune.tuned_file import tuned_text
from serve_app.tuning.verdict import Verdict, verdict
from tests.cli.tune.builders import TEXT, at, document, ended, setup


def found(folder: Path) -> tuple[str, Verdict]:
    """What is written, and the verdict."""
    of = setup(folder)
    best = verdict(of.task.objective, of.task.space, ended(of))
    return tuned_text(TEXT, of, ended(of), best), best


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
        tuned_text(text, of, trials, Verdict(point, verdict(of.task.objective, of.task.space, trials).score, None, ""))
    )
    args = written["applications"][1]["args"]
    assert args["engine_args"] == {"max_num_batched_tokens": 2048}
    assert "max_num_seqs" not in args


def test_if_the_file_is_the_best_it_is_written_as_it_is(tmp_path: Path) -> None:
    """Nothing is added."""
    of = setup(tmp_path)
    trials = ended(of)[:1]
    assert tuned_text(TEXT, of, trials, verdict(of.task.objective, of.task.space, trials)) == TEXT
