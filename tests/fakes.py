"""Small real implementations of the seams of router and access, one for each, for all their tests."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from serve_app.access.gate import Gate
from serve_app.access.keys import KeySource, sha256_of
from serve_app.access.limiter import ActorLimiter
from serve_app.access.limits import KeyLimits, Verdict, Windows
from serve_app.config import RouterConfig
from serve_app.errors import ModelNotFound, ModelUnavailable
from serve_app.residency.lease_records import PoolName
from serve_app.router.deployment import build_app
from serve_app.router.forwarder import Forwarder
from serve_app.router.metrics import RouterMetrics
from serve_app.router.model_status import ModelStatus
from serve_app.router.residency import Residency
from serve_app.router.upstream.protocol import ReplicaLost, Upstream
from serve_app.wire.asgi import HttpRequest

Reply = Callable[[HttpRequest], "tuple[int, list[bytes | float | Exception]]"]

KEY = [(b"authorization", b"Bearer sk-a")]
AUTH = {"authorization": "Bearer sk-a"}
OUTSIDE = {"x-api-key": "sk-outside"}


# A replica of the model "a" is parked, as keepers write it down.
POOLS = {
    PoolName("default", "n"): [
        {"terms": {"model": "a", "wake_s": 1.5, "start_s": 30.0, "wake_is_guess": False}, "state": "parked"}
    ]
}


class LocalLimiter:
    """A limiter of one process. Its time stands still, so only what is settled comes back."""

    def __init__(self) -> None:
        self.windows = Windows(lambda: 0.0)
        self.takes = 0
        self.is_warm = False
        self.settled: list[int | None] = []

    async def warm_up(self) -> None:
        """Remembers it."""
        self.is_warm = True

    async def take(self, key: str, limits: KeyLimits, estimated_tokens: int) -> Verdict:
        """Charges at once."""
        self.takes += 1
        return self.windows.take(key, limits, estimated_tokens, str(self.takes))

    def settle(self, key: str, lease: str, tokens_used: int | None) -> None:
        """Settles at once, and remembers it."""
        self.settled.append(tokens_used)
        self.windows.settle(key, lease, tokens_used)


def make_gate(folder: Path, limits: str = "") -> tuple[Gate, LocalLimiter]:
    """A gate with the key `sk-a` for the model `m` under these limits, and `sk-outside` for another model."""
    file = folder / "keys.yaml"
    file.write_text(
        f"keys:\n- {{name: a, sha256: {sha256_of('sk-a')}, models: [m]{limits and ', ' + limits}}}\n"
        f"- {{name: outside, sha256: {sha256_of('sk-outside')}, models: [other]}}\n"
    )
    limiter = LocalLimiter()
    return Gate(KeySource(file, {}), limiter), limiter


def open_gate() -> Gate:
    """Nobody needs a key, so the limiter is never asked."""
    return Gate(KeySource(None, {}), ActorLimiter())


class Said:
    """An answer of these pieces; a number is a pause in seconds, an exception is raised."""

    def __init__(self, status: int, pieces: list[Any]):
        self.status = status
        self.headers = [(b"content-type", b"text/event-stream" if len(pieces) > 1 else b"application/json")]
        self._pieces = pieces
        self.closed = False

    async def pieces(self) -> AsyncIterator[bytes]:
        """One after the other."""
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                yield piece

    def lost(self, message: str) -> ReplicaLost:
        """As of an answer over a handle."""
        return ReplicaLost(message)

    async def close(self) -> None:
        """Remembers it."""
        self.closed = True


class ModelsFake:
    """A directory of models: each of them has a state, and is ready where `states` does not say otherwise."""

    def __init__(self, **states: str):
        self.states = states
        self.woken: list[str] = []
        self.applications: dict[str, Any] = {}

    def state_of(self, name: str) -> str:
        """Its state. Raises KeyError for an unknown model."""
        return self.states[name]

    async def keep_fresh(self) -> None:
        """Nothing changes by itself."""

    async def models(self) -> dict[str, ModelStatus]:
        """All of them."""
        return {name: await self.find(name) for name in self.states}

    async def find(self, name: str) -> ModelStatus:
        """As in the real directory."""
        try:
            return ModelStatus(name, self.state_of(name), 1)  # type: ignore[arg-type]
        except KeyError:
            raise ModelNotFound(f"no {name}", param="model") from None

    async def look_up(self, name: str) -> ModelStatus | None:
        """As in the real directory."""
        try:
            return await self.find(name)
        except ModelNotFound:
            return None

    @property
    def records(self) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """No model has adapters."""
        return {}, {}

    async def refresh(self, max_age_s: float) -> None:
        """Nothing changes by itself."""

    def application(self, name: str) -> str:
        """Its own, as of a model that is no adapter."""
        return name

    def require_hope(self, model: ModelStatus) -> None:
        """As in the real directory."""
        if model.state == "failed":
            raise self.unavailable(model)

    def unavailable(self, model: ModelStatus) -> ModelUnavailable:
        """As in the real directory."""
        return ModelUnavailable(f"{model.name} is {model.state}", retry_after_s=7.0)

    def seen_from_outside(self, model: ModelStatus) -> ModelStatus:
        """As it is."""
        return model

    def load_time_s(self, name: str) -> float:
        """As in the real directory."""
        return 7.0

    def time_left_s(self, name: str) -> float | None:
        """As of a load that takes longer than the last one."""
        return None

    def waking(self, name: str) -> None:
        """As in the real directory."""

    def woke(self, name: str) -> None:
        """As in the real directory."""
        self.woken.append(name)


class Models(ModelsFake):
    """Upstream and directory in one: a reply for each model, or its state where it is not ready."""

    def __init__(self, **replies: Reply | str):
        super().__init__(**dict.fromkeys(replies, ""))
        self.replies = replies
        self.asked: list[str] = []
        self.calls = 0
        self.wakes_after_s = 0.2

    def state_of(self, name: str) -> str:
        """What is not a reply is a state."""
        reply = self.replies[name]
        return reply if isinstance(reply, str) else "ready"

    async def start(self) -> None:
        """As in the real upstream."""

    async def close(self) -> None:
        """As in the real upstream."""

    async def send(self, name: str, request: HttpRequest) -> Said:
        """As in the real upstream. A call for the health of a model that sleeps wakes it after a moment."""
        if request.method == "GET":
            self.calls += 1
            await asyncio.sleep(self.wakes_after_s)
            self.replies[name] = says(b"data: 1\n\n", b"data: [DONE]\n\n")
            return Said(200, [b"ok"])
        self.asked.append(json.loads(request.body).get("model"))
        reply = self.replies[name]
        assert callable(reply)
        return Said(*reply(request))


def says(*pieces: Any, status: int = 200) -> Reply:
    """Always the same."""
    return lambda _: (status, list(pieces))


def router_app(
    directory: ModelsFake, upstream: Upstream, gate: Gate | None = None, **config: Any
) -> tuple[Forwarder, Any]:
    """The router's forwarder before these models, and its application, without the gate in front of it."""
    gate = gate or open_gate()
    residency = Residency(lambda: POOLS)
    residency._replicas = {"a": POOLS[PoolName("default", "n")]}  # As if they had been read.
    forwarder = Forwarder(RouterConfig(**config), directory, upstream, RouterMetrics(), gate, residency)
    return forwarder, build_app(forwarder, directory, gate, residency)  # type: ignore[arg-type]


def forwarder_of(models: Models, **config: Any) -> tuple[Forwarder, httpx.AsyncClient]:
    """A router before them, and a client."""
    forwarder, app = router_app(models, models, **config)
    return forwarder, httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router")
