"""Chooses the requests that a page is told of. It is pure.

A busy router ends hundreds of requests in a second, more than anybody reads, and they would be most of what a page is
sent. So a page is told of `MOST_NEW` that it does not show yet, those first in which something went wrong, and of every
change of one that it shows as running.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from serve_app.console.requests import Row

MOST_NEW = 20


@dataclass(frozen=True)
class RowNews:
    """This is what the pages of a view are told of requests: `rows` by their ids, the number of those that were left
    out, and the ids of those in `gone`, which the pages show as running and which the router has forgotten. `running`
    are the ids that the pages show as running then."""

    rows: Sequence[Row]
    left_out: int
    gone: Sequence[int]
    running: frozenset[int]


def running_in(rows: Iterable[Row]) -> frozenset[int]:
    """Returns the ids of the requests that run."""
    return frozenset(row.id for row in rows if row.outcome == "running")


def row_news(changed: Sequence[Row], kept: Set[int], running: frozenset[int]) -> RowNews:
    """Returns what is told of requests that have changed. `kept` are the ids that the router still has, and `running`
    those that the pages show as running."""
    known = [row for row in changed if row.id in running]
    new = sorted((row for row in changed if row.id not in running), key=lambda row: (_is_odd(row), row.id))
    rows = sorted([*known, *new[-MOST_NEW:]], key=lambda row: row.id)
    over = {row.id for row in known} - running_in(known)
    gone = sorted(running - kept)
    return RowNews(rows, max(0, len(new) - MOST_NEW), gone, (running - over - set(gone)) | running_in(rows))


def _is_odd(row: Row) -> bool:
    """Returns whether something went wrong with a request."""
    return row.outcome in ("refused", "failed") or row.retries > 0 or row.resumes > 0
