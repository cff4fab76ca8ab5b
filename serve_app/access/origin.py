"""Which web pages may drive a server that needs no key.

A page of any site can have its visitor's browser send a POST to http://127.0.0.1:8000, with a body of `text/plain` or
of a form, and the browser asks nobody first; vLLM's own application even says yes when it is asked (CORS). So types of
bodies are no protection, nor is `application/json`, which a page may send whose name was made to resolve to 127.0.0.1.
What a page cannot change is `Origin`, which browsers send along with every POST: it names the page's own site. Programs
that are no browsers, such as curl and the OpenAI SDKs, send none.
"""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from serve_app.errors import ForeignPage


def is_loopback(host: str) -> bool:
    """Says whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def require_own_page(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raises ForeignPage for a request that a web page of another machine makes. Header names are lower-case.

    "null" is what a page in a sandbox says. Schemes other than http and https are of installed programs, not of pages.
    """
    for name, value in headers:
        if name == b"origin" and not _is_own(value.decode("latin-1")):
            raise ForeignPage(
                f"The web page {value.decode('latin-1')[:200]} may not use this server, as it needs no API key and any "
                "page could. Set API keys (SERVE_APP_API_KEYS_FILE), and pages that send one may."
            )


def _is_own(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
        host = parts.hostname
    except ValueError:
        return False
    if parts.scheme in ("http", "https"):
        return host is not None and is_loopback(host)
    return bool(parts.scheme)
