"""Shows on the terminal of `serve run` how models come up: each change once, then the address and a command to try."""

import asyncio
import time
from collections.abc import Mapping

from serve_app.ray_serve import http_options, listening_host
from serve_app.router.directory import ModelDirectory
from serve_app.router.model_status import ModelStatus
from serve_app.router.status_lines import MEND, http_address, serving, state_line
from serve_app.terminal import notify, say

INTERVAL_S = 1.0
# While nothing changes, a sign of life is printed at this interval in seconds.
REMINDER_S = 30.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


async def announce(directory: ModelDirectory, is_open: bool) -> None:
    """Prints until every model is ready or has failed, and again after each later change.

    `is_open` means that no key is needed, which gives a warning if others can reach the address.
    """
    started = spoke = time.monotonic()
    seen: dict[str, ModelStatus] = {}
    since: dict[str, float] = {}
    if is_open and (host := listening_host()) not in LOOPBACK:
        notify(f"WARNING: No API keys are set, and Serve listens on {host}. Whoever reaches it may use every model.")
        notify("WARNING: Set SERVE_APP_API_KEYS_FILE (docs/keys_and_limits.md), or http_options.host: 127.0.0.1.")
    while True:
        try:
            models = dict(await directory.models())
        except Exception as error:  # The controller may be restarting, which the next round shows.
            say(f"Serve's status cannot be read: {error}")
            models = seen
        changed = [model for name, model in models.items() if _differs(seen.get(name), model)]
        for model in changed:
            say(f"[{time.monotonic() - started:4.0f} s] {state_line(model.name, model.state, model.message)}")
        is_news = any(model.name not in seen or not (model.is_open and seen[model.name].is_open) for model in changed)
        if is_news and all(model.is_open or model.state == "failed" for model in models.values()):
            for line in summary(models, http_address(http_options()), is_open):
                say(line)
        now = time.monotonic()
        since = {name: since.get(name, now) for name, model in models.items() if model.state == "loading"}
        if changed:
            spoke = now
        elif since and now - spoke > REMINDER_S:
            spoke = now
            say(still_loading(since, now))
        seen = models
        await asyncio.sleep(INTERVAL_S)


def summary(models: dict[str, ModelStatus], url: str, is_open: bool = True) -> list[str]:
    """Returns the lines for the moment when no model is loading any more."""
    failed = [model for model in models.values() if model.state == "failed"]
    lines = serving(models, url, is_open)
    if failed:
        lines.append("these models do not serve:")
        lines += [f"  {model.name}: {model.message}" for model in failed]
        lines.append(MEND)
    return lines


def still_loading(since: Mapping[str, float], now: float) -> str:
    """Returns for how long models have been loading. `since` and `now` are in seconds of one clock."""
    return f"still loading: {', '.join(f'{name} ({now - begun:.0f} s)' for name, begun in since.items())}"


def _differs(before: ModelStatus | None, now: ModelStatus) -> bool:
    return before is None or before.state != now.state
