"""Says which config file `serve-app run` serves, and passes it the wish to read that file again.

The process of `serve-app run` lives for as long as it serves the file, on the node that has it and in the environment
that its user has chosen. So it reads the file itself, and both sides leave each other notes in Ray's key-value store.
Notes of a process that was killed are removed by the next one.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Protocol

from serve_app import ray_serve

PREFIX = "serve-app-file/"
RECORD = f"{PREFIX}served".encode()
# So many wishes may wait, of which one is answered for all.
MOST_WISHES = 16
# A larger file is not kept as a text.
MOST_TEXT_BYTES = 256 * 2**10


@dataclass(frozen=True)
class ServedFile:
    """This is a file that is being served: its absolute path, the address of the node that has it, and the process that
    serves it. `token` is another one for each run. `command` is what the user has called."""

    token: str
    file: str
    node: str
    pid: int
    command: str = "serve-app run"


@dataclass(frozen=True)
class Outcome:
    """Says what became of a wish. `problem` has a line for each mistake in the file, which has changed nothing then.
    `is_conflict` says that the file is right, and that what Serve runs is the problem. `lines` say what happens to each
    application otherwise."""

    problem: str = ""
    lines: tuple[str, ...] = ()
    is_conflict: bool = False


class Store(Protocol):
    """Is where the notes are. Its methods raise RayError or RuntimeError while it does not answer."""

    def write(self, key: bytes, value: bytes) -> None:
        """Writes a note."""
        ...

    def read(self, key: bytes) -> bytes | None:
        """Returns a note, or None if there is none."""
        ...

    def keys(self, prefix: bytes) -> Sequence[bytes]:
        """Returns the keys that begin so."""
        ...

    def delete(self, key: bytes) -> None:
        """Removes a note."""
        ...


class RayStore:
    """Keeps notes in Ray's key-value store. Each call blocks for about a millisecond."""

    def write(self, key: bytes, value: bytes) -> None:
        """Does what `Store` says."""
        ray_serve.store(key, value)

    def read(self, key: bytes) -> bytes | None:
        """Does what `Store` says."""
        return ray_serve.stored(key)

    def keys(self, prefix: bytes) -> Sequence[bytes]:
        """Does what `Store` says."""
        return ray_serve.stored_keys(prefix)

    def delete(self, key: bytes) -> None:
        """Does what `Store` says."""
        ray_serve.delete_stored(key)


class ServedFiles:
    """Has the notes of both sides."""

    def __init__(self, store: Store | None = None):
        self._store = store or RayStore()

    def announce(self, served: ServedFile) -> None:
        """Says that this file is served from now on, and removes what earlier runs have left."""
        self._clear()
        self._store.write(RECORD, json.dumps(asdict(served)).encode())

    def keep_text(self, token: str, text: str) -> None:
        """Keeps the text of the file that the run of this token has deployed, or none if it is too large."""
        content, key = text.encode(), _key("text", token)
        if content and len(content) <= MOST_TEXT_BYTES:
            self._store.write(key, content)
        else:
            self._store.delete(key)

    def text(self) -> tuple[str, str] | None:
        """Returns the name of the file that is served, without its folder, and its text as it was deployed. Returns
        None if the cluster was deployed in another way or if the file is too large."""
        served = self.served()
        content = self._store.read(_key("text", served.token)) if served is not None else None
        return (PurePath(served.file).name, content.decode(errors="replace")) if served and content else None

    def forget(self, token: str) -> None:
        """Says that the run of this token serves its file no more. That of another run stays."""
        served = self.served()
        if served is not None and served.token == token:
            self._clear()

    def served(self) -> ServedFile | None:
        """Returns the file that is served, or None if the cluster was deployed in another way."""
        item = _decoded(self._store.read(RECORD))
        try:
            return None if item is None else ServedFile(**item)
        except TypeError:  # Another version has written it.
            return None

    def ask(self, token: str, by: str) -> str | None:
        """Asks the run of this token to read its file again, for who is called so. Returns the name of the wish, or
        None if too many wait."""
        if len(self._store.keys(_key("wish", token))) >= MOST_WISHES:
            return None
        wish = secrets.token_hex(8)
        self._store.write(_key("wish", token, wish), json.dumps({"by": by}).encode())
        return wish

    def waits(self, token: str, wish: str) -> bool:
        """Returns whether a wish has not been heard yet."""
        return self._store.read(_key("wish", token, wish)) is not None

    def wishes(self, token: str) -> dict[str, str]:
        """Returns who wants the file to be read again, by the name of the wish, once."""
        found = {}
        for key in self._store.keys(_key("wish", token)):
            item = _decoded(self._store.read(key))
            self._store.delete(key)
            found[key.decode().rpartition("/")[2]] = str((item or {}).get("by", ""))
        return found

    def tell(self, token: str, wish: str, outcome: Outcome) -> None:
        """Says what became of a wish."""
        self._store.write(_key("outcome", token, wish), json.dumps(asdict(outcome)).encode())

    def outcome(self, token: str, wish: str) -> Outcome | None:
        """Returns what became of a wish, once, or None if that is still open."""
        key = _key("outcome", token, wish)
        item = _decoded(self._store.read(key))
        if item is None:
            return None
        self._store.delete(key)
        lines = tuple(map(str, item.get("lines", ())))
        return Outcome(str(item.get("problem", "")), lines, item.get("is_conflict") is True)

    def withdraw(self, token: str, wish: str) -> None:
        """Takes a wish back, and removes what became of it."""
        for kind in ("wish", "outcome"):
            self._store.delete(_key(kind, token, wish))

    def _clear(self) -> None:
        for key in self._store.keys(PREFIX.encode()):
            self._store.delete(key)


def _key(*parts: str) -> bytes:
    return (PREFIX + "/".join(parts)).encode() + (b"/" if len(parts) == 2 else b"")


def _decoded(text: bytes | None) -> dict[str, Any] | None:
    """Returns what a note has, or None if there is none of this project."""
    try:
        item = json.loads(text or b"null")
    except ValueError:
        return None
    return item if isinstance(item, dict) else None
