"""Which models exist and which of them serve, as Ray Serve tells it.

Every application whose ingress is our `Model` deployment is a model, and its name is the application's name. An
application that could not be built has no deployments at all; it counts as a model too, so that its error is seen.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.errors import ModelNotFound, ModelUnavailable
from serve_app.ray_serve import MODEL_DEPLOYMENT, instance_details, running_replicas

logger = logging.getLogger("ray.serve")

# "asleep": scaled to zero replicas; the first request makes Serve start one.
State = Literal["ready", "asleep", "loading", "failed", "stopping"]

# States in which a replica takes requests: one on a node that drains does so until another is there.
SERVING = frozenset({"RUNNING", "PENDING_MIGRATION"})

# Seconds that a client is told to wait for a model of which nothing better is known.
RETRY_LOADING_S = 10.0
RETRY_FAILED_S = 60.0

# The controller answers in milliseconds, unless it is restarting.
STATUS_TIMEOUT_S = 10.0

# A request for a model that is not known as ready reads Serve's status anew, at most this often.
FRESH_ENOUGH_S = 0.5


@dataclass(frozen=True)
class ModelStatus:
    """One model as the outside may see it. `message` says why, where it is not ready; `replicas` are running ones."""

    name: str
    state: State
    replicas: int
    message: str = ""

    @property
    def is_open(self) -> bool:
        """Whether Serve takes requests for it; it holds those of a model that is asleep until a replica is there."""
        return self.state in ("ready", "asleep")


class Directory(Protocol):
    """What the way of a request asks of the directory of models."""

    async def find(self, name: str) -> ModelStatus:
        """Returns one model. Raises ModelNotFound for an unknown name."""
        ...

    def require_hope(self, model: ModelStatus) -> None:
        """Raises ModelUnavailable for a model that will not answer who waits; one that loads or restarts will."""
        ...

    def unavailable(self, model: ModelStatus) -> ModelUnavailable:
        """Why a model cannot answer now, with the time that its last load took where it is loading."""
        ...

    def load_time_s(self, name: str) -> float:
        """Seconds that are left of a load like the last one; a guess where none was seen."""
        ...

    def waking(self, name: str) -> None:
        """A request has asked for a model that is asleep."""
        ...

    def woke(self, name: str) -> None:
        """The model has answered. The time since the first request is what the next ones are told to wait."""
        ...


class ModelDirectory:
    """Holds the models of this Serve instance, which it reads in the background every `interval_s` seconds.

    Requests are answered from what was read last, so a slow or restarting controller stops nobody: replicas and
    handles work without it. Only a request for a model that is not known as ready waits for a new reading.
    `tell_load` is told of each load that was seen, with its seconds.
    """

    def __init__(
        self, own_application: str, interval_s: float, tell_load: Callable[[str, float], None] = lambda *_: None
    ):
        self._own_application = own_application
        self._interval_s = interval_s
        self._tell_load = tell_load
        self._models: dict[str, ModelStatus] = {}
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._load_times: dict[str, float] = {}
        self._loading_since: dict[str, float] = {}
        self._waking_since: dict[str, float] = {}
        self._read_at = self._failed_at = float("-inf")
        self._lock = asyncio.Lock()

    async def keep_fresh(self) -> None:
        """Reads Serve's status for ever. One task of the router's runs this."""
        while True:
            try:
                await self._refresh(max_age_s=0.0)
            except Exception as error:  # The controller may be restarting; what was read last stays.
                logger.warning("Cannot read Serve's status: %s", error)
            await asyncio.sleep(self._interval_s)

    async def models(self) -> Mapping[str, ModelStatus]:
        """Returns all models by name, as they were read last."""
        if self._read_at == float("-inf"):
            await self._refresh(FRESH_ENOUGH_S)
        return self._models

    async def find(self, name: str) -> ModelStatus:
        """Returns one model. Raises ModelNotFound for an unknown name."""
        model = (await self.models()).get(name)
        if model is None or model.state != "ready":
            await self._refresh(FRESH_ENOUGH_S)  # It may have come, or become ready, since.
            model = self._models.get(name)
        if model is None:
            raise _not_found(name, self._models)
        return model

    async def handle(self, name: str) -> DeploymentHandle[Any]:
        """The handle of a model that can answer now.

        Raises ModelNotFound for an unknown name, ModelUnavailable for one that is loading or has failed.
        """
        model = await self.find(name)
        if not model.is_open:
            raise self.unavailable(model)
        if name not in self._handles:
            try:
                # Not the application's handle: an application of which an update failed has none.
                handle = await asyncio.to_thread(serve.get_deployment_handle, MODEL_DEPLOYMENT, name)
            except RayServeException:  # Deleted since the status was read.
                raise _unavailable(ModelStatus(name, "stopping", 0)) from None
            self._handles[name] = handle.options(method_name="http", stream=True)
        return self._handles[name]

    def unavailable(self, model: ModelStatus) -> ModelUnavailable:
        """Why a model cannot answer now, with the time that its last load took where it is loading."""
        if model.state == "loading":
            text = f"The model '{model.name}' is loading. {model.message}".strip()
            return ModelUnavailable(text, param="model", retry_after_s=self.load_time_s(model.name))
        if model.is_open:
            text = f"No replica of the model '{model.name}' runs. One is being started."
            return ModelUnavailable(text, param="model", retry_after_s=self.load_time_s(model.name))
        return _unavailable(model)

    def load_time_s(self, name: str) -> float:
        """Seconds that are left of a load like the last one; a guess where none was seen."""
        last = self._load_times.get(name, RETRY_LOADING_S)
        since = self._loading_since.get(name, self._waking_since.get(name))
        return max(1.0, last - (time.monotonic() - since)) if since is not None else last

    def seen_from_outside(self, model: ModelStatus) -> ModelStatus:
        """A model that a request has woken is loading, though Serve's status of it does not tell."""
        if model.state == "asleep" and model.name in self._waking_since:
            return ModelStatus(model.name, "loading", 0, "a replica is being started for the requests that wait")
        return model

    def waking(self, name: str) -> None:
        """A request has asked for a model that is asleep."""
        self._waking_since.setdefault(name, time.monotonic())

    def woke(self, name: str) -> None:
        """The model has answered. The time since the first request is what the next ones are told to wait."""
        if (since := self._waking_since.pop(name, None)) is not None:
            self._loaded(name, time.monotonic() - since)
        if (model := self._models.get(name)) is not None and model.state == "asleep":
            self._models[name] = ModelStatus(name, "ready", 1)  # Before Serve's status is read again.

    def require_hope(self, model: ModelStatus) -> None:
        """Raises ModelUnavailable for a model that will not answer who waits; one that loads or restarts will."""
        if model.state in ("failed", "stopping"):
            raise _unavailable(model)

    async def _refresh(self, max_age_s: float) -> None:
        async with self._lock:
            if time.monotonic() - self._read_at < max_age_s:
                return
            if time.monotonic() - self._failed_at < FRESH_ENOUGH_S:  # Those who waited for it need not wait again.
                raise _no_controller()
            try:
                details = await asyncio.wait_for(instance_details(), STATUS_TIMEOUT_S)
            except (TimeoutError, RayError, ValueError):  # It may be restarting.
                self._failed_at = time.monotonic()
                raise _no_controller() from None
            models = read_status(details["applications"], self._own_application)
            self._models = await _with_survivors(models)
            self._time_loads()
            for gone in self._handles.keys() - self._models.keys():
                del self._handles[gone]
            self._read_at = time.monotonic()

    def _loaded(self, name: str, seconds: float) -> None:
        self._load_times[name] = seconds
        self._tell_load(name, seconds)

    def _time_loads(self) -> None:
        """Remembers how long each model took from "loading" to "ready", as far as it was seen."""
        now = time.monotonic()
        for name, model in self._models.items():
            if model.state == "loading":
                self._loading_since.setdefault(name, now)
            elif (since := self._loading_since.pop(name, None)) is not None and model.state == "ready":
                self._loaded(name, now - since)
            if model.state == "ready":  # Whoever woke it may have left since.
                self.woke(name)
            elif model.state != "asleep":  # What was to wake it has no chance now.
                self._waking_since.pop(name, None)


