"""Reads from Ray Serve's details, and from what replicas have of adapters, which models there are and which serve. It
is pure."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from serve_app.adapters.configured import named_adapters, watched_folder_of
from serve_app.adapters.records import Adapters, AdapterState, Found, Records
from serve_app.ray_serve import MODEL_DEPLOYMENT, SLOW_CONSTRUCTOR
from serve_app.wire.asked_model import Asked

# "asleep" means that the model is scaled to zero replicas. The first request makes Serve start one.
State = Literal["ready", "asleep", "loading", "failed", "stopping"]

# A replica takes requests in these states. One on a node that drains does so until another is there.
SERVING = frozenset({"RUNNING", "PENDING_MIGRATION"})


@dataclass(frozen=True)
class ModelStatus:
    """This is one model as clients may see it. If it is not ready, `message` says why. `replicas` counts the running
    ones.

    An adapter is a model of its own, whose `parent` is the model that it belongs to and whose `engine_name` is the name
    by which engines know it. `having` are the replicas that have it, or None if all of the model's have.
    """

    name: str
    state: State
    replicas: int
    message: str = ""
    parent: str = ""
    engine_name: str = ""
    having: frozenset[str] | None = None

    @property
    def application(self) -> str:
        """Returns the name of the application whose replicas serve it."""
        return self.parent or self.name

    @property
    def asked(self) -> Asked:
        """Returns what a request for it asks for."""
        return Asked(self.parent, self.engine_name) if self.parent else Asked(self.name)

    @property
    def is_open(self) -> bool:
        """Returns whether Serve takes requests for it. Those of a sleeping model are held until a replica runs."""
        return self.state in ("ready", "asleep")


def read_status(applications: Mapping[str, Any], own_application: str) -> dict[str, ModelStatus]:
    """Returns the models among the applications of `ServeInstanceDetails` by name."""
    return {
        name: _read_application(name, application)
        for name, application in sorted(applications.items())
        if name != own_application
        and (not application["deployments"] or MODEL_DEPLOYMENT in application["deployments"])
    }


def _read_application(name: str, application: Any) -> ModelStatus:
    deployment = application["deployments"].get(MODEL_DEPLOYMENT)
    replicas = [] if deployment is None else deployment["replicas"]
    running = sum(map(_is_serving, replicas))
    status = _text(application["status"])
    # The deployment's message has the reason. The application's only says that the deployment failed.
    message = summarize((deployment["message"] if deployment is not None else "") or application["message"])
    if status == "DELETING":
        return ModelStatus(name, "stopping", running)
    if running:
        return ModelStatus(name, "ready", running)
    if status == "RUNNING":
        return ModelStatus(name, "asleep", 0, "it is scaled to zero, and the first request starts a replica")
    if status == "DEPLOY_FAILED":
        return ModelStatus(name, "failed", 0, message)
    # UNHEALTHY means that its replica died, and Serve is starting another one.
    return ModelStatus(name, "loading", 0, message)


def _is_serving(replica: Mapping[str, Any]) -> bool:
    return _text(replica["state"]) in SERVING


def _text(value: Any) -> str:
    """Returns the text of one of Ray's enumerations, which are strings or contain them."""
    return str(getattr(value, "value", value))


def summarize(message: str) -> str:
    """Returns a status message of Serve without tracebacks: the last line that names an exception of ours or Python's.

    Serve repeats the whole remote traceback in the message of an application whose constructor failed.
    """
    if SLOW_CONSTRUCTOR in message:  # A model takes longer to load than Serve expects of a constructor.
        return ""
    message = re.sub(r"^Deploying app '.*?' failed with exception:\n", "", message)
    if "Traceback (most recent call last)" not in message:
        return " ".join(message.split())
    lines = [line.strip() for line in message.splitlines()]
    starts = [number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Exit)\b.*: ", line)]
    last = " ".join(lines[starts[-1] if starts else -1 :])
    return re.sub(r"^(serve_app\.errors\.\w+: |(\w+\.)*)", "", last)


def living_replicas(application: Mapping[str, Any]) -> frozenset[str]:
    """Returns the ids of a model's replicas that take requests."""
    deployment = application["deployments"].get(MODEL_DEPLOYMENT) or {}
    return frozenset(str(item.get("replica_id")) for item in deployment.get("replicas") or () if _is_serving(item))


def may_live(applications: Mapping[str, Any], name: str, replica: str) -> bool:
    """Returns whether a replica of a model may live. Serve does not say which do while it builds an update, or after it
    could not."""
    application = applications.get(name)
    if application is None:
        return False
    return not application["deployments"] or replica in living_replicas(application)


def untold(applications: Mapping[str, Any], records: Records) -> list[str]:
    """Returns the models with a watched folder of which no replica that takes requests tells what it has, as while they
    sleep, load or are updated. What was found in their folder last says which adapters they have."""
    return [
        name
        for name, application in applications.items()
        if watched_folder_of(application.get("deployed_app_config") or {}) is not None
        and not dict(_held(name, application, records))
    ]


