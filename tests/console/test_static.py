"""The files of the console's page: they are small, name no other host, and make no markup of data."""

import hashlib
import json
import re
from pathlib import Path

import pytest

import serve_app.console

STATIC = Path(serve_app.console.__file__).parent / "static"
OWN = sorted(path for path in STATIC.iterdir() if path.suffix in (".js", ".css", ".html", ".svg"))
SCRIPTS = [path for path in OWN if path.suffix == ".js"]
MOST_BYTES = 150_000


def test_the_library_is_the_published_file() -> None:
    """Byte for byte, and its licences lie beside it."""
    vendor = STATIC / "vendor"
    (name, entry), *others = json.loads((vendor / "versions.json").read_text()).items()
    assert not others
    assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == entry["sha256"]
    assert {path.name for path in vendor.iterdir()} == {
        name, "versions.json", *(f"LICENSE.{each}.txt" for each in entry["licenses"])
    }  # fmt: skip
    script = (STATIC.parents[2] / "scripts/console_vendor.sh").read_text()
    assert f"htm={entry['version']}\n" in script


def test_the_page_is_small() -> None:
    """All that a browser loads, uncompressed."""
    loaded = [*OWN, *(STATIC / "vendor").glob("*.js")]
    assert sum(path.stat().st_size for path in loaded) <= MOST_BYTES


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_text_becomes_markup_or_code(path: Path) -> None:
    """Nothing here can make elements or programs of what the server sends."""
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser|setHTML"
    assert not re.findall(forbidden, path.read_text(), re.IGNORECASE)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_other_host_is_named(path: Path) -> None:
    """Except in the name of SVG, which no browser loads."""
    assert set(re.findall(r"https?://[^\"'` ]+", path.read_text())) <= {"http://www.w3.org/2000/svg"}


def test_the_document_has_no_code_or_style_of_its_own() -> None:
    """So that the policy needs no exception."""
    text = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
    assert re.findall(r"<script[^>]*>", text) == ['<script type="module" src="assets/app.js">']
    assert "</script>" in text


def test_only_the_colours_are_stored_in_the_browser() -> None:
    """The key is not: one file uses the storage, and that file does not have the key."""
    users = [
        path.name for path in SCRIPTS if re.search(r"localStorage|sessionStorage|indexedDB|cookie", path.read_text())
    ]
    assert users == ["app.js"]
    app = (STATIC / "app.js").read_text()
    assert re.findall(r"localStorage\.\w+\(([^)]*)\)", app) == ["THEME", "THEME, theme"]
    assert "sessionStorage" not in app
