"""What an admin may do, and what is said of what cannot be done."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from serve_app.access.keys import ApiKey
from serve_app.console.actions import Actions, possible
from serve_app.console.events import EventLog
from serve_app.console.guard import Visitor
from serve_app.console.reload import Reloaded
from serve_app.errors import AdminOnly, Conflict, DeadlineExceeded, InvalidRequest, ModelNotFound, RequestError
from serve_app.residency.operator import KeeperSilent
from serve_app.router.model_status import ModelStatus
from tests.fakes import ModelsFake

HASH = "0" * 64
ANYBODY = Visitor(None, is_admin=True)
USER = Visitor(ApiKey(name="team", sha256=HASH), is_admin=False)
ADMIN = Visitor(ApiKey(name="ops", sha256=HASH, role="admin"), is_admin=True)
ADMIN_OF_M = Visitor(ApiKey(name="m-ops", sha256=HASH, role="admin", models=("m",)), is_admin=True)


class Cluster:
    """Models with their states, and those of a pool with the states of their replicas. `done` has what was asked."""

    def __init__(self, pooled: dict[str, list[str]] | None = None, **states: str):
        self.pooled, self.done = pooled or {}, list[str]()
        self.silent: Exception | None = None
        self.events = EventLog()
        aliases = {"alias": "m"}
        self.models = ModelsFake(**states)
        self.before_reload: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)
        self.actions = Actions(self.models, self, lambda name: aliases.get(name, name), Wishes(self), self.reload)
        self.actions.note = partial(self.events.add, 0.0)

    def wake(self, name: str) -> None:
        """As the router's forwarder."""
        self.done.append(f"start {name}")

    async def reload(self, by: str) -> Reloaded:
        """As `Reload`."""
        await self.before_reload()
        self.done.append(f"reload for {by}")
        return Reloaded("models.yaml", "10.0.0.1", ("a restarts", "b starts"))

    def told(self) -> list[tuple[str, str, str]]:
        """The events."""
        return [(event.kind, event.model, event.text) for event in self.events.since()]