def adapter_statuses(
    applications: Mapping[str, Any],
    models: Mapping[str, ModelStatus],
    records: Records,
    found: Found = MappingProxyType({}),
) -> tuple[dict[str, ModelStatus], dict[str, str]]:
    """Returns the adapters of all models by name, and the names of `models` and of these by their other spellings.

    An adapter that the config names is known before a replica has it. One of a watched folder is known by the replicas
    that take requests, or by what was `found` last where none of them tells. Where several adapters have one name, it
    means the one that is ready, and of several or none that are, the one that a config names. Where that leaves more
    than one, or a model has the name too, it means none of them. Those that it does not mean are known as MODEL:ADAPTER
    alone. A model that has failed takes no name from an adapter that is ready, because it may have failed for that.
    """
    told = {name: _Told.of(name, applications[name], records, found) for name in models}
    known = {
        status: adapter in told[name].named
        for name, model in models.items()
        for adapter in sorted(told[name].names)
        if (status := _adapter(model, adapter, told[name])) is not None
    }
    return _by_name(models, known)


def _by_name(
    models: Mapping[str, ModelStatus], known: Mapping[ModelStatus, bool]
) -> tuple[dict[str, ModelStatus], dict[str, str]]:
    """Returns these adapters by the names that mean them, and their names by the other spellings. `known` says of each
    whether a config names it."""
    ready = {status.engine_name for status in known if status.state == "ready"}
    refused = {name: model.message for name, model in models.items() if model.state == "failed" and name in ready}
    taken = models.keys() - refused.keys()
    meant = _meant(known)
    statuses, spellings = {}, {}
    for status in known:
        is_clear = meant[status.engine_name] == status and status.engine_name not in taken
        canonical = status.engine_name if is_clear else status.asked.qualified
        if canonical in taken:
            continue
        message = status.message
        if not is_clear:
            also = f"'{status.engine_name}' is also another one's name, so only '{canonical}' means this adapter"
            message = f"{message}; {also}" if message and status.state == "ready" else message or also
        if canonical in refused:
            message = f"a model of this name is not served: {refused[canonical]}"
        statuses[canonical] = replace(status, name=canonical, message=message)
        if is_clear and status.asked.qualified not in taken:
            spellings[status.asked.qualified] = canonical
    return statuses, spellings


def _meant(known: Mapping[ModelStatus, bool]) -> dict[str, ModelStatus | None]:
    """Returns which adapter each name means, or None where it could be several. A newcomer that was refused because of
    its name takes the name from nobody."""
    found: dict[str, ModelStatus | None] = {}
    claims: dict[str, tuple[bool, bool]] = {}
    for status, is_named in known.items():
        claim, best = (status.state == "ready", is_named), claims.get(status.engine_name)
        if best is None or claim > best:
            found[status.engine_name], claims[status.engine_name] = status, claim
        elif claim == best:
            found[status.engine_name] = None
    return found


@dataclass(frozen=True)
class _Told:
    """This is what is known of the adapters of one model: those that its config names, what each replica that takes
    requests has, and, if no such replica tells, what was found in its watched folder last. `is_refused` says that the
    config is that of an update that has failed."""

    named: frozenset[str]
    held: Mapping[str, Adapters]
    found: Adapters
    is_refused: bool = False

    @classmethod
    def of(cls, name: str, application: Mapping[str, Any], records: Records, found: Found) -> "_Told":
        config = application.get("deployed_app_config") or {}
        held = dict(_held(name, application, records))
        last = found.get(name)
        is_last = not held and last is not None and last.folder == watched_folder_of(config)
        return cls(
            frozenset(map(str, named_adapters(config))), held, last.adapters if is_last and last is not None else {},
            _text(application["status"]) == "DEPLOY_FAILED",
        )  # fmt: skip

    @property
    def names(self) -> set[str]:
        return {*self.named, *self.found, *(adapter for held in self.held.values() for adapter in held)}

    def stays(self, adapter: str) -> bool:
        """Returns whether an adapter is known whatever its model's replicas do."""
        states = [self.found[adapter]] if adapter in self.found else []
        states += [held[adapter] for held in self.held.values() if adapter in held]
        return adapter in self.named or any(state.state != "leaving" for state in states)


def _held(name: str, application: Mapping[str, Any], records: Records) -> Iterator[tuple[str, Adapters]]:
    """Yields what the living replicas of a model have. Serve does not say which live while it builds an update."""
    for (owner, replica), held in records.items():
        if owner == name and may_live({name: application}, name, replica):
            yield replica, held


def _adapter(model: ModelStatus, adapter: str, told: _Told) -> ModelStatus | None:
    """Returns the status of one adapter, or None if it is known no more. It is as its model is while that does not
    serve."""
    status = ModelStatus(adapter, model.state, 0, model.message, model.name, adapter)
    if model.state != "ready":
        return status if told.stays(adapter) else None
    states = {replica: held[adapter] for replica, held in told.held.items() if adapter in held}
    having = frozenset(replica for replica, state in states.items() if state.state == "ready")
    failures = [state.message for state in states.values() if state.state == "failed"]
    if having:
        notes = failures or [state.message for state in states.values() if state.message]
        return replace(status, replicas=len(having), message=notes[0] if notes else "", having=having)
    if failures and len(failures) == len(states):
        return replace(status, state="failed", message=failures[0])
    if not states and told.is_refused and adapter in told.named:
        return replace(status, state="failed")  # The model's message says why its update has failed.
    if adapter in told.named or _is_on_its_way(adapter, told, states.values()):
        return replace(status, state="loading", message="its replicas load it")
    return None


def _is_on_its_way(adapter: str, told: _Told, states: Iterable[AdapterState]) -> bool:
    """Returns whether replicas load an adapter that no config names, or have not told yet that they will."""
    return any(state.state == "loading" for state in states) or (adapter in told.found and told.stays(adapter))
