"""The wheel: whoever installs it, without a checkout, can serve the demo and has examples of configs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_wheel_carries_the_demo_the_configs_and_the_commands(tmp_path: Path) -> None:
    """Files that are links in the repository are files there."""
    source, out = tmp_path / "source", tmp_path / "out"
    for name in ("serve_app", "deploy_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    done = subprocess.run(build, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {info.filename: info for info in archive.infolist()}
        for name in ("local.yaml", "prod.yaml"):
            assert archive.read(f"serve_app/deploy_configs/{name}") == (ROOT / "deploy_configs" / name).read_bytes()
        (commands,) = [archive.read(name).decode() for name in held if name.endswith("entry_points.txt")]
    assert held["serve_app/demo/model/model.safetensors"].file_size > 3_000_000
    assert {"serve_app/py.typed", "serve_app/demo/questions.json"} <= held.keys()
    page = {
        f"serve_app/console/static/{name}" for name in ("index.html", "app.js", "style.css", "vendor/htm-preact.js")
    }
    assert page | {"serve_app/console/static/vendor/LICENSE.preact.txt"} <= held.keys()
    assert "serve-app = serve_app.cli.main:main" in commands
    assert "serve-app-haproxy = serve_app.cli.haproxy:main" in commands
