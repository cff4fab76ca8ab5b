"""A whole run, against small servers whose speed depends on their settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.tuning.journal import Journal, Trial
from serve_app.tuning.measurement import Level, Measurement
from serve_app.tuning.objective import Objective, Score
from serve_app.tuning.space import Axis, Point, key_of, space_of, title
from serve_app.tuning.strategy import kept_of
from serve_app.tuning.tuner import Task, Tuner
from serve_app.tuning.workload import Ask, Workload
from tests.tuning.builders import MACHINE, trial
from tests.tuning.made_machine import MadeMachine

DOCUMENT = {
    "applications": [
        {"name": "m", "import_path": "serve_app.app:model", "args": {"model": "x", "max_num_seqs": 2}},
        {"name": "other", "import_path": "serve_app.app:model", "args": {"model": "y"}},
        {"name": "door", "import_path": "serve_app.app:router", "args": {"max_retries": 1}},
    ],
    "http_options": {"port": 80},
}


class Quiet:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.ends: list[tuple[Trial, Score]] = []
        self.cuts: list[Point] = []

    def began(self, trial: Trial, number: int, left_s: float) -> None:
        """Time is left at each start."""
        assert left_s > 0

    def measured(self, found: Measurement) -> None:
        """Each level is of the model."""
        assert found.model == "m"

    def ended(self, trial: Trial, worth: Score) -> None:
        """Keeps it."""
        self.ends.append((trial, worth))

    def cut(self, trial: Trial) -> None:
        """Keeps the settings that were not ready in time."""
        self.cuts.append(trial.point)


SPACE = space_of([Axis("m", "max_num_seqs", (2, 1, 4, 8))], MACHINE, {"m": "pt"}, lambda found: [""] * len(found))


def task(**fields: Any) -> Task:
    """To find out how large a batch should be for eight clients. The file has 2."""
    own: dict[str, Any] = {
        "document": DOCUMENT, "models": ("m",), "objective": Objective(),
        "workloads": {"m": Workload("w", tuple(Ask(8, 6) for _ in range(20)))}, "vocabularies": {"m": 100},
        "levels": (Level(clients=8),),
        "space": SPACE, "budget_s": 300.0, "max_starts": 12,
    }  # fmt: skip
    return Task(**own | fields)


def run(file: Path, of: Task, machine: MadeMachine | None = None) -> tuple[Tuner, Quiet, Journal]:
    """A run to its end."""
    view, machine = Quiet(), machine or MadeMachine()
    with Journal(file, {}) as journal, Tuner(of, journal, view, machine, machine.send) as tuner:
        tuner.run()
    assert machine.stopped == len(view.ends)
    return tuner, view, journal


def test_it_finds_and_confirms_the_best(tmp_path: Path) -> None:
    """And keeps what was planned and held."""
    tuner, view, journal = run(tmp_path / "j", task())
    found = tuner.verdict
    assert title(found.point, tuner.space.default) == "max_num_seqs 8"
    assert found.gain is not None
    assert found.gain.ratio > 2
    assert [trial.purpose for trial in journal.trials][-3:] == ["confirm"] * 3
    assert view.ends[0][0].memory == ({"model": "m", "planned": 200, "peak": 150},)


def test_what_is_far_behind_is_not_measured_to_its_end(tmp_path: Path) -> None:
    """Its first look is kept."""
    _, _, journal = run(tmp_path / "j", task(levels=(Level(clients=8), Level(clients=1))))
    stopped = [trial for trial in journal.trials if trial.status == "stopped"]
    assert stopped
    assert all(len(trial.measurements) == 1 and "of the best rate at 8 clients" in trial.why for trial in stopped)


@pytest.mark.parametrize(("how", "words"), [("crashes", "no room"), ("dies", "a replica died under load")])
def test_a_setting_that_crashes_is_marked_and_left(tmp_path: Path, how: str, words: str) -> None:
    """At the start or under load; the best of the others is found."""
    tuner, _, journal = run(tmp_path / "j", task(), MadeMachine(**{how: 8}))
    assert {trial.why for trial in journal.trials if trial.status == "failed"} == {
        f"m has failed: {words}" if how == "crashes" else words
    }
    assert title(tuner.verdict.point, tuner.space.default) == "max_num_seqs 4"


def test_only_a_start_that_fails_ends_more_than_the_models(tmp_path: Path) -> None:
    """The other starts are on the same Ray, which ends with the run."""
    machines = MadeMachine(), MadeMachine(crashes=8), MadeMachine(dies=8)
    for number, machine in enumerate(machines):
        run(tmp_path / str(number), task(), machine)
    assert [machine.closed for machine in machines] == [1, 2, 2]


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """No point of the first run is started again."""
    _, _, first = run(tmp_path / "j", task(max_starts=2))
    tuner, view, second = run(tmp_path / "j", task())
    assert len(first.trials) == 2
    assert second.trials[:2] == first.trials
    searched = [key_of(trial.point) for trial in second.trials if trial.purpose == "search"]
    assert len(searched) == len(set(searched))
    assert len(view.ends) == len(second.trials) - 2
    assert title(tuner.verdict.point, tuner.space.default) == "max_num_seqs 8"


def test_ctrl_c_stops_the_server_and_keeps_what_was_measured(tmp_path: Path) -> None:
    """The trial that was going on is not kept."""
    machine = MadeMachine(interrupts=8)
    with (
        pytest.raises(KeyboardInterrupt),
        Journal(tmp_path / "j", {}) as journal,
        Tuner(task(), journal, Quiet(), machine, machine.send) as tuner,
    ):
        tuner.run()
    assert machine.stopped == len(journal.trials) + 1
    assert machine.closed > 0
    assert tuner.verdict.score.is_valid


def test_a_budget_ends_it(tmp_path: Path) -> None:
    """By the time that starts have taken before."""
    machine = MadeMachine()
    with Journal(tmp_path / "j", {}) as journal:
        journal.add(replace(trial(SPACE.default, 100.0), total_s=60.0))
        of = task(budget_s=59.0)  # A start takes a minute.
        Tuner(of, journal, Quiet(), machine, machine.send).run()
        assert machine.stopped == 0
        Tuner(task(budget_s=260.0), journal, Quiet(), machine, machine.send).run()
        assert machine.stopped > 0


def test_a_start_that_the_budget_cuts_short_says_nothing_of_its_settings(tmp_path: Path) -> None:
    """It is not kept, so a later run starts them again."""
    machine, view = MadeMachine(slow=2), Quiet()
    with (
        Journal(tmp_path / "j", {}) as journal,
        Tuner(task(budget_s=0.05), journal, view, machine, machine.send) as tuner,
    ):
        found = tuner.run()
    assert (journal.trials, view.cuts) == ([], [SPACE.default])
    assert not found.score.is_valid


@pytest.mark.parametrize(("starts", "kept"), [(1, 0), (2, 0), (4, 1), (9, 3), (12, 5), (100, 8)])
def test_so_many_starts_are_kept_to_confirm(starts: int, kept: int) -> None:
    """The search has the others."""
    assert kept_of(starts) == kept


def test_with_a_limit_the_load_rises_until_it_breaks(tmp_path: Path) -> None:
    """The first token of the eighth client waits for six others at the file's settings."""
    levels = tuple(Level(clients=count) for count in (1, 2, 8, 32))
    of = task(levels=levels, objective=Objective(ttft_p95_s=0.05), max_starts=1)
    _, view, journal = run(tmp_path / "j", of)
    clients = [found.level.clients for found in journal.trials[0].measurements]
    assert clients == [1, 2, 8]
    assert view.ends[0][1].level == Level(clients=2)


