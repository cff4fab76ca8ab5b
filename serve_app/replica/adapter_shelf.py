"""Brings the adapters of one replica to what is wanted of it, while it runs.

Each adapter is on its own: it is read, checked, loaded, replaced and removed beside the others, and what is wrong with
one is told and stops nothing else. What is wanted comes from the config, from `user_config` and from a watched folder,
and may change at any time, also while an adapter is being loaded.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from serve_app.access.gate import require_asked
from serve_app.adapters.records import Adapters, AdapterState
from serve_app.config import ModelConfig
from serve_app.engines.adapter_copies import AdapterCopies, remove
from serve_app.engines.adapters import AdapterCheck, unpickled
from serve_app.engines.engine import Engine
from serve_app.errors import AdapterError, ModelNotFound, ModelUnavailable
from serve_app.facts.adapter import adapter_folder, commit_of, folder_here
from serve_app.replica.own_threads import OwnThreads
from serve_app.replica.watched_folder import Stamp, WatchedFolder, stamp_of
from serve_app.terminal import notify, say
from serve_app.wire.asked_model import Asked

logger = logging.getLogger("ray.serve")

# The watched folder is looked at every so many seconds.
LOOK_EVERY_S = 1.0
# An adapter that has failed is tried again after these seconds, because its folder may come later than its name.
RETRY_S = 30.0
# A replica that starts waits so many seconds for its adapters before it takes requests without them.
MOST_START_S = 300.0
# So many adapters are read from disk at one time, and so many are downloaded.
READ_AT_ONCE, DOWNLOAD_AT_ONCE = 2, 8
# The files of an adapter are looked at, found, downloaded and read within these seconds, or it counts as failed.
MOST_STAMP_S, MOST_FIND_S, MOST_DOWNLOAD_S, MOST_READ_S = 5.0, 30.0, 600.0, 300.0
# A record that could not be written is written again after these seconds, and every record after these.
TELL_AGAIN_S, TELL_EVERY_S = 1.0, 60.0
# A client is told to wait these seconds for an adapter that is being loaded, or that has failed.
RETRY_LOADING_S, RETRY_FAILED_S = 5.0, 60.0


@dataclass(frozen=True)
class Wanted:
    """This is what an adapter should be: where it comes from, and the state of its files then."""

    source: str
    pickled: bool
    stamp: Stamp


# This stands for a version that the engine has and that is not wanted any more.
OLDER = Wanted("", pickled=False, stamp=())


@dataclass
class Entry:
    """This is what there is of an adapter. `loaded` is what the engine has, and `failed` what it could not be given.
    `converted` holds the files of one that was pickled, and `told` is the failure that was told last. `leaving` are
    the removals that wait for requests, and `again` is set when the adapter is wanted."""

    state: AdapterState
    told: str = ""
    loaded: Wanted | None = None
    failed: Wanted | None = None
    converted: Path | None = None
    leaving: set[asyncio.Task[None]] = field(default_factory=set, repr=False)
    again: asyncio.Event = field(default_factory=asyncio.Event, repr=False)


class AdapterShelf:
    """Has the adapters of one replica.

    `tell` writes what the replica has where others read it, and may block. `tell_found` does so with those adapters
    that come from the watched folder, once that could be read. `taken` returns names that others have, with their
    places, and may block. It is told whether a config names the adapter, which a watched folder brings otherwise. All
    three may raise while Ray's head does not answer.
    """

    def __init__(
        self,
        name: str,
        check: AdapterCheck,
        engine: Engine,
        tell: Callable[[Adapters], None] = lambda _: None,
        taken: Callable[[bool], Mapping[str, str]] = lambda _: {},
        tell_found: Callable[[Adapters], None] = lambda _: None,
    ):
        self._name, self._check, self._engine, self._tell, self._taken = name, check, engine, tell, taken
        self._tell_found = tell_found
        self._entries: dict[str, Entry] = {}
        self._named: dict[str, Wanted] = {}
        self._in_folder: dict[str, Wanted] = {}
        self._was_folder_read = False
        self._asked = self._in_force = 0
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._reading, self._downloading = asyncio.Semaphore(READ_AT_ONCE), asyncio.Semaphore(DOWNLOAD_AT_ONCE)
        self._threads = OwnThreads()
        self._copies = AdapterCopies()
        self._changed = asyncio.Event()
        self._pickled = check.config.allow_pickled_adapters
        folder = check.config.adapters_folder
        self._folder = None if folder is None else WatchedFolder(Path(folder).expanduser(), self._notify)
        engine.watch_adapters(self._lost)

    async def start(self, config: ModelConfig) -> None:
        """Loads the adapters that the config and the folder name, and returns when each is loaded or has failed. From
        then on it follows the folder."""
        if self._folder is not None:
            await self._look(self._folder, at_once=True)
            self._go_on(self._follow(self._folder))
            self._changed.set()  # That the folder has none is to be told too.
        self._go_on(self._keep_telling())
        self._go_on(self._try_again())
        await self.want(config)
        await self.settled()

    async def want(self, config: ModelConfig) -> None:
        """Takes the adapters of the config for what is wanted, in place of those before. It returns at once, and they
        come and go meanwhile. A config that was asked for before one that is in force already changes nothing, however
        long its folders took to be looked at."""
        self._asked += 1
        number = self._asked
        named = await self._named_by(config)
        if number < self._in_force:
            return
        self._in_force, self._pickled, self._named = number, config.allow_pickled_adapters, named
        self._work()

    async def settled(self) -> None:
        """Waits until what is wanted now is loaded or has failed, but for a bounded time."""
        if workers := list(self._workers.values()):
            await asyncio.wait(workers, timeout=MOST_START_S)

    async def stop(self) -> None:
        """Ends its work. The engine is left as it is."""
        leaving = [task for entry in self._entries.values() for task in entry.leaving]
        tasks = [*self._workers.values(), *self._background, *leaving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._copies.close)

    def names(self) -> Collection[str]:
        """Returns the adapters that it has or should have."""
        return self._entries.keys()

    def states(self) -> Adapters:
        """Returns the state of each adapter."""
        return {name: entry.state for name, entry in self._entries.items()}

    def require(self, name: str | None) -> Asked:
        """Returns what a name means here. Raises ModelNotFound, and ModelUnavailable for an adapter that is not loaded
        yet or could not be."""
        asked = require_asked(self._name, self._entries, name)
        if asked.adapter is None:
            return asked
        entry = self._entries.get(asked.adapter)
        if entry is None:  # It has gone meanwhile, because large bodies are read on a thread.
            raise ModelNotFound(f"The model '{asked.name}' has been removed.", param="model")
        state = entry.state
        if state.state == "leaving":
            raise ModelNotFound(f"The model '{asked.name}' is being removed.", param="model")
        if state.state == "loading":
            text = f"The model '{asked.name}' is being loaded."
            raise ModelUnavailable(text, param="model", retry_after_s=RETRY_LOADING_S)
        if state.state == "failed":
            text = f"The model '{asked.name}' has failed: {state.message}"
            raise ModelUnavailable(text, param="model", retry_after_s=RETRY_FAILED_S)
        return asked

    @property
    def _wanted(self) -> Mapping[str, Wanted]:
        return {**self._in_folder, **self._named}

    def _work(self) -> None:
        """Starts a worker for each adapter that is not as it is wanted and has none."""
        wanted = self._wanted
        for name in {*wanted, *self._entries}:
            entry, want = self._entries.get(name), wanted.get(name)
            if entry is not None and want is not None:
                entry.again.set()
            if entry is not None and want is not None and want in (entry.loaded, entry.failed):
                continue
            if name not in self._workers:
                if entry is None:
                    self._set(name, Entry(AdapterState("loading")))
                self._workers[name] = asyncio.create_task(self._bring(name))

    async def _bring(self, name: str) -> None:
        """Does to one adapter what is wanted of it, until that changes no more."""
        entry = self._entries[name]
        try:
            while (wanted := self._wanted.get(name)) is None or wanted not in (entry.loaded, entry.failed):
                if wanted is None:
                    await self._remove(name, entry)
                    if name not in self._wanted:
                        self._entries.pop(name, None)
                        self._changed.set()
                        return
                else:
                    await self._load(name, entry, wanted)
        finally:
            del self._workers[name]

    async def _load(self, name: str, entry: Entry, wanted: Wanted) -> None:
        before, converted = entry.converted, None
        if entry.loaded is None and entry.state.state != "failed":  # A failure is told until it is one no more.
            self._put(name, entry, AdapterState("loading"))
        try:
            folder, note, converted = await self._found_and_read(name, wanted)
            await self._engine.load_adapter(name, folder)
        except Exception as error:
            await asyncio.to_thread(remove, converted)
            if not isinstance(error, AdapterError):
                logger.exception("The adapter '%s' could not be loaded.", name)
            self._failed(name, entry, wanted, str(error) if isinstance(error, AdapterError) else repr(error))
            return
        await asyncio.to_thread(remove, before)
        entry.loaded, entry.failed, entry.told, entry.converted = wanted, None, "", converted
        self._put(name, entry, AdapterState("ready", note))
        say(f"the adapter '{name}' of '{self._name}' is ready" + (f": {note}" if note else ""))

    def _failed(self, name: str, entry: Entry, wanted: Wanted, reason: str) -> None:
        """Notes a failure. If there was an adapter of this name before, it stays."""
        entry.failed = wanted
        if entry.loaded is None:
            state = AdapterState("failed", reason)
        else:
            state = AdapterState("ready", f"its last version is served, because the new one has failed: {reason}")
        self._put(name, entry, state)
        if reason != entry.told:
            entry.told = reason
            self._notify(f"the adapter '{name}' of '{self._name}' cannot be served: {reason}")

    async def _remove(self, name: str, entry: Entry) -> None:
        """Has no request get an adapter any more. Returns when those that run have ended, or as soon as the adapter is
        wanted again, since a new version does not wait for them."""
        if entry.loaded is not None:
            entry.leaving.add(asyncio.create_task(self._unload(name)))
        if entry.leaving:
            self._put(name, entry, AdapterState("leaving"))
            entry.again.clear()
            await _either(asyncio.wait(entry.leaving), entry.again.wait())
            entry.leaving = {task for task in entry.leaving if not task.done()}
        converted, entry.loaded, entry.failed, entry.converted = entry.converted, None, None, None
        await asyncio.to_thread(remove, converted)

    async def _unload(self, name: str) -> None:
        try:
            await self._engine.unload_adapter(name)
        except Exception as error:  # It takes no requests any more, so only its memory is lost.
            logger.exception("The adapter '%s' could not be removed.", name)
            self._notify(f"the adapter '{name}' of '{self._name}' could not be removed whole: {error}")
        say(f"the adapter '{name}' of '{self._name}' is removed")

    async def _named_by(self, config: ModelConfig) -> dict[str, Wanted]:
        """Returns what the config wants. The files of local folders are looked at, so that a folder whose files have
        changed since is loaded again."""
        names, sources = config.adapters.keys(), config.adapters.values()
        stamps = await asyncio.gather(*map(self._stamp, names, sources))
        return {
            name: Wanted(source, name in config.allow_pickled_adapters, stamp)
            for name, source, stamp in zip(names, sources, stamps, strict=True)
        }

    async def _stamp(self, name: str, source: str) -> Stamp:
        """Returns the state of an adapter's files. A folder that does not answer counts as unchanged."""
        try:
            return await self._threads.call(("stamp", source), partial(_stamp_of, source), MOST_STAMP_S)
        except TimeoutError:
            self._notify(f"the folder {source} of the adapter '{name}' of '{self._name}' does not answer.")
            before = self._named.get(name)
            return before.stamp if before is not None and before.source == source else ()

    async def _found_and_read(self, name: str, wanted: Wanted) -> tuple[Path, str, Path | None]:
        """Returns the folder of an adapter that may be loaded, a note on it, and the folder again if it is made here.
        An adapter whose source is slow holds up no other one, except that downloads wait for each other. Raises
        AdapterError."""
        source, pickled, most_s = wanted.source, wanted.pickled, MOST_FIND_S
        async with self._reading:
            await asyncio.to_thread(self._check_name, name)
        try:
            folder = await self._threads.call(("find", source, pickled), partial(folder_here, source, pickled), most_s)
            if folder is None:
                most_s = MOST_DOWNLOAD_S
                async with self._downloading:
                    download = partial(adapter_folder, source, pickled)
                    folder = await self._threads.call(("download", source, pickled), download, most_s)
            most_s = MOST_READ_S
            async with self._reading:
                return await self._threads.call(("read", name, wanted), partial(self._read, folder, pickled), most_s)
        except TimeoutError:
            raise AdapterError(
                f"{source} could not be read within {most_s:g} seconds, because its file server or the hub is slow or "
                "away. It is tried again."
            ) from None

    def _check_name(self, name: str) -> None:
        """Raises AdapterError if others have the name."""
        own = Asked(self._name, name)
        if name == self._name:
            raise AdapterError(f"its name '{name}' is that of its model. Rename it.")
        others = self._taken(name in self._named)
        for spelling in (own.name, own.qualified):
            if spelling in others:
                raise AdapterError(f"the name '{spelling}' is also that of {others[spelling]}. Rename one of them.")

    def _read(self, folder: Path, pickled: bool) -> tuple[Path, str, Path | None]:
        adapter, note = self._check.checked(str(folder), pickled)
        if commit := commit_of(folder):  # Replicas may have found another one, if the config names none.
            note = f"its commit is {commit}" + (f"; {note}" if note else "")
        if not adapter.is_pickled:
            return adapter.folder, note, None
        made = self._copies.new()
        try:
            unpickled(adapter, made)
            adapter, _ = self._check.checked(str(made))
        except BaseException:
            remove(made)
            raise
        return adapter.folder, note, made

    def _put(self, name: str, entry: Entry, state: AdapterState) -> None:
        entry.state = state
        self._set(name, entry)

    def _set(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry
        self._changed.set()

    async def _keep_telling(self) -> None:
        """Writes what the replica has after each change, and now and then without one, in case it was lost."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(TELL_EVERY_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                states, found = self.states(), self._found()
                await asyncio.to_thread(self._tell, states)
                if found is not None:
                    await asyncio.to_thread(self._tell_found, found)
            except Exception as error:  # Ray's head may be restarting.
                logger.warning("What the replica has of adapters could not be told: %s", error)
                self._changed.set()
                await asyncio.sleep(TELL_AGAIN_S)

    def _found(self) -> Adapters | None:
        """Returns those of the watched folder that no config names, or None if there is no folder or it could not be
        read yet, so that nothing is known of it."""
        if not self._was_folder_read:
            return None
        states = self.states()
        names = self._in_folder.keys() - self._named.keys()
        return {name: states.get(name, AdapterState("loading")) for name in names}

    def _lost(self, name: str, reason: str, has_old: bool) -> None:
        """Notes that the engine could not load an adapter that it had taken while it was away, and tries it again at
        once, because its files may be others by now. `has_old` means that the engine serves the version before it."""
        entry = self._entries.get(name)
        if entry is None or entry.loaded is None or entry.state.state == "leaving":
            return
        lost, entry.loaded = entry.loaded, OLDER if has_old else None
        self._failed(name, entry, lost, reason)
        entry.failed = None
        self._work()

    async def _try_again(self) -> None:
        """Tries adapters that have failed again and again."""
        while True:
            await asyncio.sleep(RETRY_S)
            for entry in self._entries.values():
                if entry.failed is not None and entry.state.state in ("failed", "ready"):
                    entry.failed = None
            self._work()

    async def _follow(self, folder: WatchedFolder) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with suppress(Exception):  # What is wrong with the folder has been told.
                await self._look(folder)
                self._work()

    async def _look(self, folder: WatchedFolder, at_once: bool = False) -> None:
        found = await asyncio.to_thread(folder.look, at_once)
        self._in_folder = {
            name: Wanted(str(path), name in self._pickled, stamp) for name, (path, stamp) in found.items()
        }
        self._was_folder_read = folder.was_read

    def _notify(self, text: str) -> None:
        logger.warning("%s", text)
        notify(text)

    def _go_on(self, work: Awaitable[None]) -> None:
        self._background.add(asyncio.ensure_future(work))


def _stamp_of(source: str) -> Stamp:
    return stamp_of(Path(source).expanduser())


async def _either(*waits: Coroutine[Any, Any, object]) -> None:
    """Returns when one of these has ended, and ends the others."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
