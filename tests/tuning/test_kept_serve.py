"""One run that serves several files in turn."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from serve_app.tuning import kept_serve
from serve_app.tuning.kept_serve import KeptServe
from serve_app.tuning.own_serve import StartError
from serve_app.tuning.served_file import without_models

MODEL = {"applications": [*without_models()["applications"], {"name": "m"}]}
OTHER = {"applications": [*without_models()["applications"], {"name": "m", "args": {"max_num_seqs": 4}}]}


class MadeRun:
    """Serves by two real processes for each file with a model, a replica and its engine. `refuses` has the files that
    the run does not take, and `keeps` says what stays when a model is removed: "name", "replica" or "engine"."""

    def __init__(self, document: Mapping[str, Any], models: Sequence[str]):
        self.url, self.models, self.is_over = "made", models, False
        self.deployed = list[Mapping[str, Any]]()
        self.refuses, self.keeps = list[Mapping[str, Any]](), ""
        self.running = dict[str, subprocess.Popen[bytes]]()
        self.deploy(document)

    def deploy(self, document: Mapping[str, Any]) -> None:
        """Keeps the file, and starts or ends the processes."""
        if document in self.refuses:
            raise StartError("it is wrong")
        self.deployed.append(document)
        if document != without_models():
            command = [sys.executable, "-c", "input()"]
            self.running = {kind: subprocess.Popen(command, stdin=subprocess.PIPE) for kind in ("replica", "engine")}
        else:
            self.end(*({"replica", "engine"} - {self.keeps}))

    def end(self, *kinds: str) -> None:
        """Ends processes."""
        for kind in kinds:
            if (process := self.running.pop(kind, None)) is not None:
                process.communicate(b"\n")

    def wait_until_ready(self, timeout_s: float) -> None:
        """It is at once."""

    def replicas(self) -> frozenset[int]:
        """The first process."""
        return frozenset(process.pid for kind, process in self.running.items() if kind == "replica")

    def engines(self) -> frozenset[int]:
        """Both, as long as the first one is there."""
        return frozenset(process.pid for process in self.running.values() if self.replicas())

    def known(self) -> frozenset[str]:
        """The model of the last file."""
        is_gone = self.deployed[-1] == without_models() and self.keeps != "name"
        return frozenset() if is_gone else frozenset(self.models)

    def status(self) -> dict[str, Any]:
        """Nothing of interest."""
        return {"models": []}

    def stop(self) -> None:
        """Ends it all."""
        self.is_over = True
        self.end("replica", "engine")


@pytest.fixture
def runs() -> Iterator[list[MadeRun]]:
    """Those that were started."""
    found = list[MadeRun]()
    yield found
    for one in found:
        one.stop()


@pytest.fixture
def kept(runs: list[MadeRun]) -> KeptServe:
    """What is tested."""

    def start(document: Mapping[str, Any], models: Sequence[str]) -> MadeRun:
        runs.append(MadeRun(document, models))
        return runs[-1]

    return KeptServe(start)


def served(kept: KeptServe, document: Mapping[str, Any]) -> None:
    """Serves a file until its models are ready."""
    assert kept.serve(document, ("m",)) is kept
    kept.wait_until_ready(10.0)
    assert (kept.url, kept.status()) == ("made", {"models": []})


def test_the_second_file_is_served_by_the_same_run(kept: KeptServe, runs: list[MadeRun]) -> None:
    """Nothing but the router is served between them, and each has processes of its own."""
    served(kept, MODEL)
    first = kept.replicas()
    kept.stop()
    served(kept, OTHER)
    assert runs[0].deployed == [MODEL, without_models(), OTHER]
    assert kept.replicas()
    assert not kept.replicas() & first
    kept.stop()
    assert not runs[0].is_over
    kept.close()
    kept.close()
    assert (len(runs), runs[0].is_over) == (1, True)


def test_after_the_death_of_a_replica_a_new_run_serves(kept: KeptServe, runs: list[MadeRun]) -> None:
    """The whole run is ended with the models."""
    served(kept, MODEL)
    runs[0].end("replica")
    kept.stop()
    assert runs[0].is_over
    assert runs[0].deployed == [MODEL]
    served(kept, OTHER)
    assert len(runs) == 2
    kept.close()


@pytest.mark.parametrize("what", ["file", "name", "replica", "engine"])
def test_models_that_do_not_end_take_the_run_with_them(
    kept: KeptServe, runs: list[MadeRun], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run refuses the file, the router still has their name, or one of their processes goes on."""
    monkeypatch.setattr(kept_serve, "END_TIMEOUT_S", 0.5)
    served(kept, MODEL)
    runs[0].refuses, runs[0].keeps = [without_models()] * (what == "file"), what
    kept.stop()
    assert runs[0].is_over


def test_what_a_run_refuses_is_served_by_a_new_one(kept: KeptServe, runs: list[MadeRun]) -> None:
    """The run may have died since, which says nothing of the file."""
    served(kept, MODEL)
    kept.stop()
    runs[0].refuses = [OTHER]
    served(kept, OTHER)
    assert [one.is_over for one in runs] == [True, False]
    kept.close()


def test_nothing_is_asked_of_a_run_that_is_not_there(kept: KeptServe) -> None:
    """To end nothing is no error."""
    kept.stop()
    kept.close()
    with pytest.raises(RuntimeError, match="nothing is served"):
        kept.replicas()