def test_a_level_that_breaks_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    """Without limits the highest is sent first."""
    machine = MadeMachine(refuses=16)
    levels = tuple(Level(clients=count) for count in (4, 8, 16))
    _, view, journal = run(tmp_path / "j", task(levels=levels, max_starts=1), machine)
    assert [found.level.clients for found in journal.trials[0].measurements] == [16, 8, 4]
    assert journal.trials[0].status == "done"
    assert view.ends[0][1].level in levels[:2]


def test_clients_and_rates_rise_apart(tmp_path: Path) -> None:
    """One that breaks does not end the other."""
    levels = (Level(rate=1.0), Level(clients=1), Level(clients=8), Level(rate=2.0))
    of = task(levels=levels, objective=Objective(ttft_p95_s=0.05), max_starts=1)
    _, _, journal = run(tmp_path / "j", of)
    found = [one.level for one in journal.trials[0].measurements]
    assert found == [Level(clients=1), Level(clients=8), Level(rate=1.0)]


def test_with_a_limit_the_file_itself_is_started_again_if_it_is_the_best(tmp_path: Path) -> None:
    """Each winner keeps to the limits in a start of its own."""
    of = task(objective=Objective(ttft_p95_s=0.2), max_starts=4, space=replace(SPACE, points=SPACE.points[:1]))
    tuner, _, journal = run(tmp_path / "j", of)
    assert [trial.purpose for trial in journal.trials] == ["search", "confirm"]
    assert tuner.verdict.is_final


def test_a_run_with_more_starts_searches_on(tmp_path: Path) -> None:
    """After what was confirmed before."""
    wide = space_of(
        [Axis("m", "max_num_seqs", (2, 1, 4, 8)), Axis("m", "prompt_cache_memory", (None, "1GiB"))],
        replace(MACHINE, is_shared=True), {"m": "pt"}, lambda found: [""] * len(found),
    )  # fmt: skip
    _, _, first = run(tmp_path / "j", task(space=wide, max_starts=6))
    _, _, second = run(tmp_path / "j", task(space=wide, max_starts=12))
    searched = [sum(trial.purpose == "search" for trial in one.trials) for one in (first, second)]
    assert searched[1] > searched[0]


def test_nothing_starts_while_the_memory_is_not_free(tmp_path: Path) -> None:
    """It is waited for, and then said; the journal stays for a later run."""
    machine, asked = MadeMachine(), list[object]()

    def room(point: object) -> str:
        asked.append(point)
        return "no room" if len(asked) > 1 else ""

    with Journal(tmp_path / "j", {}) as journal:
        tuner = Tuner(task(room=room, room_timeout_s=0.0), journal, Quiet(), machine, machine.send)
        with pytest.raises(ConfigError, match=r"is not free now.*no room"):
            tuner.run()
    assert (machine.stopped, machine.closed, len(journal.trials)) == (1, 1, 1)


def test_the_memory_of_its_own_ray_is_given_back_for_a_point_that_needs_it(tmp_path: Path) -> None:
    """The trial before has ended, but its Ray is still there."""
    machine = MadeMachine()

    def room(point: Point) -> str:
        return "no room" if dict(point)["m", "max_num_seqs"] == 8 and not machine.closed else ""

    tuner, _, _ = run(tmp_path / "j", task(room=room, room_timeout_s=0.0), machine)
    assert title(tuner.verdict.point, tuner.space.default) == "max_num_seqs 8"
    assert machine.closed == 2