class Wishes:
    """Keepers of pools."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster

    async def wake(self, model: str) -> Any:
        """As `Operator`."""
        return await self._asked("wake", model) and self.cluster.pooled[model][0]

    async def park(self, model: str) -> Any:
        """As `Operator`."""
        return await self._asked("park", model) and self.cluster.pooled[model]

    async def _asked(self, wish: str, model: str) -> bool | None:
        if self.cluster.silent is not None:
            raise self.cluster.silent
        if model not in self.cluster.pooled:
            return None
        self.cluster.done.append(f"{wish} {model}")
        return True


async def test_a_model_at_zero_replicas_is_started() -> None:
    """In the background, with an event and a line of the log that names the key."""
    cluster = Cluster(m="asleep")
    done = await cluster.actions.wake(ADMIN, "alias")
    assert (done.status, done.model, cluster.done) == (202, "m", ["start m"])
    assert cluster.told() == [("scaled", "m", "'m' starts, because an admin has woken it.")]


async def test_an_action_is_logged_with_the_key(caplog: pytest.LogCaptureFixture) -> None:
    """Where no key is needed, it was a visitor."""
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        await Cluster(m="asleep").actions.wake(ADMIN, "m")
        await Cluster(m="asleep").actions.wake(ANYBODY, "m")
    assert [record.getMessage() for record in caplog.records] == [
        "The console, for the key 'ops': 'm' starts, because an admin has woken it.",
        "The console, for a visitor of the console: 'm' starts, because an admin has woken it.",
    ]


@pytest.mark.parametrize(
    ("state", "replicas", "status", "message"),
    [
        ("ready", ["parked"], 202, "'m' becomes resident, because an admin has woken it."),
        ("ready", ["stopped"], 202, "'m' becomes resident, because an admin has woken it."),
        ("ready", ["resident"], 200, "'m' is ready already."),
        ("ready", None, 200, "'m' is ready already."),
        ("loading", None, 200, "'m' is loading already."),
    ],
)
async def test_waking_what_is_there(state: str, replicas: list[str] | None, status: int, message: str) -> None:
    """A member of a pool gets its memory, and nothing happens to what has it."""
    cluster = Cluster({} if replicas is None else {"m": replicas}, m=state)
    done = await cluster.actions.wake(ADMIN, "m")
    assert (done.status, done.message) == (status, message)
    assert len(cluster.told()) == (1 if status == 202 else 0)


@pytest.mark.parametrize(
    ("state", "replicas", "status", "message"),
    [
        ("ready", ["resident", "parked"], 202, "gives back its memory once its requests have ended"),
        ("ready", ["waking"], 202, "gives back its memory once its requests have ended"),
        ("ready", ["parked", "draining"], 200, "has given back its memory already, or is about to"),
        ("asleep", None, 200, "has no replica, so it holds no memory"),
    ],
)
async def test_parking(state: str, replicas: list[str] | None, status: int, message: str) -> None:
    """All replicas of a model of a pool leave, also if it is busy now."""
    cluster = Cluster({} if replicas is None else {"m": replicas}, m=state)
    done = await cluster.actions.park(ADMIN, "m")
    assert (done.status, message in done.message) == (status, True)
    assert [kind for kind, _, _ in cluster.told()] == (["swapped"] if status == 202 else [])


@pytest.mark.parametrize(
    ("action", "state", "told"),
    [
        ("wake", "failed", "The model 'm' cannot be woken, because it has failed: "),
        ("wake", "stopping", "The model 'm' cannot be woken, because it is being removed"),
        ("park", "ready", "shares its memory with no other one, so it cannot be parked. To let models give back"),
    ],
)
async def test_what_cannot_be_done_is_a_conflict(action: str, state: str, told: str) -> None:
    """With the reason and what to do, and without an event."""
    cluster = Cluster(m=state)
    with pytest.raises(Conflict) as caught:
        await getattr(cluster.actions, action)(ADMIN, "m")
    assert told in caught.value.message
    assert (caught.value.status, caught.value.code, cluster.told()) == (409, "conflict", [])


@pytest.mark.parametrize("action", ["wake", "park"])
async def test_a_keeper_that_is_away_is_told(action: str) -> None:
    """Nothing has happened."""
    cluster = Cluster({"m": ["resident"]}, m="ready")
    cluster.silent = KeeperSilent("The keeper of the pool 'default' does not answer: gone")
    with pytest.raises(Conflict, match="does not answer: gone"):
        await getattr(cluster.actions, action)(ADMIN, "m")
    assert cluster.told() == []


@pytest.mark.parametrize(
    ("visitor", "action", "name", "error"),
    [
        (USER, "wake", "m", AdminOnly),
        (USER, "park", "m", AdminOnly),
        (USER, "wake", "unknown", AdminOnly),  # What exists is not told before.
        (ADMIN_OF_M, "wake", "other", ModelNotFound),
        (ADMIN_OF_M, "park", "other", ModelNotFound),
        (ADMIN, "wake", "unknown", ModelNotFound),
    ],
)
async def test_who_may_not_act(visitor: Visitor, action: str, name: str, error: type[RequestError]) -> None:
    """A key is told nothing of models that are not its own, not even that they exist."""
    cluster = Cluster({"m": ["parked"], "other": ["resident"]}, m="ready", other="asleep")
    with pytest.raises(error) as caught:
        await getattr(cluster.actions, action)(visitor, name)
    assert (cluster.done, cluster.told()) == ([], [])
    assert "m," not in caught.value.message
    if name == "other":
        with pytest.raises(error) as unknown:
            await getattr(cluster.actions, action)(visitor, "unknown")
        assert caught.value.message.replace("other", "unknown") == unknown.value.message


async def test_an_admin_of_some_models_may_act_on_these_alone() -> None:
    """The config file is of all models."""
    cluster = Cluster({"m": ["parked"]}, m="ready")
    assert (await cluster.actions.wake(ADMIN_OF_M, "m")).has_begun
    with pytest.raises(AdminOnly, match="Use a key with role: admin and without models"):
        await cluster.actions.reload(ADMIN_OF_M)
    with pytest.raises(AdminOnly):
        await cluster.actions.reload(USER)
    assert cluster.done == ["wake m"]


async def test_the_config_file_is_read_again() -> None:
    """The event names no model, because those who may not see all of them read it too."""
    cluster = Cluster()
    assert await cluster.actions.reload(ADMIN) == {
        "file": "models.yaml",
        "node": "10.0.0.1",
        "changes": ["a restarts", "b starts"],
    }
    assert cluster.done == ["reload for the key 'ops'"]
    assert cluster.told() == [
        ("config", "", "An admin has asked for the config file to be read again."),
        ("config", "", "The config file was read again, and 2 changes follow, because an admin asked for it."),
    ]


async def test_a_reload_goes_on_when_its_client_leaves() -> None:
    """The file is deployed then too, so the event must not be missing."""
    cluster = Cluster()
    goes_on = asyncio.Event()
    cluster.before_reload = goes_on.wait
    client = asyncio.create_task(cluster.actions.reload(ADMIN))
    await asyncio.sleep(0)
    client.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client
    goes_on.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert [text for _, _, text in cluster.told()] == [
        "An admin has asked for the config file to be read again.",
        "The config file was read again, and 2 changes follow, because an admin asked for it.",
    ]


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (InvalidRequest("secret: unknown field"), "The config file is wrong, so nothing was changed."),
        (
            DeadlineExceeded("/srv/secret was not read"),
            "The config file was not read again, or not to the end. The log of the router says why.",
        ),
    ],
)
async def test_a_reload_that_fails_is_an_event(
    error: RequestError, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the reason, which only an admin may read. The log has it."""
    cluster = Cluster()

    async def fail() -> None:
        raise error

    cluster.before_reload = fail
    with pytest.raises(type(error), match="secret"), caplog.at_level(logging.WARNING, logger="ray.serve"):
        await cluster.actions.reload(ADMIN)
    assert [text for _, _, text in cluster.told()] == [
        "An admin has asked for the config file to be read again.", event,
    ]  # fmt: skip
    assert error.message in caplog.text


