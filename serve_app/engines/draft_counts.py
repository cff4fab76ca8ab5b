"""Holds what an engine counts of its speculation."""

from dataclasses import dataclass, field


@dataclass
class DraftCounts:
    """Counts since the engine's start: drafts, their tokens, and those of them that were accepted, also by their place
    in the draft."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_pos: list[int] = field(default_factory=list)
