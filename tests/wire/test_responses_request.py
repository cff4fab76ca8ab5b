"""Items of a Responses request, as clients may send them."""

import pytest

from serve_app.errors import InvalidRequest
from serve_app.wire.responses.chat_request import _texts


@pytest.mark.parametrize("kind", [["x"], {"a": 1}, None, 1, "input_image"])
def test_a_part_of_no_known_type_is_refused(kind: object) -> None:
    """Whatever JSON the type is, it is the client's mistake and not the server's."""
    with pytest.raises(InvalidRequest, match=r"input\[0\]\.content\[0\]: a part of type .* is not supported"):
        _texts([{"type": kind, "text": "a"}], "input[0].content")
    assert _texts([{"type": "input_text", "text": "a"}], "x") == ["a"]
