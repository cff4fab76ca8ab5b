"""Computes how much room the buffers of pt's KV cache take, in tokens. The engine allocates by it, and the plan
counts by it."""

# A buffer has this many columns of room beyond what its rows need.
SLACK = 128
# A buffer grows by this many rows, so that not every new row moves it. One or two rows, which may be long, get no more.
ROW_STEP = 4


def cells(rows: int, tokens: int) -> int:
    """Returns the most tokens for which buffers of `rows` rows have room if the longest row has `tokens` tokens."""
    return row_capacity(rows) * (tokens + SLACK)


def row_capacity(rows: int) -> int:
    """Returns how many rows a buffer for so many sequences has."""
    return rows if rows <= 2 else -(-rows // ROW_STEP) * ROW_STEP


def full_length_requests(budget: int, tokens: int) -> int:
    """Returns how many sequences of `tokens` tokens run at once in a budget. One prompt has its own buffers beside
    the others."""
    most = 0
    while budget_for(most + 1, tokens) <= budget:
        most += 1
    return most


def budget_for(requests: int, tokens: int) -> int:
    """Returns the least budget in which so many sequences of `tokens` tokens run at once."""
    return cells(requests, tokens) + (cells(1, tokens) if requests > 1 else 0)
