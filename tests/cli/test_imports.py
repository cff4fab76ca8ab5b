"""A command imports what it needs and no more: each heavy library costs seconds before the first line is printed.

Each test runs the real command in a process of its own and looks at the modules that it has imported at its end.
`benchmarks/cli_start.py` measures the CPU seconds; nothing here depends on time.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = frozenset({"ray", "torch", "transformers", "vllm", "accelerate", "xgrammar", "numpy", "tokenizers"})
# No raylet is seen, whatever runs beside the test; the folder without an address file comes by RAY_TMPDIR.
PROGRAM = """
import json, sys
import_psutil = "--without-psutil" not in sys.argv
if import_psutil:
    import psutil
    psutil.process_iter = lambda attributes=None: iter(())
from serve_app.cli.main import main
try:
    code = main([word for word in sys.argv[1:] if word != "--without-psutil"])
except SystemExit as end:
    code = end.code
print(json.dumps({"code": code, "modules": sorted({name.partition(".")[0] for name in sys.modules})}), file=sys.stderr)
"""


def run(folder: Path, *words: str) -> tuple[int, frozenset[str], str]:
    """The exit code of `serve-app WORDS` on a machine without a Ray cluster, the imported packages, and its output."""
    environment = {"PATH": "/usr/bin:/bin", "RAY_TMPDIR": str(folder), "SERVE_APP_CACHE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env=environment, capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stderr.splitlines()[-1])
    return int(seen["code"] or 0), frozenset(seen["modules"]), done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["plan", "--help"], ["check", "--help"]])
def test_help_imports_neither_engines_nor_settings(tmp_path: Path, words: list[str]) -> None:
    """Not even pydantic, which takes half a second with the config's models."""
    code, modules, output = run(tmp_path, "--without-psutil", *words)
    assert (code, bool(output)) == (0, True)
    assert not modules & (HEAVY | {"pydantic", "yaml", "psutil", "starlette"})


@pytest.mark.parametrize("where", [["--gpus", "24GiB"], ["--device", "cpu"]])
def test_a_local_model_is_planned_without_ray_and_engines(tmp_path: Path, where: list[str]) -> None:
    """Its config.json and the headers of its files say all, and a Ray that does not run need not be asked."""
    code, modules, output = run(tmp_path, "plan", "--json", "--model", "serve-app/demo", *where)
    assert code == 0
    assert json.loads(output)["fits"] is True
    assert not modules & (HEAVY | {"ruamel", "starlette", "huggingface_hub"})


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["from-swift", "swift deploy --model x"], 0),
        (["from-llama-swap", "/no/such/file.yaml"], 2),
        (["new-key", "team-a"], 0),
        (["status"], 2),
        (["plan", "--model", "/no/such/folder", "--gpus", "8GiB"], 2),
        (["check", "/no/such/file.yaml"], 2),
    ],
)
def test_the_other_commands_import_no_engine(tmp_path: Path, words: list[str], code: int) -> None:
    """Nor Ray, where no cluster runs or the input is wrong."""
    found, modules, _ = run(tmp_path, *words)
    assert found == code
    assert not modules & HEAVY


@pytest.mark.slow
@pytest.mark.parametrize("module", ["serve_app.app", "serve_app.replica.deployment", "serve_app.router.deployment"])
def test_what_serve_imports_to_build_an_application_brings_no_engine(module: str) -> None:
    """Serve builds each application in a process of its own, and starts the router in one: torch costs two seconds."""
    program = f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert not packages & {"torch", "transformers", "vllm", "accelerate", "xgrammar", "tokenizers"}
