"""OpenAI's error object, the one shape of every refusal."""

import json
import math
from typing import Any

from starlette.responses import JSONResponse

from serve_app.errors import RequestError

# Levels of lists and objects in what a client sends. Later steps (pydantic, json, jinja) recurse, several frames a
# level, within Python's 1000 frames; tools and schemas have ten levels or so.
MOST_LEVELS = 100
TOO_DEEP = f"it is nested more than {MOST_LEVELS} levels deep"


def error_object(error: RequestError) -> dict[str, Any]:
    """Returns the body: `{"error": {"message", "type", "param", "code"}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def read_json(text: bytes | str) -> Any:
    """Decodes the JSON. Raises ValueError for what is none, is nested too deep, or holds half a character.

    JSON can spell a lone surrogate, which no later step could encode again.
    """
    body = text.encode() if isinstance(text, str) else text
    try:
        document = json.loads(body.decode())  # UTF-8 alone is JSON (RFC 8259); Python would read UTF-16 too.
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    require_shallow(document, body)
    if b"\\ud" in body.lower():
        json.dumps(document, ensure_ascii=False).encode()
    return document


def require_shallow(document: Any, body: bytes) -> None:
    """Raises ValueError where the document that `body` spells has more than MOST_LEVELS levels of lists and objects."""
    if body.count(b"[") + body.count(b"{") > MOST_LEVELS and _is_too_deep(document):
        raise ValueError(TOO_DEEP)


def _is_too_deep(document: Any) -> bool:
    """Says whether it is nested too deep. This goes level by level, without recursion."""
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
    """Returns the whole answer, with `retry-after` in whole seconds where it is known."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return JSONResponse(error_object(error), status_code=error.status, headers=headers)
