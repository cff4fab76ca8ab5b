"""What is kept of a run that was ended."""

import json
import math
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.tuning.journal import Journal, Trial
from tests.tuning.builders import measurement, point, trial

ABOUT = {"models": ["m"]}


def reopened(journal: Journal) -> Journal:
    """As the next run finds it."""
    journal.close()
    found = Journal(journal.file, ABOUT)
    found.close()
    return found


def test_a_second_run_has_the_trials_of_the_first(tmp_path: Path) -> None:
    """Failures and infinite times too."""
    first = Journal(tmp_path / "deep" / "j.jsonl", ABOUT)
    first.add(trial(point(4), 100.0))
    first.add(Trial(point(8), "confirm", "failed", (measurement(tpot_p95_s=math.inf),), "it has died", 3.0, 4.0))
    assert reopened(first).trials == first.trials


def test_a_line_that_a_kill_has_cut_is_dropped(tmp_path: Path) -> None:
    """The next one begins on a line of its own."""
    with Journal(tmp_path / "j.jsonl", ABOUT) as journal:
        journal.add(trial(point(4), 100.0))
    whole = journal.file.read_text()
    journal.file.write_text(whole + whole.splitlines()[1][:50])
    with Journal(journal.file, ABOUT) as again:
        again.add(trial(point(8), 100.0))
    assert len(reopened(again).trials) == 2
    assert all(json.loads(line) for line in journal.file.read_text().splitlines())


@pytest.mark.parametrize("left", [0, 5])
def test_a_first_line_that_a_kill_has_cut_begins_it_again(tmp_path: Path, left: int) -> None:
    """Nothing was measured before it."""
    with Journal(tmp_path / "j.jsonl", ABOUT) as journal:
        journal.file.write_text(journal.file.read_text()[:left])
    assert reopened(journal).trials == []
    assert reopened(journal).trials == []


def test_trials_of_something_else_are_not_mixed_in(tmp_path: Path) -> None:
    """It is said how to begin again, which forgets them."""
    with Journal(tmp_path / "j.jsonl", ABOUT) as journal:
        journal.add(trial(point(4), 100.0))
    with pytest.raises(ConfigError, match=r"of other settings.*--restart"):
        Journal(journal.file, {"models": ["n"]})
    with Journal(journal.file, {"models": ["n"]}, restart=True) as other:
        assert other.trials == []
    with pytest.raises(ConfigError, match="of other settings"):
        Journal(journal.file, ABOUT)


@pytest.mark.parametrize("line", ["[]\n", "{}\n", "hello\n", '{"point": [[1]]}\n'])
def test_a_broken_journal_is_refused_and_stays(tmp_path: Path, line: str) -> None:
    """A person may still read it."""
    with Journal(tmp_path / "j.jsonl", ABOUT) as journal:
        text = journal.file.read_text() + line
    journal.file.write_text(text)
    with pytest.raises(ConfigError, match="this is no journal"):
        Journal(journal.file, ABOUT)
    assert journal.file.read_text() == text


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "text", ["applications:\n- name: a\n  args: {}", "{}", '{"version": 1}\n', "a: 1\n", "one line"]
)
def test_another_file_is_refused_and_stays(tmp_path: Path, text: str, restart: bool) -> None:
    """It is somebody's own, whether it ends with a line's end or not."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="this is no journal"):
        Journal(file, ABOUT, restart)
    assert file.read_text() == text


def test_two_runs_do_not_write_the_same_journal(tmp_path: Path) -> None:
    """The second one is told."""
    with Journal(tmp_path / "j.jsonl", ABOUT), pytest.raises(ConfigError, match="another run"):
        Journal(tmp_path / "j.jsonl", ABOUT)
