"""The private parts of each library are in one file, and those of vLLM in three: one serves, one plans, and one is made
of a class of vLLM's.

What ruff (SLF001, TID251) and import-linter cannot see is here:
modules that no list bans yet, and private names in texts.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.contracts.contract import ROOT

# The files of each library, and the modules that the library documents, which any file may import.
FILES = {
    "ray": ("serve_app/ray_serve.py",),
    "vllm": tuple(f"serve_app/engines/vllm/vllm_{name}.py" for name in ("internals", "meta_model", "node_executor")),
    "transformers": ("serve_app/engines/pt/transformers_internals.py",),
    "torch": ("serve_app/engines/torch_internals.py",),
    "accelerate": ("serve_app/engines/pt/accelerate_internals.py",),
}
DOCUMENTED = {
    "ray": {"ray", "ray.serve", "ray.exceptions", "ray.util.scheduling_strategies", "ray.serve.config",
            "ray.serve.exceptions", "ray.serve.handle", "ray.serve.schema"},
    "vllm": set(),
    "transformers": {"transformers"},
    "torch": {"torch"},
    "accelerate": set(),
}  # fmt: skip
BY_NAME = frozenset({"getattr", "hasattr", "setattr", "delattr"})
SOURCES = sorted((ROOT / "serve_app").rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def private_texts(tree: ast.AST) -> Iterator[str]:
    """Names with an underscore that are looked up in an object by a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            is_own = isinstance(node.args[0], ast.Name) and node.args[0].id == "self"
            name = node.args[1]
            if isinstance(name, ast.Constant) and str(name.value).startswith("_") and not is_own:
                yield str(name.value)


@pytest.mark.parametrize("library", FILES)
def test_a_librarys_undocumented_modules_are_imported_in_its_files(library: str) -> None:
    """A module that becomes public belongs into `DOCUMENTED`."""
    others = [path for path in SOURCES if path not in {ROOT / name for name in FILES[library]}]
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in others
        for name in imported(ast.parse(path.read_text()))
        if name.partition(".")[0] == library and name not in DOCUMENTED[library]
    }
    assert sorted(found) == []


def test_private_names_are_looked_up_in_those_files_only() -> None:
    """Ruff sees `module._hf_hook`, and not `hasattr(module, "_hf_hook")`."""
    others = [path for path in SOURCES if path not in {ROOT / name for names in FILES.values() for name in names}]
    found = {
        f"{path.relative_to(ROOT)}: {name}" for path in others for name in private_texts(ast.parse(path.read_text()))
    }
    assert sorted(found) == []