async def _with_survivors(models: dict[str, ModelStatus]) -> dict[str, ModelStatus]:
    """Models of which an update could not be built, with the replicas that go on serving: Serve's status has none."""
    failed = [name for name, model in models.items() if model.state == "failed"]
    if not failed:
        return models
    try:
        running = await running_replicas(failed)
    except (RayError, AttributeError) as error:  # Without it they count as failed.
        logger.warning("Cannot see whether replicas of %s go on: %s", failed, error)
        return models
    for name in failed:
        if count := running[name]:
            text = f"serves as before; its update failed: {models[name].message}"
            models[name] = ModelStatus(name, "ready", count, text)
    return models


def read_status(applications: Mapping[str, Any], own_application: str) -> dict[str, ModelStatus]:
    """The models among Serve's applications, by name; as `ServeInstanceDetails` has them."""
    return {
        name: _read_application(name, application)
        for name, application in sorted(applications.items())
        if name != own_application
        and (not application["deployments"] or MODEL_DEPLOYMENT in application["deployments"])
    }


def _read_application(name: str, application: Any) -> ModelStatus:
    deployment = application["deployments"].get(MODEL_DEPLOYMENT)
    replicas = [] if deployment is None else deployment["replicas"]
    running = sum(_text(replica["state"]) in SERVING for replica in replicas)
    status = _text(application["status"])
    # The deployment's message has the reason; the application's then only says that the deployment failed.
    message = summarize((deployment["message"] if deployment is not None else "") or application["message"])
    if status == "DELETING":
        return ModelStatus(name, "stopping", running)
    if running:
        return ModelStatus(name, "ready", running)
    if status == "RUNNING":
        return ModelStatus(name, "asleep", 0, "scaled to zero; the first request starts a replica")
    if status == "DEPLOY_FAILED":
        return ModelStatus(name, "failed", 0, message)
    # UNHEALTHY: its replica died, and Serve is starting another.
    return ModelStatus(name, "loading", 0, message)


