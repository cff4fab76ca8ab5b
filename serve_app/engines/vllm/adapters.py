"""Loads and removes LoRA adapters of a vLLM that runs, while requests use others and these ones.

Each version of an adapter is a copy of its files that nobody changes. vLLM reads the files again when it needs an
adapter that its host memory does not keep any more, and what it could not read then would end its engine. vLLM also
keys its prefix cache by an adapter's name and path, which are new for each version, so that no version reads what
another one has computed.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.engines.adapter_copies import AdapterCopies, remove
from serve_app.engines.lost_adapter import LostAdapter
from serve_app.engines.vllm import vllm_internals
from serve_app.errors import AdapterError, InvalidRequest
from serve_app.facts.adapter import WEIGHTS
from serve_app.wire.arrival import known_body

logger = logging.getLogger("ray.serve")

# vLLM forgets the requests of clients that have left shortly after their connections have ended.
ENDED_POLL_S = 0.02
MOST_REASON = 500


@dataclass(frozen=True, eq=False)
class Version:
    """This is one version of an adapter: the folder of its copy, and vLLM's own object for it."""

    folder: Path
    adapter: Any


class VllmAdapters:
    """Has the adapters of one engine, by the names by which requests ask for them. `close` removes the copies.

    While the engine is parked, its buffers are gone, so what comes and goes then does so when the engine wakes. `lost`
    is told of what vLLM does not take then.
    """

    def __init__(self, client: Any, models: Any, reason: Callable[[Exception], str] = str):
        self._client, self._models, self._reason = client, models, reason
        self._copies = AdapterCopies()
        self.lost: LostAdapter = _log_lost
        self._served: dict[str, Version] = {}
        self._running: dict[str, set[asyncio.Future[None]]] = {}
        # The engine is awake, and nothing changes in it, for whoever holds the lock and finds it awake.
        self._lock, self._is_awake = asyncio.Lock(), True
        self._coming: dict[str, Path] = {}
        self._going: list[Version] = []
        self._retiring: set[asyncio.Task[None]] = set()

    async def load(self, name: str, folder: Path) -> None:
        """Does what `Engine.load_adapter` says."""
        copy = await asyncio.to_thread(self._copied, folder)
        async with self._lock:
            if not self._is_awake:
                remove(self._coming.pop(name, None))
                self._coming[name] = copy
                return
            previous = await self._take(name, copy)
        if previous is not None:
            self._retire_later(name, previous)

    async def unload(self, name: str) -> None:
        """Does what `Engine.unload_adapter` says."""
        remove(self._coming.pop(name, None))
        version = self._served.pop(name, None)
        if version is None:
            return
        vllm_internals.publish_adapter(self._models, name, None)
        await self._retire(name, version)

    async def hold(self) -> None:
        """Lets nothing change in the engine from now on, because it parks."""
        async with self._lock:
            self._is_awake = False

    async def resume(self) -> None:
        """Does what came while the engine was parked. What vLLM does not take then is lost, and what it does not free
        is logged. It does not wait for the requests of versions that were replaced, because others wait for the
        engine."""
        lost: dict[str, str] = {}
        async with self._lock:
            self._is_awake = True
            for name, copy in list(self._coming.items()):
                del self._coming[name]
                try:
                    previous = await self._take(name, copy)
                except AdapterError as error:
                    lost[name] = str(error)
                else:
                    if previous is not None:
                        self._retire_later(name, previous)
            going, self._going = self._going, []
            for version in going:
                with _logged():
                    await self._free(version)
        for name, reason in lost.items():
            self.lost(name, reason, name in self._served)

    def counted(self, app: ASGIApp) -> ASGIApp:
        """Returns the application, whose requests are counted by the adapter for which they ask."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            name = _asked(scope)
            if name is None or name not in self._served:
                await app(scope, receive, send)
                return
            running = self._running.setdefault(name, set())
            ended = asyncio.get_running_loop().create_future()
            running.add(ended)
            try:
                await app(scope, receive, send)
            finally:
                ended.set_result(None)
                running.discard(ended)
                if not running and self._running.get(name) is running:
                    del self._running[name]

        return wrapped

    def close(self) -> None:
        """Removes all copies, when the engine has ended."""
        for task in self._retiring:
            task.cancel()
        self._copies.close()

    async def _take(self, name: str, copy: Path) -> Version | None:
        """Loads a copy, has new requests use it, and returns the version that it replaces. Raises AdapterError if vLLM
        does not take it; then the old one stays."""
        try:
            adapter = await vllm_internals.add_adapter(self._client, self._models, name, copy)
        except Exception as error:
            remove(copy)
            words = str(error) if isinstance(error, ValueError) else self._reason(error)
            reason = words.replace(str(copy), name)
            raise AdapterError(f"vLLM does not take it: {reason[:MOST_REASON]}") from error
        previous = self._served.get(name)
        self._served[name] = Version(copy, adapter)
        vllm_internals.publish_adapter(self._models, name, adapter)
        return previous

    def _retire_later(self, name: str, version: Version) -> None:
        async def retire() -> None:
            with _logged():
                await self._retire(name, version)

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(self, name: str, version: Version) -> None:
        """Frees a version that no new request gets, once the requests that run with it have ended."""
        # A request is counted before vLLM looks its adapter up, so this waits for newer ones too.
        if running := set(self._running.get(name, ())):
            await asyncio.wait(running)
        # vLLM has no event for this.
        while vllm_internals.is_adapter_used(self._client, version.adapter):  # noqa: ASYNC110
            await asyncio.sleep(ENDED_POLL_S)
        async with self._lock:
            if self._is_awake:
                await self._free(version)
            else:
                self._going.append(version)

    async def _free(self, version: Version) -> None:
        try:
            await vllm_internals.remove_adapter(self._client, version.adapter)
        except Exception as error:
            raise AdapterError(f"vLLM does not let go of it: {self._reason(error)[:MOST_REASON]}") from error
        await asyncio.to_thread(remove, version.folder)

    def _copied(self, folder: Path) -> Path:
        """Returns a folder of its own with copies of the adapter's two files. Raises AdapterError if they cannot be
        copied."""
        copy = self._copies.copied(folder)
        try:
            _require_finite(copy / WEIGHTS, folder / WEIGHTS)
        except BaseException:
            remove(copy)
            raise
        return copy


def _log_lost(name: str, reason: str, _: bool) -> None:
    logger.warning("The adapter '%s' came while the model was parked: %s", name, reason)


@contextmanager
def _logged() -> Iterator[None]:
    """Logs an AdapterError of the block. No request is for that version any more, so only its memory is lost."""
    try:
        yield
    except AdapterError as error:
        logger.warning("An old version of an adapter stays in the engine: %s", error)


def _require_finite(file: Path, shown: Path) -> None:
    """Raises AdapterError unless all numbers of an adapter are finite. On the CPU, others would spoil all rows."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            wrong = next((name for name in names if not bool(tensors.get_tensor(name).isfinite().all())), None)
    except SafetensorError as error:
        raise AdapterError(f"{shown} cannot be read: {error}") from None
    if wrong is not None:
        raise AdapterError(f"{shown}: {wrong[:200]} has numbers that are not finite.")


def _asked(scope: Scope) -> str | None:
    """Returns the name for which a request asks, or None if it has none that vLLM would find."""
    body = known_body(scope) if scope["type"] == "http" else None
    if body is None:
        return None
    with suppress(InvalidRequest, ValueError, KeyError):
        return msgspec.json.decode(body.fields["model"], type=str)
    return None
