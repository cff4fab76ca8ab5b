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
    """Serves by a real process for each file with a model. `refuses` says of which files the run does not read another
    one, and `keeps` that a process goes on when its model is removed."""

    def __init__(self, document: Mapping[str, Any], models: Sequence[str]):
        self.url, self.models, self.is_over = "made", models, False
        self.deployed = list[Mapping[str, Any]]()
        self.refuses, self.keeps = list[Mapping[str, Any]](), False
        self.process: subprocess.Popen[bytes] | None = None
        self.deploy(document)

    def deploy(self, document: Mapping[str, Any]) -> None:
        """Keeps the file, and starts or ends the process."""
        if document in self.refuses:
            raise StartError("it is wrong")
        self.deployed.append(document)
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        elif document == without_models() and not self.keeps:
            self.end()

    def end(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.communicate(b"\n")
            self.process = None

    def wait_until_ready(self, timeout_s: float) -> None:
        """It is at once."""

    def replicas(self) -> frozenset[int]:
        """The process."""
        return frozenset() if self.process is None else frozenset({self.process.pid})

    def engines(self) -> frozenset[int]:
        """The same."""
        return self.replicas()

    def known(self) -> frozenset[str]:
        """The model of the last file."""
        return frozenset(self.models) if self.deployed[-1] != without_models() else frozenset()

    def status(self) -> dict[str, Any]:
        """Nothing of interest."""
        return {"models": []}

    def stop(self) -> None:
        """Ends it all."""
        self.is_over = True
        self.end()


@pytest.fixture
def runs() -> Iterator[list[MadeRun]]:
    """Those that were started."""
    found = list[MadeRun]()
    yield found
    for one in found:
        one.end()


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
    runs[0].end()
    kept.stop()
    assert runs[0].is_over
    assert runs[0].deployed == [MODEL]
    served(kept, OTHER)
    assert len(runs) == 2
    kept.close()


@pytest.mark.parametrize("how", ["refuses", "keeps"])
def test_models_that_do_not_end_take_the_run_with_them(
    kept: KeptServe, runs: list[MadeRun], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router refuses the file, or their processes go on."""
    monkeypatch.setattr(kept_serve, "STOP_TIMEOUT_S", 0.5)
    served(kept, MODEL)
    runs[0].refuses, runs[0].keeps = [without_models()] * (how == "refuses"), how == "keeps"
    kept.stop()
    assert runs[0].is_over


def test_a_run_that_refuses_a_file_says_so(kept: KeptServe, runs: list[MadeRun]) -> None:
    """The caller closes it."""
    served(kept, MODEL)
    kept.stop()
    runs[0].refuses = [OTHER]
    with pytest.raises(StartError, match="it is wrong"):
        kept.serve(OTHER, ("m",))
    kept.close()
    assert runs[0].is_over


def test_nothing_is_asked_of_a_run_that_is_not_there(kept: KeptServe) -> None:
    """To end nothing is no error."""
    kept.stop()
    kept.close()
    with pytest.raises(RuntimeError, match="nothing is served"):
        kept.replicas()
