"""Decides which web pages may use a server that needs no key.

A page of any site can make its visitor's browser send a POST to http://127.0.0.1:8000, with a body of `text/plain` or
of a form, and the browser sends it without asking first. vLLM's own application even agrees when it is asked (CORS). So
types of bodies are no protection, and neither is `application/json`, which a page may send if its name was made to
resolve to 127.0.0.1. But a page cannot change `Origin`, which browsers send with every POST and which names the page's
own site. Programs that are not browsers, such as curl and the OpenAI SDKs, send none.

The router's own page, the console, has the address in its `Origin` by which it was asked for. That is accepted as an IP
address alone, because a name may be one that was made to resolve to this machine.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from serve_app.errors import ForeignPage


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def require_own_page(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raises ForeignPage if a web page of another machine makes the request. Header names are lower-case.

    A page in a sandbox sends "null". Schemes other than http and https belong to installed programs and not to pages.
    """
    headers = list(headers)
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    for name, value in headers:
        if name == b"origin" and not _is_own(value.decode("latin-1"), hosts):
            raise ForeignPage(
                f"The web page {value.decode('latin-1')[:200]} may not use this server, since it needs no API key and "
                "any page could use it. Set API keys (SERVE_APP_API_KEYS_FILE), and pages that send one may use it."
            )


def is_own_host(host: str) -> bool:
    """Returns whether a request's `Host` is localhost or an IP address, which no page of another site can have as its
    name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return is_loopback(name) or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _is_own(origin: str, hosts: Sequence[str]) -> bool:
    """Returns whether a page is of this machine, or of the IP address that the request itself went to (`hosts`)."""
    try:
        parts = urlsplit(origin)
        host = parts.hostname
    except ValueError:
        return False
    if parts.scheme in ("http", "https"):
        return host is not None and (is_loopback(host) or (hosts == [parts.netloc] and is_own_host(parts.netloc)))
    return bool(parts.scheme)
