"""Reads Serve's status again and again during `serve-app run`, and shows what is new on the terminal."""

import http.client
import time
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve_app.access.cluster_record import ClusterRecord
from serve_app.cli.start.progress import (
    ApplicationState,
    awaited,
    changes,
    closing_lines,
    is_settled,
    memory_lines,
    of_ready,
    read_states,
    serves_nothing,
    still_expected,
    with_survivors,
)
from serve_app.cli.start.view import StartView
from serve_app.ray_serve import http_options, serve_details
from serve_app.replica.report import read_reports
from serve_app.router.status_lines import http_address

STATUS_TIMEOUT_S = 30.0
# When the models are ready, the address may take this many seconds to answer, and the replicas to report their memory.
ADDRESS_TIMEOUT_S = 15.0
REPORTS_TIMEOUT_S = 3.0
LOOK_AGAIN_S = 0.2
# These are raised while Ray's head or Serve's controller restarts, by whichever of their calls comes first.
UNREACHABLE = (RayError, RayServeException, RuntimeError, TimeoutError, ValueError)


class StartWatch:
    """Keeps what was seen so far. `expected` are the names of the file's applications; `others` are not models."""

    def __init__(self, expected: Collection[str], others: Collection[str], routers: Collection[str], view: StartView):
        self._expected, self._others, self._routers, self._view = expected, others, routers, view
        self._states: dict[str, ApplicationState] = {}
        # These applications of the file have been known to Serve at some time.
        self._seen: set[str] = set()
        self._told: set[tuple[str, str]] = set()
        self._silent = False
        # This says whether the closing lines are still to be printed, for the start or for a later change.
        self._is_due = True
        self.is_over = False
        # This says whether every application had failed for good when the start was over.
        self.serves_nothing = False

    def expect(self, expected: Collection[str], others: Collection[str], routers: Collection[str]) -> None:
        """Replaces the names of the file's applications, because it was deployed anew. What comes of it is shown."""
        self._expected, self._others, self._routers = expected, others, routers
        self._seen &= set(expected)
        self._is_due = True

    def look(self) -> None:
        """Shows what has changed and, once nothing is loading any more, what serves where.

        While Ray's head or Serve's controller does not answer, it says so once. The next look shows the rest.
        """
        try:
            self._tell_news()
        except UNREACHABLE as error:
            if not self._silent:
                self._view.event(f"Serve's controller does not answer: {' '.join(str(error).split())[:300]}")
            self._silent = True
        else:
            self._silent = False

    def _tell_news(self) -> None:
        applications = serve_details(STATUS_TIMEOUT_S)["applications"]
        states = with_survivors(applications, self._states, read_states(applications, self._others))
        news = changes(self._states, states)
        for line in news:
            self._view.event(line)
        self._states = states
        self._seen |= states.keys() & set(self._expected)
        expected = still_expected(self._expected, self._seen, states)
        self._is_due = self._is_due or bool(news)
        self._view.wait_for(awaited(states, expected))
        self._tell_memory()
        if self._is_due and is_settled(states, expected):
            self._close(expected)

    def _tell_memory(self) -> None:
        reports = of_ready(read_reports(), self._states)
        for line in memory_lines(reports, self._told):
            self._view.event(line)
        self._told |= {(report.application, report.replica) for report in reports}

    def _close(self, expected: Collection[str]) -> None:
        """Shows the result of a start or of a later change. A start after which nothing serves has no result to show,
        because each failure was shown when it happened."""
        if not self.is_over and serves_nothing(self._states, expected, self._routers):
            self.is_over = self.serves_nothing = True
            return
        ready = {name for name, item in self._states.items() if item.is_model and item.state == "ready"}
        _until(lambda: ready <= self._reporting(), REPORTS_TIMEOUT_S)
        self._tell_memory()
        url = http_address(http_options())
        has_router = any(self._states[name].state == "ready" for name in self._routers if name in self._states)
        if has_router and not _until(lambda: _answers(url), ADDRESS_TIMEOUT_S):
            self._view.event(f"WARNING: {url} does not answer yet")
        is_open = ClusterRecord().required_by() is None
        for line in closing_lines(self._states, url, self._routers, is_open):
            self._view.line(line)
        if not self.is_over:
            self._view.line("Ctrl-C stops everything")
        self.is_over, self._is_due = True, False

    def _reporting(self) -> set[str]:
        return {report.application for report in read_reports()}


def _until(is_so: Callable[[], bool], timeout_s: float) -> bool:
    """Returns whether the condition became true in time."""
    ends = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > ends:
            return False
        time.sleep(LOOK_AGAIN_S)
    return True


def _answers(url: str) -> bool:
    """Returns whether the router answers at the address. Its path /health needs no key."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=2.0)
    try:
        connection.request("GET", f"{parts.path}/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
