"""What a client's YAML may stand for."""

import time

import pytest

from serve_app.errors import ConfigError
from serve_app.facts.yaml_bounds import MOST_DEPTH, MOST_VALUES, require_bounded

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "applications: []",
        "base: &base {a: 1}\nmore: {<<: *base, b: [*base, *base]}",
        "[" * MOST_DEPTH + "]" * MOST_DEPTH,
        "a: &a 1\nb: &a [*a]\nc: *a",  # An anchor may be defined again.
        "- x\n" * (MOST_VALUES - 2),
    ],
)
def test_what_a_config_file_may_have(text: str) -> None:
    """Aliases too."""
    require_bounded(text, "yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "yaml: with its aliases it stands for more than 20000 values"),
        ("- x\n" * (MOST_VALUES + 1), "yaml: with its aliases it stands for more than 20000 values"),
        ("[" * (MOST_DEPTH + 1), "yaml: it is nested more than 50 levels deep."),
        ("[" * 200_000, "yaml: it is nested more than 50 levels deep."),
        ("{a: " * 60_000, "yaml: it is nested more than 50 levels deep."),
        ("a: &a [*a]", r"yaml: \*a stands for nothing before it, or for what it is itself a part of"),
        ("a: *b", r"yaml: \*b stands for nothing before it"),
        ("a: [", "yaml: it is not valid YAML"),
        ("a: \x00", "yaml: it is not valid YAML"),
        ("a: '\ud800'", "yaml: it is not valid YAML"),
    ],
)
def test_what_would_take_the_memory_of_a_reader(text: str, told: str) -> None:
    """It is refused within a second, before anything is built."""
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=told):
        require_bounded(text, "yaml")
    assert time.monotonic() - begun < 1
