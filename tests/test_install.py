"""The install script: only files with a hash of the lock come in, and a network that is down is told in one line."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# pip and uv start several times, each a second or more on a busy machine; nothing waits for a network.
pytestmark = pytest.mark.timeout(180)
LOCKS = ("bootstrap.txt", "cpu.txt", "dev.txt")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script needs, and an environment that has nothing but the locked uv and pip, of this environment."""
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    if not uv.exists():
        pytest.skip("this environment has no uv: it was not made by scripts/install.sh")
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (site,) = (tmp_path / ".venv").glob("lib/python*/site-packages")
    (site / "pip_and_uv.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / ".venv/bin/uv").symlink_to(uv)
    return tmp_path


def install(checkout: Path, **sources: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with these sources and no others."""
    none = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    environment = none | {"UV_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull} | sources
    return subprocess.run(
        ["scripts/install.sh", "cpu"], cwd=checkout, env=environment, capture_output=True, text=True, timeout=150
    )


@pytest.mark.slow
def test_a_source_that_does_not_answer_is_told_in_one_line(checkout: Path) -> None:
    """With what to do; uv by itself would try again and again."""
    done = install(checkout, UV_DEFAULT_INDEX="http://127.0.0.1:9/simple")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("install: a configured package source does not answer: Failed to fetch: http://127.0.0.1:9")
    assert "PIP_FIND_LINKS" in line


@pytest.mark.slow
def test_another_file_of_the_same_name_and_version_is_refused(checkout: Path) -> None:
    """Whoever can put a torch into one of the sources cannot put it into the environment."""
    links, index = checkout / "links", checkout / "index"
    links.mkdir()
    index.mkdir()
    found = re.search(r"^torch==(\S+)", (ROOT / "requirements/cpu.txt").read_text(), re.MULTILINE)
    assert found is not None
    info = f"torch-{found[1]}.dist-info"
    with zipfile.ZipFile(links / f"torch-{found[1]}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {found[1]}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    done = install(checkout, UV_DEFAULT_INDEX=index.as_uri(), UV_FIND_LINKS=str(links))
    assert done.returncode != 0
    assert "hash" in done.stderr.lower()
    assert not list((checkout / ".venv").glob("lib/python*/site-packages/torch"))


@pytest.mark.parametrize("name", LOCKS)
def test_every_entry_of_a_lock_has_hashes(name: str) -> None:
    """And is pinned to one version."""
    entries = re.split(r"^(?=\S)", (ROOT / "requirements" / name).read_text(), flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9.-]+==\S+( ;[^\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry), entry


def test_only_the_cpu_set_leaves_torchvision_out() -> None:
    """vLLM's CUDA wheel requires it, and several models of images import it."""
    script = (ROOT / "scripts/install.sh").read_text()
    assert "left_out.txt" not in script
    assert "torchvision" not in (ROOT / "requirements/cpu.txt").read_text()
    assert "left_out.txt" in (ROOT / "scripts/lock.sh").read_text()


@pytest.mark.parametrize(
    ("driver", "is_told"),
    [("570.133.20", True), ("580.65.06", False), ("580.65", False), ("595.10", False), ("1000.1", False), ("", False),
     ("No devices were found", False)],
)  # fmt: skip
def test_an_old_driver_is_told(driver: str, is_told: bool, tmp_path: Path) -> None:
    """uv would take another build of torch for it, but vLLM's wheel has only one. Without nvidia-smi nothing is
    said."""
    script = (ROOT / "scripts/install.sh").read_text()
    parts = (r"^least_driver=.*\n", r"^warn_of_an_old_driver\(\) \{\n(?:.*\n)*?\}\n", r"^say\(\).*\n")
    found = [match[0] for part in parts if (match := re.search(part, script, re.MULTILINE))]
    assert len(found) == len(parts)
    if driver:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{driver}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-eu", "-c", "".join([*found, "warn_of_an_old_driver\n"])],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert bool(done.stdout) is is_told
    if is_told:
        assert done.stdout.startswith(f"install: this machine has NVIDIA driver {driver}, and vLLM's wheel needs 580")