def _text(value: Any) -> str:
    """Ray's enumerations are strings or have them."""
    return str(getattr(value, "value", value))


def summarize(message: str) -> str:
    """One of Serve's status messages without its tracebacks: the last line that names an exception of ours or Python's.

    Serve repeats the whole remote traceback in the message of an application whose constructor failed.
    """
    message = re.sub(r"^Deploying app '.*?' failed with exception:\n", "", message)
    if "Traceback (most recent call last)" not in message:
        return " ".join(message.split())
    lines = [line.strip() for line in message.splitlines()]
    starts = [number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Exit)\b.*: ", line)]
    last = " ".join(lines[starts[-1] if starts else -1 :])
    return re.sub(r"^(serve_app\.errors\.\w+: |(\w+\.)*)", "", last)


class ControllerSilent(ModelUnavailable):
    """Nothing is known now. What runs, runs on."""


def _no_controller() -> ControllerSilent:
    return ControllerSilent("Ray Serve's controller does not answer.", retry_after_s=RETRY_LOADING_S)


def _not_found(name: str, models: Mapping[str, ModelStatus]) -> ModelNotFound:
    names = ", ".join(models) or "none yet"
    return ModelNotFound(f"The model '{name}' does not exist. Models here: {names}.", param="model")


def _unavailable(model: ModelStatus) -> ModelUnavailable:
    if model.state == "stopping":
        return ModelUnavailable(f"The model '{model.name}' is being removed.", param="model")
    text = f"The model '{model.name}' has failed: {model.message}"
    return ModelUnavailable(text, param="model", retry_after_s=RETRY_FAILED_S)
