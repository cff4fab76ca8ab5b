"""Makes OpenAI's error object, which is the form of every refusal."""

import json
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from serve_app.errors import InvalidRequest, RequestError

# What a client sends may have this many levels of lists and objects. Later steps (pydantic, json, jinja) recurse with
# several frames a level, within Python's 1000 frames. Tools and schemas have ten levels or so.
MOST_LEVELS = 100
TOO_DEEP = f"it is nested more than {MOST_LEVELS} levels deep"


def error_object(error: RequestError) -> dict[str, Any]:
    """Returns the body: `{"error": {"message", "type", "param", "code"}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def read_json(text: bytes | str) -> Any:
    """Returns the decoded JSON. Raises ValueError if it is not JSON, is nested too deep, or holds half a character.

    Half a character is a lone surrogate, which JSON can spell but no later step could encode again.
    """
    body = text.encode() if isinstance(text, str) else text
    try:
        document = json.loads(body.decode())  # JSON is UTF-8 (RFC 8259), but Python would read UTF-16 too.
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    require_shallow(document, body)
    if b"\\ud" in body.lower():
        json.dumps(document, ensure_ascii=False).encode()
    return document


def require_shallow(document: Any, body: bytes) -> None:
    """Raises ValueError if the document of `body` has more than MOST_LEVELS levels of lists and objects."""
    if body.count(b"[") + body.count(b"{") > MOST_LEVELS and _is_too_deep(document):
        raise ValueError(TOO_DEEP)


def _is_too_deep(document: Any) -> bool:
    """Returns whether the document is nested too deep. It goes level by level, without recursion."""
    level = [document] if isinstance(document, (list, dict)) else []
    for _ in range(MOST_LEVELS):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (list, dict))
        ]
        if not level:
            return False
    return True


def error_response(error: RequestError) -> JSONResponse:
    """Returns the whole answer, with `retry-after` in whole seconds if that is known."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return JSONResponse(error_object(error), status_code=error.status, headers=headers)


def route_error_response(error: HTTPException, message: str) -> JSONResponse:
    """Returns the answer for an endpoint or a method that does not exist, with the status and the headers of
    Starlette's error. A 405 has `allow` (RFC 9110, 15.5.6)."""
    response = error_response(InvalidRequest(message))
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response
