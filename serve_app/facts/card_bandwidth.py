"""Knows the memory bandwidth of common cards by their names, from the vendor's data sheets."""

import re

# GB/s by the name without maker, family and spaces. Data sheets round differently, by 1 % at most.
_GB_PER_S = {
    r"t4": 320, r"v100(sxm[23]|pcie)?(16|32)gb": 900, r"p100(sxm2|pcie)?16gb": 732, r"p40": 346,
    r"rtx2080ti": 616, r"titanrtx": 672, r"rtx8000": 672, r"rtx6000": 672,
    r"a2": 200, r"a10": 600, r"a10g": 600, r"a16": 200, r"a30": 933, r"a40": 696,
    r"a100(sxm4|pcie)?40gb": 1555, r"a100(sxm4)?80gb": 2039, r"a100(80gbpcie|pcie80gb)": 1935,
    r"rtx3060": 360, r"rtx3060ti": 448, r"rtx3070": 448, r"rtx3070ti": 608, r"rtx3080": 760, r"rtx3080ti": 912,
    r"rtx3090": 936, r"rtx3090ti": 1008, r"rtxa4000": 448, r"rtxa4500": 640, r"rtxa5000": 768, r"rtxa5500": 768,
    r"rtxa6000": 768,
    r"l4": 300, r"l40": 864, r"l40s": 864, r"rtx4060": 272, r"rtx4060ti": 288, r"rtx4070": 504, r"rtx4070super": 504,
    r"rtx4070ti": 504, r"rtx4070tisuper": 672, r"rtx4080": 717, r"rtx4080super": 736, r"rtx4090d?": 1008,
    r"rtx4000ada": 360, r"rtx4500ada": 432, r"rtx5000ada": 576, r"rtx6000ada": 960,
    r"rtx5060ti": 448, r"rtx5070": 672, r"rtx5070ti": 896, r"rtx5080": 960, r"rtx5090": 1792,
    r"rtxpro6000blackwell(server|workstation|maxqworkstation)": 1792,
    r"h100(80gb)?(hbm3)?": 3350, r"h100pcie": 2039, r"h100nvl": 3938, r"h200(nvl)?": 4800, r"b200": 8000,
}  # fmt: skip
_CARDS = [(re.compile(pattern), bandwidth) for pattern, bandwidth in _GB_PER_S.items()]
_WITHOUT_MEANING = re.compile(r"nvidia|geforce|tesla|quadro|generation|edition|[\s_-]+")


def plain_name(name: str) -> str:
    """Returns the name of a card without its maker, its family and spaces, in small letters."""
    return _WITHOUT_MEANING.sub("", name.lower())


def card_bandwidth(name: str) -> int | None:
    """Returns the bandwidth in GB/s of the card with this name, as NVML or a user writes it, or None if it is not
    known.

    A name must match as a whole: a laptop's card or a part of a card (MIG) has another bandwidth than the card whose
    name is in its own.
    """
    short = plain_name(name)
    return next((bandwidth for card, bandwidth in _CARDS if card.fullmatch(short)), None)
