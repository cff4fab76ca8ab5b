"""Decides who may see the console, and who may change something by it.

Where keys are set, a request needs one, which no page of another site can send. Where none are, the address is what
protects the console, and a web page of another site could use its visitor's browser in two ways. It could send a
request there itself, which `Origin` and `Sec-Fetch-Site` show. Or its own name could be made to resolve to this address
(DNS rebinding), so that it reads answers as if they were its own. Such a page sends no `Origin` with a GET, but `Host`
has its name. So without keys `Host` must be localhost or an IP address.

A proxy of another program on this machine has a third way: it sends requests of the whole network from 127.0.0.1, often
with that address as `Host`. It says so in a header, which Serve's own HAProxy and Python proxy do not add, and such a
request is refused without a key.
"""

from dataclasses import dataclass

from starlette.types import Scope

from serve_app.access.gate import Gate
from serve_app.access.keys import ApiKey
from serve_app.access.origin import is_own_host, require_own_page
from serve_app.config import RouterConfig
from serve_app.errors import AdminOnly, ConsoleOff, ForeignPage, Forwarded
from serve_app.wire.headers import Headers, header

# A browser says so of what the page itself asks for, and of what a person has typed in.
OWN_SITES = frozenset({b"same-origin", b"none"})
# A proxy says by one of these headers whom it forwards, or that it does.
FORWARDING = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via")


@dataclass(frozen=True)
class Visitor:
    """This is who asks. `key` is None where no key is needed."""

    key: ApiKey | None
    is_admin: bool


def is_on(config: RouterConfig, is_loopback: bool, is_open: bool) -> bool:
    """Returns whether the console answers. If the config does not say, it does unless its address is one that other
    machines reach without a key."""
    return (is_loopback or not is_open) if config.console is None else config.console


def require_on(config: RouterConfig, is_loopback: bool, is_open: bool) -> None:
    """Raises ConsoleOff if the console does not answer."""
    if is_on(config, is_loopback, is_open):
        return
    why, how = (
        ("because this address needs no API key and other machines reach it", ", or set API keys")
        if config.console is None
        else ("by 'console: false' of the router", " in its place")
    )
    raise ConsoleOff(
        f"The console is switched off, {why}. To switch it on, write console: true under 'args' or 'user_config' of "
        f"the router{how}."
    )


def visitor_of(gate: Gate, scope: Scope) -> Visitor:
    """Returns who asks for data. Raises Unauthorized, or Forwarded and ForeignPage where no key is needed."""
    key = gate.identity_of(scope)
    if key is None:
        require_no_proxy(scope["headers"])
        require_own_site(scope["headers"])
        return Visitor(None, is_admin=True)
    return Visitor(key, is_admin=key.is_admin)


def require_admin(visitor: Visitor) -> None:
    """Raises AdminOnly if the visitor may only look."""
    if not visitor.is_admin:
        name = "" if visitor.key is None else f" '{visitor.key.name}'"
        raise AdminOnly(
            f"The API key{name} may look at the console, but not change anything. Use a key with role: admin in the "
            "keys file."
        )


def require_no_proxy(headers: Headers) -> None:
    """Raises Forwarded if a proxy has forwarded the request, since its sender may be anybody."""
    if found := [name.decode() for name in FORWARDING if header(headers, name) is not None]:
        raise Forwarded(
            f"The console was asked through a proxy (it has sent '{found[0]}'), which other machines may reach, and "
            "this address needs no API key. Ask it directly, through an SSH tunnel for example, or set API keys "
            "(SERVE_APP_API_KEYS_FILE)."
        )


def require_own_site(headers: Headers) -> None:
    """Raises ForeignPage if a page of another site may have made the request."""
    require_own_page(headers)
    host = (header(headers, b"host") or b"").decode("latin-1")
    if not is_own_host(host):
        raise ForeignPage(
            f"The console was asked for by the name {host[:200]!r}, which could be that of another site's page. Use "
            "localhost or the IP address, or set API keys (SERVE_APP_API_KEYS_FILE)."
        )
    site = header(headers, b"sec-fetch-site")
    if site is not None and site not in OWN_SITES:
        raise ForeignPage(
            "A web page of another site may not use the console. Open it at its own address, or set API keys "
            "(SERVE_APP_API_KEYS_FILE)."
        )
