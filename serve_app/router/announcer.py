"""Tells the terminal of `serve run` how the models come up: each change once, then the address and a line to try."""

import asyncio
import json
import time

from serve_app.ray_serve import ANY_ADDRESS, http_options, listening_host
from serve_app.router.directory import ModelDirectory, ModelStatus
from serve_app.terminal import notify, say

INTERVAL_S = 1.0
# While nothing changes, a sign of life this often, in seconds.
REMINDER_S = 30.0
MEND = "mend the config file and give it to `serve deploy`, or stop this with Ctrl-C and run it again"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

STATES = {
    "ready": "is ready",
    "asleep": "is asleep",
    "loading": "is loading",
    "failed": "has failed",
    "stopping": "is stopping",
}


async def announce(directory: ModelDirectory, is_open: bool) -> None:
    """Prints until every model is ready or has failed, and again after each later change.

    `is_open`: nobody needs a key, which is told loudly where others can reach the address.
    """
    started = spoke = time.monotonic()
    seen: dict[str, ModelStatus] = {}
    if is_open and (host := listening_host()) not in LOOPBACK:
        notify(f"WARNING: no API keys are set, and Serve listens on {host}: whoever reaches it may use every model.")
        notify("WARNING: set SERVE_APP_API_KEYS_FILE (README, API keys), or http_options.host: 127.0.0.1.")
    while True:
        try:
            models = dict(await directory.models())
        except Exception as error:  # The controller may be restarting; the next round tells.
            say(f"cannot read Serve's status: {error}")
            models = seen
        changed = [model for name, model in models.items() if _differs(seen.get(name), model)]
        for model in changed:
            say(_line(model, time.monotonic() - started))
        is_news = any(model.name not in seen or not (model.is_open and seen[model.name].is_open) for model in changed)
        if is_news and all(model.is_open or model.state == "failed" for model in models.values()):
            for line in summary(models, address(), is_open):
                say(line)
        waiting = [model.name for model in models.values() if model.state == "loading"]
        if changed:
            spoke = time.monotonic()
        elif waiting and time.monotonic() - spoke > REMINDER_S:
            spoke = time.monotonic()
            say(f"still loading after {spoke - started:.0f} s: {', '.join(waiting)}")
        seen = models
        await asyncio.sleep(INTERVAL_S)


def summary(models: dict[str, ModelStatus], url: str, is_open: bool = True) -> list[str]:
    """What to tell once no model is loading any more."""
    failed = [model for model in models.values() if model.state == "failed"]
    lines = serving(models, url, is_open)
    if failed:
        lines.append("these do not serve:")
        lines += [f"  {model.name}: {model.message}" for model in failed]
        lines.append(MEND)
    return lines


def serving(models: dict[str, ModelStatus], url: str, is_open: bool) -> list[str]:
    """How many models serve at the address, and a line to try."""
    ready = [model for model in models.values() if model.is_open]
    lines = [f"{len(ready)} of {len(models)} models serve at {url}"]
    if ready:
        question = [{"role": "user", "content": "What is serve-app?"}]
        body = json.dumps({"model": ready[0].name, "messages": question, "temperature": 0})
        key = "" if is_open else " -H 'authorization: Bearer KEY'"
        lines.append(f"try: curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{body}'")
    return lines


def address() -> str:
    """Returns the address of this Serve instance's HTTP proxy."""
    options = http_options()
    host = "127.0.0.1" if options.host in (None, "", ANY_ADDRESS) else options.host
    return f"http://{host}:{options.port}{(options.root_path or '').rstrip('/')}"


def _line(model: ModelStatus, seconds: float) -> str:
    reason = f": {model.message}" if model.state != "ready" and model.message else ""
    return f"[{seconds:4.0f} s] {model.name} {STATES[model.state]}{reason}"


def _differs(before: ModelStatus | None, now: ModelStatus) -> bool:
    return before is None or before.state != now.state
