"""What is kept of a run that was ended."""

import json
import math
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.tuning.journal import Journal, Trial
from tests.tuning.builders import measurement, point, trial

ABOUT = {"models": ["m"]}


def test_a_second_run_has_the_trials_of_the_first(tmp_path: Path) -> None:
    """Failures and infinite times too."""
    first = Journal(tmp_path / "deep" / "j.jsonl", ABOUT)
    first.add(trial(point(4), 100.0))
    first.add(Trial(point(8), "confirm", "failed", (measurement(tpot_p95_s=math.inf),), "it has died", 3.0, 4.0))
    assert Journal(first.file, ABOUT).trials == first.trials


def test_a_line_that_a_kill_has_cut_is_dropped(tmp_path: Path) -> None:
    """The next one begins on a line of its own."""
    journal = Journal(tmp_path / "j.jsonl", ABOUT)
    journal.add(trial(point(4), 100.0))
    whole = journal.file.read_text()
    journal.file.write_text(whole + whole.splitlines()[1][:50])
    again = Journal(journal.file, ABOUT)
    again.add(trial(point(8), 100.0))
    assert len(Journal(journal.file, ABOUT).trials) == 2
    assert all(json.loads(line) for line in journal.file.read_text().splitlines())


@pytest.mark.parametrize("left", [0, 5])
def test_a_first_line_that_a_kill_has_cut_begins_it_again(tmp_path: Path, left: int) -> None:
    """Nothing was measured before it."""
    journal = Journal(tmp_path / "j.jsonl", ABOUT)
    journal.file.write_text(journal.file.read_text()[:left])
    assert Journal(journal.file, ABOUT).trials == []
    assert Journal(journal.file, ABOUT).trials == []


def test_trials_of_something_else_are_not_mixed_in(tmp_path: Path) -> None:
    """It is said how to begin again."""
    Journal(tmp_path / "j.jsonl", ABOUT)
    with pytest.raises(ConfigError, match=r"of other settings.*--restart"):
        Journal(tmp_path / "j.jsonl", {"models": ["n"]})


@pytest.mark.parametrize("line", ["[]", "{}", "hello", '{"point": [[1]]}'])
def test_another_file_is_refused_and_stays(tmp_path: Path, line: str) -> None:
    """It may be somebody's own."""
    journal = Journal(tmp_path / "j.jsonl", ABOUT)
    text = journal.file.read_text() + line + "\n"
    journal.file.write_text(text)
    with pytest.raises(ConfigError, match="this is no journal"):
        Journal(journal.file, ABOUT)
    assert journal.file.read_text() == text
