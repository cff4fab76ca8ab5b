"""Knows the compute capability of common cards by their names, from the vendor's tables."""

import re

from serve_app.facts.card_bandwidth import plain_name

Capability = tuple[int, int]
HOPPER: Capability = (9, 0)

_CAPABILITIES: tuple[tuple[str, Capability], ...] = (
    (r"p100.*", (6, 0)), (r"p40?", (6, 1)), (r"v100.*", (7, 0)),
    (r"t4|titanrtx|rtx20\d0(ti|super)?|rtx[568]000", (7, 5)),
    (r"a30|a100.*|a800.*", (8, 0)),
    (r"a2|a10g?|a16|a40|rtx30\d0(ti)?|rtxa[2456][05]00", (8, 6)),
    (r"l4|l20|l40s?|rtx40\d0(d|ti|super|tisuper)?|rtx[2456][05]00ada", (8, 9)),
    (r"h100.*|h200.*|h20.*|h800.*|gh200.*", HOPPER),
    (r"g?b200.*", (10, 0)), (r"g?b300.*", (10, 3)),
    (r"rtx50\d0(d|ti)?|rtxpro\d000blackwell.*", (12, 0)),
)  # fmt: skip
_CARDS = tuple((re.compile(pattern), capability) for pattern, capability in _CAPABILITIES)


def card_capability(name: str) -> Capability | None:
    """Returns the compute capability of the card with this name, as NVML or a user writes it, or None if it is not
    known. A part of a card (MIG) has that of the card."""
    short = plain_name(name)
    return next((capability for card, capability in _CARDS if card.fullmatch(short)), None)


def capability_text(capability: Capability) -> str:
    """Returns a capability as its vendor writes it, such as 8.0."""
    return f"{capability[0]}.{capability[1]}"


def read_capability(text: str) -> Capability:
    """Returns what `capability_text` has written. Raises ValueError for another text."""
    major, _, minor = text.partition(".")
    return int(major), int(minor)
