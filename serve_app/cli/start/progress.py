"""Decides what `serve-app run` shows of a start, as functions of Serve's statuses."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.planning.sizes import gib
from serve_app.replica.report import DeviceReport, ReplicaReport
from serve_app.router.model_status import ModelStatus, State, read_status, summarize
from serve_app.router.status_lines import MEND, serving, state_line


@dataclass(frozen=True)
class ApplicationState:
    """This is one application of Serve. `is_model` is false for the router and for applications that are not ours."""

    name: str
    state: State
    is_model: bool
    message: str = ""

    @property
    def is_settled(self) -> bool:
        """Returns whether its state will stay as it is unless something happens to it."""
        return self.state not in ("loading", "stopping")


States = Mapping[str, ApplicationState]


def read_states(applications: Mapping[str, Any], others: Collection[str]) -> dict[str, ApplicationState]:
    """Returns the states of all applications by name. `applications` are those of `ServeInstanceDetails`, and `others`
    are the names of those that are not models."""
    models = read_status({name: item for name, item in applications.items() if name not in others}, "")
    found = {name: ApplicationState(name, model.state, True, model.message) for name, model in sorted(models.items())}
    return found | {name: _other(name, item) for name, item in applications.items() if name not in found}


def with_survivors(applications: Mapping[str, Any], before: States, now: States) -> dict[str, ApplicationState]:
    """Returns the states of now, with those of `before` for applications that went on while Serve builds a changed
    version of them. It does not say then which replicas live, and a change of adapters or of `user_config` alone
    replaces none."""
    return {
        name: before[name] if _goes_on(applications[name], before.get(name)) else item for name, item in now.items()
    }


def _goes_on(application: Any, before: ApplicationState | None) -> bool:
    is_built = _status(application) != "DEPLOYING" or application["deployments"]
    return not is_built and before is not None and before.state in ("ready", "asleep")


def _status(application: Any) -> str:
    return str(getattr(application["status"], "value", application["status"]))


def _other(name: str, application: Any) -> ApplicationState:
    status = _status(application)
    known: dict[str, State] = {"RUNNING": "ready", "DEPLOY_FAILED": "failed", "DELETING": "stopping"}
    messages = [item["message"] for item in application["deployments"].values()] + [application["message"]]
    return ApplicationState(name, known.get(status, "loading"), False, summarize(next(filter(None, messages), "")))


def changes(before: States, now: States) -> list[str]:
    """Returns a line for each change. It has the state, and why the application fails or what it waits for."""
    lines = [
        state_line(name, item.state, item.message) for name, item in now.items() if _is_news(before.get(name), item)
    ]
    return lines + [f"{name} is gone" for name in before if name not in now]


def _is_news(before: ApplicationState | None, now: ApplicationState) -> bool:
    if before is None:
        return now.is_model or now.state != "loading"
    if before.state != now.state:
        return True
    # The figures in Serve's message change all the time, so only its words say whether the message is new.
    return now.state != "ready" and bool(now.message) and _gist(now.message) != _gist(before.message)


def _gist(message: str) -> str:
    return "".join(char for char in message if not char.isdigit())


def is_settled(states: States, expected: Collection[str]) -> bool:
    """Returns whether each application of the file has come up or has failed."""
    return all(name in states and states[name].is_settled for name in expected)


def still_expected(expected: Collection[str], seen: Collection[str], states: States) -> list[str]:
    """Returns the applications of the file without those that were `seen` and are gone, because a file that was
    deployed later does not have them."""
    return [name for name in expected if name in states or name not in seen]


def awaited(states: States, expected: Collection[str]) -> list[str]:
    """Returns a line for each application that is being started or stopped. Those that Serve does not know yet come
    first."""
    unknown = [state_line(name, "loading", "") for name in expected if name not in states]
    return unknown + [state_line(name, item.state, "") for name, item in states.items() if not item.is_settled]


def serves_nothing(states: States, expected: Collection[str], routers: Collection[str]) -> bool:
    """Returns whether each application of the file has failed. A router alone serves nothing, so it counts only in a
    file that has nothing else."""
    names = [name for name in expected if name not in routers] or list(expected)
    return bool(names) and all(name in states and states[name].state == "failed" for name in names)


def closing_lines(states: States, url: str, routers: Collection[str], is_open: bool) -> list[str]:
    """Returns the lines for the moment when nothing is loading any more. They say what serves where, with a command to
    try. Failures have been shown already."""
    models = {name: ModelStatus(name, item.state, 0) for name, item in states.items() if item.is_model}
    if any(name in states and states[name].state == "ready" for name in routers):
        lines = serving(models, url, is_open)
    else:
        ready = [model for model in models.values() if model.is_open]
        lines = [f"{len(ready)} of {len(models)} models serve by their own routes, and no router serves by name"]
        lines += [f"{model.name}: {url}/models/{model.name}/v1" for model in ready]
    return [*lines, MEND] if any(item.state == "failed" for item in states.values()) else lines


def of_ready(reports: Sequence[ReplicaReport], states: States) -> list[ReplicaReport]:
    """Returns the reports of the models that are ready. A report may come before Serve says that its model is ready."""
    return [item for item in reports if item.application in states and states[item.application].state == "ready"]


def memory_lines(reports: Sequence[ReplicaReport], told: Collection[tuple[str, str]]) -> list[str]:
    """Returns a line with the planned and measured memory of each rank on its device, for the replicas that were not
    shown yet. If a model has several replicas, the line has Serve's name of the replica too."""
    known = {*told, *((report.application, report.replica) for report in reports)}
    counts = Counter(application for application, _ in known)
    return [
        f"{report.application}{f' (replica {report.replica})' if counts[report.application] > 1 else ''}: "
        f"{f'rank {device.rank}, ' if report.has_ranks else ''}{_memory(device)}"
        for report in reports
        if (report.application, report.replica) not in told
        for device in report.devices
    ]


def _memory(device: DeviceReport) -> str:
    planned = "not planned" if device.planned is None else f"planned {gib(device.planned)}"
    holds = "and its memory cannot be measured" if device.held is None else f"holds {gib(device.held)}"
    return f"{device.where}: {planned}, {holds}"
