"""What tests of the page do where no Chromium is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.browser import NEEDED, chromium

ROOT = Path(__file__).parents[1]
SCRIPT = "scripts/install_browser.sh"


def test_without_a_browser_they_are_skipped_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fail where the environment says that one is needed, so that CI cannot leave them out unseen."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(NEEDED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="scripts/install_browser.sh"), chromium():
        pass
    monkeypatch.setenv(NEEDED, "1")
    with pytest.raises(pytest.fail.Exception, match="scripts/install_browser.sh"), chromium():
        pass


def machine(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which these are all programs: shell lines, and some real ones. It has no fonts of its own."""
    folder.mkdir()
    for name, line in programs.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    for name in ("bash", "dirname", "sh", "touch"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return {"PATH": str(folder), "HOME": str(folder)}


@pytest.mark.parametrize(
    ("has_browser", "has_font", "wanted"),
    [(True, True, ""), (True, False, "fonts-liberation"), (False, True, "chromium"),
     (False, False, "chromium fonts-liberation")],
)  # fmt: skip
def test_what_is_missing_is_installed(tmp_path: Path, has_browser: bool, has_font: bool, wanted: str) -> None:
    """The browser and a font, each only where there is none."""
    bin_ = tmp_path / "bin"
    found = f"[ -e {bin_}/font ] && echo /usr/share/fonts/a.ttf; exit 1"  # find fails for each folder that is missing
    install = f'[ "$1" = update ] && exit 0; shift 4; echo "$*" >{bin_}/asked; touch {bin_}/font {bin_}/chromium'
    env = machine(bin_, id="echo 0", find=found, apt_get=install + f"; chmod 755 {bin_}/chromium")
    (bin_ / "chmod").symlink_to(str(shutil.which("chmod")))
    if has_browser:
        (bin_ / "chromium").touch(0o755)
    if has_font:
        (bin_ / "font").touch()
    assert subprocess.run(["/bin/sh", ROOT / SCRIPT], env=env, check=False).returncode == 0
    asked = (bin_ / "asked").read_text().strip() if (bin_ / "asked").exists() else ""
    assert asked == wanted


def test_where_no_browser_can_be_installed_all_other_checks_run(tmp_path: Path) -> None:
    """CI says so and goes on, and the tests of the page fail by the variable that it sets."""
    for name in (".ci/run", SCRIPT):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    env = machine(
        tmp_path / "bin", id="echo 0", find="exit 1", apt_get="exit 100", make=f'echo "make $* with ${NEEDED}"'
    )
    done = subprocess.run([tmp_path / ".ci/run"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "make test with 1"
    assert "lacks: chromium fonts-liberation" in done.stderr
    assert "goes on without a browser" in done.stderr
