"""Has the words for the states of models and where they serve, for `serve run` and `serve-app run`. It is pure."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from serve_app.ray_serve import ANY_ADDRESS
from serve_app.router.model_status import ModelStatus, State

if TYPE_CHECKING:
    from ray.serve.schema import HTTPOptionsSchema

MEND = (
    "correct the config file and pass it to `RAY_AUTH_MODE=token serve deploy`, or stop this with Ctrl-C and run it "
    "again"
)
STATES: Mapping[State, str] = {
    "ready": "is ready",
    "asleep": "is asleep",
    "loading": "is loading",
    "failed": "has failed",
    "stopping": "is stopping",
}


def state_line(name: str, state: State, message: str) -> str:
    """Returns what an application is doing, with the reason if it is not ready."""
    reason = f": {message}" if message and state != "ready" else ""
    return f"{name} {STATES[state]}{reason}"


def serving(models: Mapping[str, ModelStatus], url: str, is_open: bool) -> list[str]:
    """Returns how many models serve at the address, and a command to try."""
    ready = [model for model in models.values() if model.is_open]
    lines = [f"{len(ready)} of {len(models)} models serve at {url}"]
    if ready:
        question = [{"role": "user", "content": "What is serve-app?"}]
        body = json.dumps({"model": ready[0].name, "messages": question, "temperature": 0})
        key = "" if is_open else " -H 'authorization: Bearer KEY'"
        lines.append(f"try: curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{body}'")
    return lines


def http_address(options: "HTTPOptionsSchema") -> str:
    """Returns the address of the HTTP proxy of a Serve with these options."""
    host = "127.0.0.1" if options.host in (None, "", ANY_ADDRESS) else options.host
    return f"http://{host}:{options.port}{(options.root_path or '').rstrip('/')}"
