"""Lets modules that are not installed be imported, by a process that builds models and computes nothing."""

import importlib.abc
import importlib.machinery
from collections.abc import Collection
from types import ModuleType

# Libraries ask for the version of what they import, and want one that is not older than this.
VERSION = "0.28.0"


class _Absent(type):
    """A class of which every attribute is a class of the same kind, so that it can stand for whatever is imported. It
    can be called with anything."""

    def __getattr__(cls, name: str) -> "_Absent":
        return look_up(name)


def look_up(name: str) -> _Absent:
    """Returns what stands for the name. Raises AttributeError for Python's own names."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(name, (_Anything,), {})


class _Anything:
    def __init__(self, *_: object, **__: object):
        pass


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module without contents for the names in `modules` and for all modules of `packages`."""

    def __init__(self, modules: Collection[str], packages: Collection[str]):
        self._modules, self._packages = modules, packages

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Returns the specification of a module that is stood in for, or None. Python calls it."""
        is_wanted = name in self._modules or name.partition(".")[0] in self._packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_wanted else None

    def create_module(self, spec: object) -> None:
        """Leaves it to Python to make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Gives the module whatever is looked up in it."""
        vars(module).update(__getattr__=look_up, __version__=VERSION)


class _Operation:
    """An operation that is not there, and its overloads."""

    def __call__(self, *_: object, **__: object) -> None:
        """Raises RuntimeError."""
        raise RuntimeError("This operation is a stand-in: a model without storage computes nothing.")

    def __getattr__(self, name: str) -> "_Operation":
        if name.startswith("__"):
            raise AttributeError(name)
        return self


# It stands for any operation. To call it raises RuntimeError.
absent = _Operation()
