"""Serves the page: static files of the package, under a policy that lets it load nothing from anywhere else.

The files are read once, so no path of a request is ever a path of the file system.
"""

import hashlib
import mimetypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

INDEX = "index.html"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
# What Python's table of types lacks on some systems, or has as text/plain.
TYPES: Mapping[str, str] = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}


@dataclass(frozen=True)
class Asset:
    """This is one file of the page, with its type and a tag that changes with its content."""

    content: bytes
    media_type: str
    etag: str


class Page:
    """Has the files of the page by their paths below `static/`."""

    def __init__(self, folder: Traversable | None = None):
        self.assets = {name: _asset(name, file) for name, file in _walk(folder or files(__package__) / "static")}

    def answer(self, request: Request, name: str) -> Response | None:
        """Returns a file, or 304 if the browser has it already, or None if there is no such file."""
        asset = self.assets.get(name)
        if asset is None:
            return None
        headers = {**HEADERS, "etag": asset.etag}
        if asset.etag in [
            tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")
        ]:
            return Response(status_code=304, headers=headers)
        return Response(asset.content, headers=headers, media_type=asset.media_type)


def _walk(folder: Traversable, below: str = "") -> Iterator[tuple[str, Traversable]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _walk(item, f"{below}{item.name}/")
        else:
            yield below + item.name, item


def _asset(name: str, file: Traversable) -> Asset:
    content = file.read_bytes()
    ending = "." + name.rpartition(".")[2]
    media_type = TYPES.get(ending) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Asset(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
