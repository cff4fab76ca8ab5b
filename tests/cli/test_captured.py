"""Whatever is printed during `serve-app run` goes to a private, bounded file; the terminal stays with ourselves."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.cli import captured as captured_module
from serve_app.cli.captured import MOST_LOGS, WORKER_LINE, new_log_file
from serve_app.errors import ConfigError

# Streams of the process itself are moved, so each case has one of its own.
PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from serve_app.cli import captured
captured.MOST_LOG_BYTES = 20_000
told = []
with captured.captured(Path(sys.argv[1]), told.append) as terminal:
    print("by Python")
    print("to stderr", file=sys.stderr)
    os.write(2, b"by C++\\n")
    subprocess.run(["echo", "by a child"], check=True)
    print("(ServeReplica:tiny:Model pid=7) serve-app: waits for a GPU")
    print("(ServeReplica:tiny:Model pid=7) 100% of %s serve-app: no")
    for number in range(int(sys.argv[2])):
        print("x" * 50, number)
    print("on the terminal", file=terminal)
print("afterwards", told)
"""


def run(log: Path, lines: int = 0) -> subprocess.CompletedProcess[str]:
    """The program above, with so many more lines."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, log, str(lines)], capture_output=True, text=True, check=True, timeout=30
    )


def test_all_output_goes_to_the_file_and_nothing_else_to_the_terminal(tmp_path: Path) -> None:
    """Of Python, of C++ and of children. What a worker meant for the terminal is handed over with its application."""
    log = tmp_path / "x.log"
    done = run(log)
    assert done.stdout == "on the terminal\nafterwards ['tiny: waits for a GPU']\n"
    assert done.stderr == ""
    text = log.read_text()
    for words in ("by Python", "to stderr", "by C++", "by a child", "100% of %s"):
        assert words in text
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_log_that_was_there_becomes_private(tmp_path: Path) -> None:
    """Others would read on in a file that they could open before."""
    log = tmp_path / "x.log"
    log.touch(mode=0o644)
    log.chmod(0o644)
    run(log)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_link_is_no_log(tmp_path: Path) -> None:
    """Somebody else may have made it. A device is one, and keeps its mode."""
    other, link = tmp_path / "other", tmp_path / "link"
    other.touch(mode=0o644)
    link.symlink_to(other)
    with pytest.raises(ConfigError, match="is a link"), captured_module.captured(link, print):
        pass
    assert other.read_text() == ""
    before = os.stat("/dev/null").st_mode
    run(Path("/dev/null"))
    assert os.stat("/dev/null").st_mode == before


def test_the_file_is_bounded(tmp_path: Path) -> None:
    """The last lines are kept, and one file before them."""
    log = tmp_path / "x.log"
    run(log, lines=3000)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 40_000
    assert " 2999" in log.read_text()


def test_only_the_latest_logs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache folder, which others may not read."""
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path))
    for number in range(30):
        (new_log_file().parent / f"run-20200101-0000{number:02}-1.log").touch()
    (new_log_file().parent / "notes.txt").touch()
    new = new_log_file()
    kept = sorted(file.name for file in new.parent.glob("run-*"))
    assert len(kept) == MOST_LOGS - 1
    assert kept[-1] == "run-20200101-000029-1.log"
    assert (new.parent / "notes.txt").exists()
    assert stat.S_IMODE(new.parent.stat().st_mode) == 0o700


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything starts, and with what to do."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="--log-file"):
        new_log_file()
    with pytest.raises(ConfigError, match="--log-file"), captured_module.captured(tmp_path / "no" / "x", print):
        pass


@pytest.mark.parametrize(
    ("line", "application", "text"),
    [
        ("(ServeReplica:tiny-pt:Model pid=12) serve-app: a", "tiny-pt", "a"),
        ("(ServeReplica:router:Router pid=12, ip=10.0.0.1) serve-app: WARNING: b", "router", "WARNING: b"),
        ("(build_serve_application pid=12) serve-app: c", None, "c"),
    ],
)
def test_rays_prefix_is_understood(line: str, application: str | None, text: str) -> None:
    """As `print_worker_logs` of Ray writes it without colours."""
    found = WORKER_LINE.match(line)
    assert found is not None
    assert (found["application"], found["text"]) == (application, text)


def test_rays_prefix_is_what_ray_writes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract with Ray's driver."""
    from ray._private.worker import print_worker_logs

    monkeypatch.setenv("RAY_COLOR_PREFIX", "0")
    batch = {"pid": 7, "actor_name": "ServeReplica:tiny:Model", "ip": "1", "localhost": "2", "lines": ["serve-app: x"]}
    print_worker_logs(batch, sys.stdout)  # type: ignore[arg-type]
    found = WORKER_LINE.match(capsys.readouterr().out.rstrip("\n"))
    assert found is not None
    assert (found["application"], found["text"]) == ("tiny", "x")


FAILING = """
import os, sys
from pathlib import Path
from serve_app.cli import captured

def fail(text):
    raise KeyError(text)

with captured.captured(Path(sys.argv[1]), fail) as terminal:
    for number in range(3):
        os.write(1, b"(ServeReplica:tiny:Model pid=7) serve-app: line %d\\n" % number)
    os.write(2, b"x" * 200_000 + b"\\n")  # More than a pipe holds: somebody must read it.
    os.write(2, b"the last line\\n")
    {last}
"""


def test_a_failing_receiver_stops_no_writer(tmp_path: Path) -> None:
    """The thread that reads goes on. Otherwise each later write of the process would be an error."""
    log = tmp_path / "x.log"
    program = FAILING.format(last="pass")
    subprocess.run([sys.executable, "-c", program, log], capture_output=True, check=True, timeout=30)
    text = log.read_text()
    assert all(f"line {number}" in text for number in range(3))
    assert "the last line" in text


def test_a_terminal_that_was_closed_is_no_error_at_the_end(tmp_path: Path) -> None:
    """Its reader may have left with text that was not written yet."""
    program = FAILING.format(last="terminal.reconfigure(line_buffering=False); print('for nobody', file=terminal)")
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "x.log"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 0
