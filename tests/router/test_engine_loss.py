"""Which answers say that an engine is lost, and which are a request's own errors.

Those of vLLM are in `tests/contracts/test_vllm.py`.
"""

import json

import pytest

from serve_app.engines.pt.api.request_error import request_error
from serve_app.errors import EngineError, InvalidRequest, OutOfDeviceMemory
from serve_app.router.engine_loss import is_lost_event, is_lost_status
from serve_app.wire.openai_errors import error_object


def event(document: object) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(document)}\n\n".encode()


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (EngineError("the pt engine has stopped"), True),
        (RuntimeError("a step failed"), False),
        (InvalidRequest("the grammar allows no token"), False),
        (OutOfDeviceMemory("too long"), False),
    ],
)
def test_what_pt_writes_into_a_stream(error: Exception, is_lost: bool) -> None:
    """By the very function that writes it."""
    assert is_lost_event(event(error_object(request_error(error)))) is is_lost


def test_text_of_a_model_is_no_error() -> None:
    """Whatever it says."""
    said = {"choices": [{"delta": {"content": '"error" {"error": {"code": 503}}'}}]}
    assert not is_lost_event(event(said))
    assert is_lost_event(event(said) + event({"error": {"code": 503, "message": "gone"}}))
    assert not is_lost_event(event({"error": "no object"}))


def test_heads() -> None:
    """A full queue, a bad request and an error of the request are its own."""
    assert [is_lost_status(status) for status in (502, 503, 504)] == [True] * 3
    assert not any(is_lost_status(status) for status in (200, 400, 422, 429, 500, 501))
