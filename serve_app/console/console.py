"""Puts the parts of the console together: what it answers to, what it does in the background, and who may ask."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from serve_app.console.actions import Actions
from serve_app.console.admin import JSON_HEADERS, AdminEndpoints, AsgiEndpoint
from serve_app.console.cluster_watch import ClusterWatch
from serve_app.console.feed import Feed, send_events, send_head
from serve_app.console.guard import Visitor, is_on, require_on, visitor_of
from serve_app.console.ledger import Ledger, Mark
from serve_app.console.moment import Moment, News, Told, deltas_for, event_bytes, state_of
from serve_app.console.openapi import DOCUMENTED
from serve_app.console.page import INDEX, Page
from serve_app.console.traffic import INTERVAL_S, INTERVALS, fixed, last_values, slot_of
from serve_app.console.view import View
from serve_app.console.what_if import WhatIf
from serve_app.router.console import RouterParts
from serve_app.router.exchange import Exchange
from serve_app.router.openapi import Added
from serve_app.wire.asgi import endpoint
from serve_app.wire.body import RequestBody
from serve_app.wire.openai_errors import route_error_response

logger = logging.getLogger("ray.serve")

# Open pages are told what is new at this interval in seconds. It is below 2, because `cluster_events` must see a
# replica that is being stopped, which it is for 2 seconds. Without pages, the requests are looked at less often.
TICK_S, IDLE_TICK_S = 1.5, float(INTERVAL_S)
# A tick waits so many seconds for a reading of the cluster.
READ_WAIT_S = 0.5
# Telling takes at most this share of a core, for which ticks have up to so many seconds between them.
MOST_SHARE, MOST_PAUSE_S = 0.02, 5.0
# The state that a program asks for is made again after so many seconds.
REUSED_S = 0.5
# What routers that were killed have left is looked for at the start and at this interval.
SWEEP_EVERY_S = 600.0
# With several routers, one without pages looks at this interval whether another one has any.
LOOK_S = 2.0
# Who asks for the state without a stream is believed to ask again within so many seconds.
POLLED_S = 10.0


def open_console(parts: RouterParts) -> "ServedConsole":
    """Returns the console of a router replica."""
    return ServedConsole(parts)


class ServedConsole:
    """Watches the requests of one router replica, and answers below /ui. `watched_by` are the ways in which a
    `ClusterWatch` reads and tells."""

    def __init__(
        self,
        parts: RouterParts,
        clock: Callable[[], float] = time.time,
        actions: Actions | None = None,
        what_if: WhatIf | None = None,
        **watched_by: Any,
    ):
        self.parts = parts
        self._clock = clock
        self.ledger = Ledger(parts, clock)
        self.watch = ClusterWatch(parts, self.ledger, clock, **watched_by)
        self._feed: Feed[View] = Feed()
        self._page = Page()
        made = actions or Actions(parts.directory, parts.forwarder, lambda name: parts.config().aliases.get(name, name))
        made.note = self.ledger.own
        self._admin = AdminEndpoints(self.visitor_of, parts.config, made, what_if or WhatIf())
        # What pages have of nodes and models, by their view. Deltas and first states are made one after the other.
        self._told: dict[View, Told] = {}
        self._making = asyncio.Lock()
        self._states: dict[View, tuple[float, bytes]] = {}
        self._pause_s = TICK_S
        self._reading: asyncio.Task[None] | None = None
        self._event_id = 0
        self._mark: Mark = (0, 0)
        self._slot, self._told_at = slot_of(clock()), clock()
        self._polled_at = float("-inf")
        self._is_asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def routes(self) -> Sequence[BaseRoute]:
        """Returns what it answers to."""
        own = [
            Route("/ui", self._redirect),
            Route("/ui/", self._index),
            Route("/ui/assets/{name:path}", self._asset),
            Route("/ui/api/state", self._state),
            Route("/ui/api/stream", AsgiEndpoint(self._stream), methods=["GET"]),
            *self._admin.routes(),
        ]
        # Without this, the router would take any other POST for a request to a model.
        return [*own, Route("/ui/{rest:path}", AsgiEndpoint(partial(self._nothing, own)))]

    def openapi(self) -> Added:
        """Returns what the OpenAPI document says of it, which is nothing while it is switched off."""
        is_shown = is_on(self.parts.config(), self.parts.is_loopback, self.parts.gate.source.is_open)
        return DOCUMENTED if is_shown else Added()

    async def start(self) -> None:
        """Begins its work in the background."""
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Ends its work and all open streams."""
        self._feed.close()
        for task in (self._task, self._reading):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        await self.watch.close()

    def began(self, exchange: Exchange) -> None:
        """Notes a request."""
        self._noted(self.ledger.began, exchange)

    async def admitted(self, exchange: Exchange, body: RequestBody) -> None:
        """Keeps the beginning of a request's prompt."""
        try:
            await self.ledger.admitted(exchange, body)
        except Exception:
            logger.exception("The console could not keep a prompt.")

    def retried(self, exchange: Exchange) -> None:
        """Notes that a request is sent again."""
        self._noted(self.ledger.retried, exchange)

    def resumed(self, exchange: Exchange) -> None:
        """Notes that another replica continues a stream."""
        self._noted(self.ledger.resumed, exchange)

    def ended(self, exchange: Exchange) -> None:
        """Notes that a request is over."""
        self._noted(self.ledger.ended, exchange)

    def refused(self, status: int) -> None:
        """Notes a request that the door refused."""
        self._noted(self.ledger.refused, status)

    def _noted(self, note: Callable[[Any], None], what: Any) -> None:
        """Notes something of a request, which a mistake of ours must not break."""
        try:
            note(what)
        except Exception:
            logger.exception("The console could not note a request.")

    def require_on(self) -> None:
        """Raises ConsoleOff if it is switched off."""
        require_on(self.parts.config(), self.parts.is_loopback, self.parts.gate.source.is_open)

    def visitor_of(self, scope: Scope) -> Visitor:
        """Returns who sends a request. Raises ConsoleOff, Unauthorized and ForeignPage."""
        self.require_on()
        return visitor_of(self.parts.gate, scope)

    def view_of(self, scope: Scope) -> View:
        """Returns what the sender of a request sees. Raises what `visitor_of` raises."""
        visitor = self.visitor_of(scope)
        return View(visitor.key, visitor.is_admin)

    async def _keep(self) -> None:
        """Does the work in the background for ever."""
        sweep_at = self._clock()
        while True:
            if self._clock() >= sweep_at:
                sweep_at = self._clock() + SWEEP_EVERY_S
                await self.watch.sweep()
            self._is_asked.clear()
            is_watched = self._is_watched()
            try:
                await (self.tick() if is_watched else self._idle_tick())
            except Exception:
                logger.exception("The console could not look at the cluster.")
            if is_watched or self.watch.is_watched_elsewhere:
                await asyncio.sleep(self._pause_s if is_watched else TICK_S)
                continue
            with suppress(TimeoutError):  # The first page does not wait for the slow tick.
                async with asyncio.timeout(LOOK_S if self.watch.has_other_routers else IDLE_TICK_S):
                    await self._is_asked.wait()

    def _is_watched(self) -> bool:
        return bool(len(self._feed)) or self._clock() - self._polled_at < POLLED_S

    async def _idle_tick(self) -> None:
        """Goes on counting, for the first page that is opened and for pages at other routers."""
        self._told.clear()
        self._slot, self._event_id, self._mark = slot_of(self._clock()), self.ledger.events.last_id, self.ledger.mark
        await self.watch.share()
        await self.ledger.tick()

    async def tick(self) -> None:
        """Reads the cluster, and tells the open pages what is new. A reading that takes long is told by a later tick,
        so that it holds up neither requests nor events."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self.watch.read())
        await asyncio.wait({self._reading}, timeout=READ_WAIT_S)
        await self.ledger.tick()
        if self.watch.is_stopping:
            self._feed.close()
            return
        self._close_strangers()
        await self._tell()

    def _close_strangers(self) -> None:
        """Ends the streams of keys that are gone or may use other models now, and all once the console is switched off.
        Their pages ask again, with the key."""
        source = self.parts.gate.source
        if not is_on(self.parts.config(), self.parts.is_loopback, source.is_open):
            for page in self._feed:
                page.end()
        if source.is_open or not len(self._feed):
            return
        known = {key.sha256: key for key in source.refresh().keys}
        for page in self._feed:
            if page.view.key is None or known.get(page.view.key.sha256) != page.view.key:
                page.end()

    async def _tell(self) -> None:
        """Pushes what is new since the last time, which is made once for all pages with the same view."""
        async with self._making:
            now = self._clock()
            slot = slot_of(now)
            rings = self.ledger.rings()
            slots = range(max(min(self._slot, slot), slot - INTERVALS + 1), slot + 1)
            late = [each for each in self.ledger.traffic.late(self._told_at) if slot - INTERVALS < each < slots[0]]
            self._told_at = now
            news = News(
                {each: last_values(rings, each, now) for each in [*late, *slots]},
                self.ledger.events.since(self._event_id),
                self.ledger.rows_since(self._mark),
                self.ledger.row_ids(),
            )
            event_id, mark = self.ledger.events.last_id, self.ledger.mark
            before = {page.view: self._told.get(page.view) for page in self._feed}
            made = await asyncio.to_thread(deltas_for, self._moment(now, False), news, before)
            self._event_id, self._mark, self._slot = event_id, mark, slot
            self._told = dict(made.told)
            self._pause_s = min(MOST_PAUSE_S, max(TICK_S, made.cpu_s / MOST_SHARE))
            for page in self._feed:
                if page.view in made.deltas:
                    page.push(made.deltas[page.view])

    def _moment(self, now: float, has_records: bool = True) -> Moment:
        """Returns what is known now, with or without requests, events and traffic. Other threads may read it, because
        nothing of it changes later."""
        ledger = self.ledger
        moment = Moment(
            now, self.parts.replica, self.parts.config().console_keeps_prompts, ledger.models, self.watch.now(),
            self.parts.residency.states(),
        )  # fmt: skip
        if not has_records:
            return moment
        rings = fixed(ledger.rings(), now)
        return replace(
            moment, rings=rings, first_slot=ledger.first_slot(), events=ledger.events.since(), rows=ledger.rows_since()
        )

    async def _state_event(self, view: View) -> bytes:
        """Returns the state as the first event of a stream. It has the nodes and models that other pages with this view
        have been told, and no event that they have not, so that the same deltas are right for all of them."""
        async with self._making:
            made = await asyncio.to_thread(
                state_of, self._moment(self._clock()), view, self._told.get(view), self._event_id
            )
            self._told[view] = made[1]
            return event_bytes("state", made[0])

    async def _polled(self, view: View) -> bytes:
        """Returns the state of this moment for a view, or one of `REUSED_S` ago, however many ask."""
        async with self._making:
            now = self._clock()
            self._states = {each: kept for each, kept in self._states.items() if now - kept[0] < REUSED_S}
            if view not in self._states:
                content, _ = await asyncio.to_thread(state_of, self._moment(now), view)
                self._states[view] = now, content
            return self._states[view][1]

    async def _redirect(self, _: Request) -> Response:
        self.require_on()
        return RedirectResponse("ui/", status_code=307)

    async def _index(self, request: Request) -> Response:
        return self._file(request, INDEX)

    async def _asset(self, request: Request) -> Response:
        return self._file(request, request.path_params["name"])

    def _file(self, request: Request, name: str) -> Response:
        self.require_on()
        answer = self._page.answer(request, name)
        if answer is None:
            text = f"{request.method} {request.url.path}: The page has no such file."
            return route_error_response(HTTPException(404), text)
        return answer

    async def _nothing(self, own: Sequence[Route], scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 404, or raises the error of a path that takes other methods."""
        self.require_on()
        takes = {method for route in own if route.matches(scope)[0] is Match.PARTIAL for method in route.methods or ()}
        if takes:
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": ", ".join(sorted(takes))})
        text = (
            f"{scope['method']} {endpoint(scope)}: The console has no such endpoint. /openapi.json names those it has."
        )
        await route_error_response(HTTPException(HTTPStatus.NOT_FOUND), text)(scope, receive, send)

    async def _state(self, request: Request) -> Response:
        view = self.view_of(request.scope)
        self._polled_at = self._clock()
        self._is_asked.set()
        await self.watch.fresh()
        return Response(await self._polled(view), headers=JSON_HEADERS, media_type="application/json")

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        view = self.view_of(scope)
        if scope["method"] == "HEAD":
            await send_head(send)
            return
        name = "" if view.key is None else view.key.name
        with self._feed.opened(view, name, view.is_admin) as page:
            self._is_asked.set()
            await send_events(page.events(self.watch.fresh, self._state_event), scope, receive, send)
