"""A card's bandwidth is known by its whole name, or not at all."""

import pytest

from serve_app.facts.card_bandwidth import card_bandwidth
from serve_app.facts.inventory import KNOWN_GPUS


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA GeForce RTX 3090", 936), ("RTX3090", 936), ("NVIDIA GeForce RTX 3090 Ti", 1008),
        ("NVIDIA GeForce RTX 4080 SUPER", 736), ("NVIDIA GeForce RTX 4070 Ti SUPER", 672),
        ("NVIDIA A100-SXM4-80GB", 2039), ("NVIDIA A100 80GB PCIe", 1935), ("NVIDIA A100-PCIE-40GB", 1555),
        ("A100-40GB", 1555), ("NVIDIA H100 80GB HBM3", 3350), ("NVIDIA H100 PCIe", 2039), ("NVIDIA H100 NVL", 3938),
        ("NVIDIA H200", 4800), ("Tesla T4", 320), ("Tesla V100-SXM2-32GB", 900), ("NVIDIA A10G", 600),
        ("NVIDIA RTX A6000", 768), ("NVIDIA RTX 6000 Ada Generation", 960), ("Quadro RTX 6000", 672),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 1792), ("NVIDIA L40S", 864),
    ],
)  # fmt: skip
def test_names_of_nvml_and_of_users_are_known(name: str, bandwidth: int) -> None:
    """Maker, family and spaces do not count."""
    assert card_bandwidth(name) == bandwidth


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GB10", "", "24GiB",
        "AMD Instinct MI300X", "RTX 30900", "NVIDIA GeForce RTX 4080 Max-Q",
    ],
)  # fmt: skip
def test_a_name_that_only_begins_like_a_known_one_is_unknown(name: str) -> None:
    """Laptops' cards and parts of cards are slower."""
    assert card_bandwidth(name) is None


def test_every_card_that_a_plan_takes_by_name_has_a_bandwidth() -> None:
    """The two tables grow together."""
    assert [name for name in KNOWN_GPUS if card_bandwidth(name) is None] == []