async def test_an_admin_of_an_adapter_alone_may_not_park_its_base_model() -> None:
    """Which all other adapters and the base model's own clients use. An admin of both may."""
    cluster = Cluster({"m": ["resident"]}, m="ready")
    adapter = ModelStatus("sql", "ready", 1, parent="m", engine_name="sql")

    async def find(name: str) -> ModelStatus:
        assert name == "sql"
        return adapter

    cluster.models.find = find  # type: ignore[method-assign]
    for models in (("m:sql",), ("m:*",)):
        of_adapter = Visitor(ApiKey(name="ops", sha256=HASH, role="admin", models=models), is_admin=True)
        for action in (cluster.actions.park, cluster.actions.wake):
            with pytest.raises(AdminOnly, match="'sql' is an adapter, and the API key 'ops' may not use its base"):
                await action(of_adapter, "sql")
    assert (cluster.done, cluster.told()) == ([], [])
    both = Visitor(ApiKey(name="ops", sha256=HASH, role="admin", models=("m", "m:sql")), is_admin=True)
    assert (await cluster.actions.park(both, "sql")).has_begun
    assert cluster.done == ["park m"]


@pytest.mark.parametrize(
    ("state", "replicas", "can"),
    [
        ("asleep", [], ["wake"]),
        ("ready", [], []),
        ("ready", ["parked", "stopped"], ["wake"]),
        ("ready", ["draining"], ["wake"]),
        ("ready", ["parked", "resident"], ["park"]),
        ("ready", ["waking"], ["park"]),
        ("loading", [], []),
        ("failed", [], []),
    ],
)
def test_what_could_be_done_now(state: Any, replicas: list[str], can: list[str]) -> None:
    """So that a page offers nothing else."""
    assert possible(ModelStatus("m", state, 1), replicas) == can
