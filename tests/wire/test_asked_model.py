"""What a name means at a model with adapters."""

import pytest

from serve_app.wire.asked_model import Asked, asked_of, names_any

ADAPTERS = {"sql", "legal"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        (None, Asked("qwen")),
        ("qwen", Asked("qwen")),
        ("sql", Asked("qwen", "sql")),
        ("qwen:sql", Asked("qwen", "sql")),
        *(
            (name, None)
            for name in ("SQL", " sql", "sql ", "qwen: sql", "qwen:qwen:sql", "other:sql", "qwen:", ":sql", "")
        ),
        ("ѕql", None),  # A Cyrillic letter.
        ("sql\u200b", None),
        ("qwen:*", None),
    ],
)
def test_a_name_has_two_spellings_and_no_other(name: str | None, meant: Asked | None) -> None:
    """Nothing is trimmed, folded or normalized."""
    assert asked_of("qwen", ADAPTERS, name) == meant


@pytest.mark.parametrize(
    ("names", "base", "sql", "legal"),
    [
        (["qwen"], True, False, False),
        (["sql"], False, True, False),
        (["qwen:sql"], False, True, False),
        (["qwen:*"], False, True, True),
        (["qwen", "qwen:*"], True, True, True),
        (["other:*", "other:sql"], False, False, False),
        (["*"], False, False, False),
    ],
)
def test_the_base_and_its_adapters_are_allowed_one_by_one(names: list[str], base: bool, sql: bool, legal: bool) -> None:
    """Neither includes the other. MODEL:* is all adapters of the model."""
    asked = [Asked("qwen"), Asked("qwen", "sql"), Asked("qwen", "legal")]
    assert [what.is_in(names) for what in asked] == [base, sql, legal]
    assert names_any("qwen", ADAPTERS, names) == (base or sql or legal)
