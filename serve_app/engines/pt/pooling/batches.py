"""Decides which inputs a step computes, and which of them share a pass. It is pure.

These are its laws:
- Owners take turns, one input each, until the step is full. So a client of one text waits for one step beside another
  of a thousand.
- A pass has at most the step's tokens with its padding, unless it is one input.
- Inputs of about one length share a pass, so a pass computes little padding.
"""

from collections.abc import Sequence

from serve_app.engines.pt.core.fair_queue import FairQueue
from serve_app.engines.pt.pooling.inputs import Input

# A pass ends where the next input is shorter than this share of its longest one...
LEAST_SHARE = 0.8
# ... unless it has fewer tokens than this, because a pass of few tokens costs about as much as one of twice as many.
LEAST_TOKENS = 256


def next_step(waiting: FairQueue[Input], tokens: int, rows: int) -> list[Input]:
    """Takes the inputs of the next step from those that wait: at most `rows`, of `tokens` tokens together, and at least
    one."""
    taken: list[Input] = []
    total = 0
    while (head := waiting.head()) is not None:
        if taken and (total + len(head) > tokens or len(taken) == rows):
            break
        waiting.take(head)
        taken.append(head)
        total += len(head)
    return taken


def passes_of(inputs: Sequence[Input], tokens: int) -> list[list[Input]]:
    """Returns the inputs of a step in groups that share a pass, the longest first."""
    passes: list[list[Input]] = []
    for item in sorted(inputs, key=len, reverse=True):
        group = passes[-1] if passes else []
        if not group or _begins_another(group, len(item), tokens):
            passes.append([item])
        else:
            group.append(item)
    return passes


def _begins_another(group: Sequence[Input], length: int, tokens: int) -> bool:
    longest, count = len(group[0]), len(group)
    if longest * (count + 1) > tokens:
        return True
    return length < LEAST_SHARE * longest and longest * count >= LEAST_TOKENS
