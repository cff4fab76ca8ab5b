"""Holds what an engine counts of the texts that it keeps for later prompts."""

from dataclasses import dataclass


@dataclass
class PromptCacheCounts:
    """Says what was asked of the cache since the engine's start, and what it holds now. Tokens are those of prompts."""

    queries: int = 0
    hits: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    texts: int = 0
    bytes: int = 0
