"""Which requests a page is told of."""

from msgspec.structs import replace

from serve_app.console.requests import Row
from serve_app.console.row_news import MOST_NEW, row_news
from tests.console.test_shared import ROW

NOBODY = frozenset[int]()


def row(number: int, **more: object) -> Row:
    """A request that ended well."""
    return replace(ROW, id=number, **more)


def ids(rows: object) -> list[int]:
    """The ids of requests."""
    return [each.id for each in rows]  # type: ignore[attr-defined]


def test_the_newest_are_told_and_the_others_are_counted() -> None:
    """However many end in a second, a delta stays small."""
    rows = [row(number) for number in range(1, 101)]
    news = row_news(rows, frozenset(range(1, 101)), NOBODY)
    assert ids(news.rows) == list(range(101 - MOST_NEW, 101))
    assert (news.left_out, list(news.gone), news.running) == (100 - MOST_NEW, [], NOBODY)


def test_what_went_wrong_is_told_before_the_newest() -> None:
    """One failed request among hundreds is the one that somebody looks for."""
    odd = {3: {"outcome": "failed"}, 5: {"outcome": "refused"}, 7: {"retries": 1}, 9: {"resumes": 1}}
    rows = [row(number, **odd.get(number, {})) for number in range(1, 101)]
    news = row_news(rows, frozenset(range(1, 101)), NOBODY)
    assert ids(news.rows) == [*odd, *range(101 - MOST_NEW + len(odd), 101)]


def test_a_request_that_a_page_shows_as_running_is_told_when_it_ends() -> None:
    """Also beside many others that are newer. One that was left out and ends counts as new."""
    first = row_news([row(1, outcome="running"), row(2, outcome="running")], frozenset({1, 2}), NOBODY)
    assert first.running == {1, 2}
    others = [row(number) for number in range(10, 60)]
    kept = frozenset({1, 2, *range(10, 60)})
    second = row_news([row(1), *others], kept, first.running)
    assert ids(second.rows) == [1, *range(60 - MOST_NEW, 60)]
    assert (second.running, second.left_out) == ({2}, 50 - MOST_NEW)


def test_a_page_is_told_that_a_running_request_was_forgotten() -> None:
    """It would show it as running for ever, because the router keeps the last requests alone."""
    news = row_news([], frozenset({7}), frozenset({1, 7}))
    assert (list(news.gone), news.running, list(news.rows)) == ([1], {7}, [])
