"""Has the one rule that tells both engines' answers apart: those that say that the engine is lost, and those that
are the request's own error. It is pure.

If the engine is lost, another replica may get the request, or the rest of it. A request's own error is passed on as it
is, because it would be the same everywhere.

- A head says it by its status 502, 503 or 504. pt and vLLM answer 503 if their engine has died.
- In a stream the head is sent, so an error event says it by its `code`. pt's is "model_unavailable". vLLM's codes are
  numbers, and its 500 means either. The two errors that vLLM raises in all open streams when its engine dies are told
  from the others by their messages: that of `EngineDeadError`, and the empty one of `EngineGenerateError`.
"""

import json
from collections.abc import Mapping
from typing import Any

from serve_app.errors import EngineAway, ModelNotFound, ModelUnavailable
from serve_app.router.transcript import events
from serve_app.wire.error_events import error_of

LOST_STATUSES = frozenset({502, 503, 504})
VLLM_DEAD = "EngineCore encountered an issue"


def is_lost_status(status: int) -> bool:
    """Returns whether the head of an answer says that its engine is lost."""
    return status in LOST_STATUSES


def is_lost_event(piece: bytes) -> bool:
    """Returns whether one of these server-sent events says that the engine behind a living replica is lost or away."""
    return any(_is_lost(error.get("code"), error.get("message")) for error in _errors(piece))


def is_away(piece: bytes) -> bool:
    """Returns whether a body or server-sent events say that the engine is only away, because it gave its memory to
    another model. Nothing is lost then, and it comes back."""
    return b'"%s"' % EngineAway.code.encode() in piece and any(
        error.get("code") == EngineAway.code for error in (*_errors(piece), *_body_error(piece))
    )


def is_unknown_model(body: bytes) -> bool:
    """Returns whether the body of an answer says that there is no such model or adapter at the replica."""
    return any(error.get("code") == ModelNotFound.code for error in _body_error(body))


def _errors(piece: bytes) -> list[Mapping[str, Any]]:
    if b'"error"' not in piece:
        return []
    return [error for event in events(piece) if (error := error_of(event)) is not None]


def _body_error(piece: bytes) -> list[dict[str, Any]]:
    try:
        body = json.loads(piece)
    except ValueError:
        return []
    error = body.get("error") if isinstance(body, dict) else None
    return [error] if isinstance(error, dict) else []


def _is_lost(code: Any, message: Any) -> bool:
    if code == 500:
        return not message or str(message).startswith(VLLM_DEAD)
    return code in (ModelUnavailable.code, EngineAway.code) or code in LOST_STATUSES
