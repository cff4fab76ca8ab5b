"""The compute capability of cards by their names."""

import pytest

from serve_app.facts.card_capability import card_capability


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("Tesla V100-SXM2-32GB", (7, 0)), ("Tesla T4", (7, 5)), ("Quadro RTX 6000", (7, 5)),
        ("NVIDIA A100-SXM4-80GB", (8, 0)), ("A100-80GB", (8, 0)), ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", (8, 0)),
        ("NVIDIA GeForce RTX 3090", (8, 6)), ("RTX3090", (8, 6)), ("NVIDIA RTX A6000", (8, 6)), ("NVIDIA A10G", (8, 6)),
        ("NVIDIA L4", (8, 9)), ("NVIDIA L40S", (8, 9)), ("NVIDIA GeForce RTX 4090", (8, 9)),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9)), ("NVIDIA H100 80GB HBM3", (9, 0)), ("H200", (9, 0)),
        ("NVIDIA H20", (9, 0)), ("NVIDIA B200", (10, 0)), ("NVIDIA GeForce RTX 5090", (12, 0)),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0)),
        ("GPU", None), ("card", None), ("NVIDIA GeForce GTX 1080", None), ("MI300X", None),
    ],
)  # fmt: skip
def test_a_card_has_the_capability_of_its_name(name: str, capability: tuple[int, int] | None) -> None:
    """As NVML or a user writes it. What is not in the table is not guessed."""
    assert card_capability(name) == capability
