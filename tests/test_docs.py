"""What the documentation says is held against the code. `make docs` checks its links."""

import argparse
import importlib.util
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.main import _parser
from serve_app.config import ModelConfig, RouterConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
CONFIGS = {"serve_app.app:model": ModelConfig, "serve_app.app:router": RouterConfig}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fields_in_table(heading: str) -> set[str]:
    """The names in the first column of the table below a heading of docs/configuration.md."""
    section = (ROOT / "docs/configuration.md").read_text().split(f"\n## {heading}\n")[1].split("\n#")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}


def applications(page: Path) -> list[dict[str, Any]]:
    """The applications in the YAML of a page."""
    texts = [text for language, text in BLOCK.findall(page.read_text()) if language == "yaml"]
    documents = [yaml.safe_load(text.replace("…", "x")) for text in texts]
    listed = [doc.get("applications", []) if isinstance(doc, dict) else doc for doc in documents]
    return [application for part in listed for application in part if "import_path" in application]


def shell_words(line: str) -> list[str]:
    """The words of the first command of a line, without its comment and its redirection."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(itertools.takewhile(lambda word: not set(word) <= set("<>&|;"), lexer))


def test_readme_is_short() -> None:
    """The README has at most 1,000 words; the rest belongs in docs/."""
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_every_field_is_documented() -> None:
    """The tables of fields name exactly the fields that a config may have."""
    assert fields_in_table("Fields of a model") == set(ModelConfig.model_fields)
    assert fields_in_table("Fields of the router") == set(RouterConfig.model_fields)


@pages
def test_configs_are_accepted(page: Path) -> None:
    """Each application in an example has arguments that serve-app accepts."""
    for application in applications(page):
        CONFIGS[application["import_path"]].from_args(application.get("args"))


@pages
def test_python_modules_exist(page: Path) -> None:
    """Each `python -m MODULE` of this project names a module that exists."""
    for module in re.findall(r"python -m ((?:serve_app|benchmarks|tests)[\w.]*)", page.read_text()):
        assert importlib.util.find_spec(module), module


@pages
def test_make_targets_exist(page: Path) -> None:
    """Each `make TARGET` names a target of the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE)) <= targets


@pages
def test_files_exist(page: Path) -> None:
    """Each file of the repository that a page names exists."""
    folders = "benchmarks|deploy_configs|docker|docs|requirements|scripts|serve_app|tests"
    for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w\.(?:py|md|sh|txt|ya?ml|json))\b", page.read_text()):
        assert (ROOT / path).exists(), path


@pages
def test_serve_app_commands_are_understood(page: Path) -> None:
    """Each `serve-app` command in a block is one that the command line takes."""
    for _, text in BLOCK.findall(page.read_text()):
        for line in re.findall(r"^serve-app (.*)$", text, re.MULTILINE):
            _parser().parse_args(shell_words(line))


def test_every_command_and_flag_is_documented() -> None:
    """docs/commands.md has each command, and some page has each of its flags."""
    parser = _parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    listed = set(re.findall(r"^\| `serve-app ([\w-]+)", (ROOT / "docs/commands.md").read_text(), re.MULTILINE))
    assert listed == set(commands)
    everything = "\n".join(page.read_text() for page in PAGES)
    for name, command in commands.items():
        flags = {flag for action in command._actions for flag in action.option_strings if flag.startswith("--")}
        missing = {flag for flag in flags - {"--help"} if not re.search(rf"{re.escape(flag)}(?![\w-])", everything)}
        assert not missing, f"{name}: {missing}"


def test_every_benchmark_is_documented() -> None:
    """The table of docs/benchmarks.md names each module that can be run, but the model that others start."""
    table = (ROOT / "docs/benchmarks.md").read_text().split("## All benchmarks")[1]
    runnable = {
        file.stem for file in (ROOT / "benchmarks").glob("*.py") if 'if __name__ == "__main__"' in file.read_text()
    }
    assert set(re.findall(r"^\| `python -m benchmarks\.(\w+)`", table, re.MULTILINE)) == runnable - {"mock_model"}
