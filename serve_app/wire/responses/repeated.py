"""Says what a response repeats of its request, and how much that may be. It is pure."""

from collections.abc import Mapping

from serve_app.errors import InvalidRequest

# A response repeats these fields, and its stream does so three times. OpenAI bounds the first ones, and the
# instructions are part of the prompt, whose length the model bounds.
REPEATED = (
    "instructions", "max_tool_calls", "metadata", "parallel_tool_calls", "reasoning", "text", "tool_choice", "tools",
    "top_logprobs", "user",
)  # fmt: skip
# These need not be part of the prompt.
UNBOUNDED = frozenset({"reasoning", "text", "tool_choice", "tools"})
# The JSON of all of these together has at most this many bytes, which is 2 KiB for each of OpenAI's most 128 tools.
MOST_REPEATED_BYTES = 2**18


def require_repeatable(sizes: Mapping[str, int]) -> None:
    """Raises InvalidRequest if the fields of a request, of which `sizes` has the bytes of JSON, are too long to be
    repeated."""
    repeated = {name: sizes[name] for name in sizes.keys() & UNBOUNDED}
    total = sum(repeated.values())
    if total > MOST_REPEATED_BYTES:
        longest = max(repeated, key=lambda name: repeated[name])
        names = ", ".join(sorted(UNBOUNDED))
        raise InvalidRequest(
            f"'{longest}' has {repeated[longest]} bytes. Each response repeats {names}, which may have at most "
            f"{MOST_REPEATED_BYTES} bytes together, but have {total}. Shorten '{longest}'.",
            param=longest,
        )
