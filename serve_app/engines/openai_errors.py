"""OpenAI's error object, the one shape of every refusal."""

import json
import math
from typing import Any

from starlette.responses import JSONResponse

from serve_app.errors import RequestError


def error_object(error: RequestError) -> dict[str, Any]:
    """The body: `{"error": {"message", "type", "param", "code"}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def read_json(body: bytes) -> Any:
    """The decoded body. Raises ValueError for what is no JSON, is nested too deep, or holds half a character.

    JSON can spell a lone surrogate, which no later step could encode again.
    """
    try:
        document = json.loads(body)
        if b"\\ud" in body.lower():
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return document


def error_response(error: RequestError) -> JSONResponse:
    """The whole answer, with `retry-after` in whole seconds where it is known."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return JSONResponse(error_object(error), status_code=error.status, headers=headers)
