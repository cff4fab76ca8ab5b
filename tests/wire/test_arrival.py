"""A body comes in once, and every layer of the process has it from the scope."""

from typing import Any

import pytest
from starlette.requests import Request

from serve_app.config import RouterConfig
from serve_app.errors import RequestTooLarge
from serve_app.wire import body as body_module
from serve_app.wire.arrival import known_body, read_body, with_body
from serve_app.wire.body import MOST_KEPT_FIELDS, RequestBody

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "headers": []}


def receiver(*pieces: bytes) -> Any:
    """A `receive` of these pieces and then of a client that leaves."""
    messages = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1}
        for number, piece in enumerate(pieces)
    ]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    return receive


async def test_a_body_in_one_piece_is_not_copied() -> None:
    """Nor is one that a layer in front has read."""
    content = b"x" * 1000
    body = await read_body(SCOPE, receiver(content), RouterConfig())
    assert body.content is content
    scope, receive = with_body(SCOPE, receiver(), body)
    assert await read_body(scope, receive, RouterConfig()) is body
    assert (await receive())["body"] is content


async def test_a_body_that_was_read_in_front_has_the_limits_of_each_layer() -> None:
    """A model's own may be smaller than those of the process that listens."""
    scope, receive = with_body(SCOPE, receiver(), RequestBody(b"x" * 11))
    with pytest.raises(RequestTooLarge, match="over the limit of 10 bytes"):
        await read_body(scope, receive, RouterConfig(max_body_bytes=10))


@pytest.mark.parametrize("was_read", [True, False])
async def test_an_application_gets_the_body_of_the_scope_and_then_what_follows(was_read: bool) -> None:
    """Whether or not `receive` still has the one that came."""
    came = receiver() if was_read else receiver(b"the ", b"first")
    scope, receive = with_body(SCOPE, came, RequestBody(b"another"))
    assert await Request(scope, receive).body() == b"another"
    assert await receive() == {"type": "http.disconnect"}
    assert known_body(scope).content == b"another"  # type: ignore[union-attr]
    assert known_body(SCOPE) is None


@pytest.mark.parametrize(("fields", "splits"), [(1, 1), (MOST_KEPT_FIELDS, 1), (MOST_KEPT_FIELDS + 1, 2)])
def test_what_is_kept_of_a_body_has_a_bound(fields: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields take more memory than their bytes, for as long as a request lasts."""
    seen: list[int] = []
    real = body_module._OBJECT

    class Watched:
        """Counts."""

        def decode(self, content: bytes) -> Any:
            """As msgspec's."""
            seen.append(len(content))
            return real.decode(content)

    monkeypatch.setattr(body_module, "_OBJECT", Watched())
    body = RequestBody(b"{" + b",".join(b'"%d":1' % number for number in range(fields)) + b"}")
    assert body.peek() == body.peek()
    assert body.with_fields(model="m").content.endswith(b'"model":"m"}')
    assert len(seen) == splits
