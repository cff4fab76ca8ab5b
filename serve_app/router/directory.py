"""Knows which models exist and which of them serve, according to Ray Serve.

Every application whose ingress is our `Model` deployment is a model, and its name is the application's name. An
application that could not be built has no deployments at all. It counts as a model too, so that its error is seen.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.adapters.records import Found, RecordReader, Records
from serve_app.errors import ModelNotFound, ModelUnavailable
from serve_app.ray_serve import MODEL_DEPLOYMENT, instance_details, running_replicas
from serve_app.router.model_status import ModelStatus, adapter_statuses, may_live, read_status, untold

logger = logging.getLogger("ray.serve")

# The least that clients are told to wait for a load, also once it takes longer than the last one.
LEAST_WAIT_S = 1.0
# A client is told to wait this many seconds for a model of which nothing better is known.
RETRY_LOADING_S = 10.0
RETRY_FAILED_S = 60.0

# The controller answers in milliseconds, unless it is restarting.
STATUS_TIMEOUT_S = 10.0

# A request for a model that is not known as ready reads Serve's status anew, unless it is younger than these seconds.
FRESH_ENOUGH_S = 0.5


class Directory(Protocol):
    """This is the directory of models, as the parts that pass a request on see it."""

    async def find(self, name: str) -> ModelStatus:
        """Returns one model, by any spelling of its name. Raises ModelNotFound for an unknown name."""
        ...

    async def look_up(self, name: str) -> ModelStatus | None:
        """Returns what `find` returns, or None for an unknown name."""
        ...

    def application(self, name: str) -> str:
        """Returns the name of the application that serves a model, which is another one for an adapter."""
        ...

    def require_hope(self, model: ModelStatus) -> None:
        """Raises ModelUnavailable if it is no use to wait for the model, which neither loads nor restarts."""
        ...

    def unavailable(self, model: ModelStatus) -> ModelUnavailable:
        """Returns why a model cannot answer now, with the time that is left of its load if it is loading."""
        ...

    def load_time_s(self, name: str) -> float:
        """Returns the seconds that are left of a load like the last one, or a guess if none was seen."""
        ...

    def waking(self, name: str) -> None:
        """Notes that a request has asked for a model that is asleep."""
        ...

    def woke(self, name: str) -> None:
        """Notes that the model has answered. Later requests are told to wait the time since the first request."""
        ...


class ModelDirectory:
    """Holds the models of this Serve instance, which it reads in the background every `interval_s` seconds.

    Requests are answered from the last reading, so a slow or restarting controller stops no request: replicas and
    handles work without it. Only a request for a model that is not known as ready waits for a new reading.
    `tell_load` is called with the model and the seconds of each load that was seen. `records` has what the replicas
    have of adapters.
    """

    def __init__(
        self,
        own_application: str,
        interval_s: float,
        tell_load: Callable[[str, float], None] = lambda *_: None,
        records: RecordReader | None = None,
    ):
        self._records = records or RecordReader()
        self._spellings: Mapping[str, str] = {}
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
        self._read: tuple[Records, Found] = {}, {}
        self._applications: Mapping[str, Any] = {}

    async def keep_fresh(self) -> None:
        """Reads Serve's status for ever. One task of the router runs this."""
        while True:
            try:
                await self.refresh(0.9 * self._interval_s)  # The console may have read it meanwhile.
            except Exception as error:  # The controller may be restarting, and the last reading stays valid.
                logger.warning("Serve's status cannot be read: %s", error)
            await asyncio.sleep(self._interval_s)

    @property
    def applications(self) -> Mapping[str, Any]:
        """Returns the applications of `ServeInstanceDetails`, as they were read last."""
        return self._applications

    @property
    def records(self) -> tuple[Records, Found]:
        """Returns what replicas have of adapters, and what was found in folders, as they were read last."""
        return self._read

    async def models(self) -> Mapping[str, ModelStatus]:
        """Returns all models by name, as they were read last."""
        if self._read_at == float("-inf"):
            await self.refresh(FRESH_ENOUGH_S)
        return self._models

    async def find(self, name: str) -> ModelStatus:
        """Returns one model, by any spelling of its name. Raises ModelNotFound for an unknown name."""
        await self.models()
        model = self._known(name)
        if model is None or model.state != "ready":
            await self.refresh(FRESH_ENOUGH_S)  # It may have been added or become ready since.
            model = self._known(name)
        if model is None:
            raise _not_found(name, self._models)
        return model

    async def look_up(self, name: str) -> ModelStatus | None:
        """Returns one model, by any spelling of its name, or None for an unknown name."""
        await self.models()
        if self._known(name) is None:
            await self.refresh(FRESH_ENOUGH_S)
        return self._known(name)

    def application(self, name: str) -> str:
        """Returns the name of the application that serves a model, which is another one for an adapter."""
        model = self._known(name)
        return name if model is None else model.application

    def _known(self, name: str) -> ModelStatus | None:
        return self._models.get(self._spellings.get(name, name))

    async def handle(self, name: str) -> DeploymentHandle[Any]:
        """Returns the handle of a model that can answer now.

        Raises ModelNotFound for an unknown name, and ModelUnavailable for a model that is loading or has failed.
        """
        model = await self.find(name)
        if not model.is_open:
            raise self.unavailable(model)
        application = model.application
        if application not in self._handles:
            try:
                # The application's handle is not used, since an application whose update failed has none.
                handle = await asyncio.to_thread(serve.get_deployment_handle, MODEL_DEPLOYMENT, application)
            except RayServeException:  # The model was deleted since the status was read.
                raise _unavailable(ModelStatus(name, "stopping", 0)) from None
            self._handles[application] = handle.options(method_name="http", stream=True)
        return self._handles[application]

    def unavailable(self, model: ModelStatus) -> ModelUnavailable:
        """Returns why a model cannot answer now, with the time that is left of its load if it is loading."""
        if model.state == "loading":
            text = f"The model '{model.name}' is loading. {model.message}".strip()
            return ModelUnavailable(text, param="model", retry_after_s=self.load_time_s(model.name))
        if model.is_open:
            text = f"No replica of the model '{model.name}' is running. One is being started."
            return ModelUnavailable(text, param="model", retry_after_s=self.load_time_s(model.name))
        return _unavailable(model)

    def load_time_s(self, name: str) -> float:
        """Returns the seconds that are left of a load like the last one, or a guess if none was seen. An adapter of
        which none was seen comes with its model."""
        last, since = self._load_of(name)
        return last if since is None else max(LEAST_WAIT_S, last - (time.monotonic() - since))

    def time_left_s(self, name: str) -> float | None:
        """Returns the seconds that are left of a load like the last one, or None once it takes longer than that."""
        last, since = self._load_of(name)
        left = last if since is None else last - (time.monotonic() - since)
        return left if left > 0 else None

    def _load_of(self, name: str) -> tuple[float, float | None]:
        """Returns the seconds that the model's last load took, and when the one began that goes on."""
        last = self._load_times.get(name, self._load_times.get(self.application(name), RETRY_LOADING_S))
        return last, self._loading_since.get(name, self._waking_since.get(name))

    def seen_from_outside(self, model: ModelStatus) -> ModelStatus:
        """Returns the status for clients. A model that a request has woken is loading, though Serve does not say so."""
        if model.state == "asleep" and model.name in self._waking_since:
            return replace(model, state="loading", message="a replica is being started")
        return model

    def hidden_by(self, aliases: Collection[str]) -> list[str]:
        """Returns a line for each of these aliases that hides an adapter, as far as models were read."""
        known = [model for alias in aliases if (model := self._models.get(alias)) is not None and model.parent]
        return [
            f"the alias '{model.name}' hides the adapter of that name, which is reached as '{model.asked.qualified}'"
            for model in known
        ]

    def waking(self, name: str) -> None:
        """Notes that a request has asked for a model that is asleep."""
        self._waking_since.setdefault(name, time.monotonic())

    def woke(self, name: str) -> None:
        """Notes that the model has answered. Later requests are told to wait the time since the first request."""
        if (since := self._waking_since.pop(name, None)) is not None:
            self._loaded(name, time.monotonic() - since)
        if (model := self._models.get(name)) is not None and model.state == "asleep":
            # This holds until Serve's status is read again.
            self._models[name] = replace(model, state="ready", replicas=1)

    def require_hope(self, model: ModelStatus) -> None:
        """Raises ModelUnavailable if it is no use to wait for the model, which neither loads nor restarts."""
        if model.state in ("failed", "stopping"):
            raise _unavailable(model)

    async def refresh(self, max_age_s: float) -> None:
        """Reads Serve's status unless the last reading is younger than this. Raises ModelUnavailable if the controller
        does not answer."""
        async with self._lock:
            if time.monotonic() - self._read_at < max_age_s:
                return
            if (
                time.monotonic() - self._failed_at < FRESH_ENOUGH_S
            ):  # Those who waited for the lock need not wait again.
                raise _no_controller()
            try:
                details = await asyncio.wait_for(instance_details(), STATUS_TIMEOUT_S)
            except (TimeoutError, RayError, ValueError):  # The controller may be restarting.
                self._failed_at = time.monotonic()
                raise _no_controller() from None
            models = await _with_survivors(read_status(details["applications"], self._own_application), self._models)
            records, found = await self._read_records(details["applications"])
            adapters, self._spellings = adapter_statuses(details["applications"], models, records, found)
            self._models = models | adapters
            self._applications = details["applications"]
            self._time_loads()
            self._forget_gone()
            self._read_at = time.monotonic()

    def _forget_gone(self) -> None:
        """Forgets what is kept of models and adapters that exist no more, because adapters come and go for ever."""
        kept: tuple[dict[str, Any], ...] = (
            self._handles, self._load_times, self._loading_since, self._waking_since,
        )  # fmt: skip
        for by_name in kept:
            for gone in by_name.keys() - self._models.keys():
                del by_name[gone]

    async def _read_records(self, applications: Mapping[str, Any]) -> tuple[Records, Found]:
        """Returns what replicas have of adapters, and what was found last in the folders of models of which no replica
        tells, as far as Ray's head answers. What was read last stays otherwise."""

        def read() -> tuple[Records, Found]:
            records = self._records.read()
            found = self._records.found(untold(applications, records))
            self._records.forget_all_but(partial(may_live, applications))
            self._records.forget_models_but(applications)
            return records, found

        try:
            self._read = await asyncio.to_thread(read)
        except (RayError, RuntimeError) as error:
            logger.warning("Which adapters the replicas have cannot be read: %s", error)
        return self._read

    def _loaded(self, name: str, seconds: float) -> None:
        self._load_times[name] = seconds
        self._tell_load(name, seconds)

    def _time_loads(self) -> None:
        """Remembers how long each model took from "loading" to "ready", if both were seen."""
        now = time.monotonic()
        for name, model in self._models.items():
            if model.state == "loading":
                self._loading_since.setdefault(name, now)
            elif (since := self._loading_since.pop(name, None)) is not None and model.state == "ready":
                self._loaded(name, now - since)
            if model.state == "ready":  # The client that woke it may have left since.
                self.woke(name)
            elif model.state != "asleep":  # The request that was to wake it cannot succeed now.
                self._waking_since.pop(name, None)


async def _with_survivors(models: dict[str, ModelStatus], before: Mapping[str, ModelStatus]) -> dict[str, ModelStatus]:
    """Returns the models with the replicas that still serve after a failed update, or while an update is being built,
    which Serve's status leaves out."""
    failed = [name for name, model in models.items() if model.state == "failed"]
    building = [
        name
        for name, model in models.items()
        if model.state == "loading" and name in before and before[name].state == "ready"
    ]
    if not failed and not building:
        return models
    try:
        running = await running_replicas([*failed, *building])
    except (RayError, AttributeError) as error:  # Without an answer they count as failed.
        logger.warning("It is unknown whether replicas of %s still serve: %s", [*failed, *building], error)
        return models
    for name in failed:
        if count := running[name]:
            text = f"it serves as before, because its update failed: {models[name].message}"
            models[name] = ModelStatus(name, "ready", count, text)
    for name in building:
        if count := running[name]:
            models[name] = ModelStatus(name, "ready", count)
    return models


class ControllerSilent(ModelUnavailable):
    """Serve's controller does not answer, so nothing is known now. Running replicas run on."""


def _no_controller() -> ControllerSilent:
    return ControllerSilent("Ray Serve's controller does not answer.", retry_after_s=RETRY_LOADING_S)


def _not_found(name: str, models: Mapping[str, ModelStatus]) -> ModelNotFound:
    names = ", ".join(models) or "none yet"
    return ModelNotFound(f"The model '{name}' does not exist. These models exist: {names}.", param="model")


def _unavailable(model: ModelStatus) -> ModelUnavailable:
    if model.state == "stopping":
        return ModelUnavailable(f"The model '{model.name}' is being removed.", param="model")
    text = f"The model '{model.name}' has failed: {model.message}"
    return ModelUnavailable(text, param="model", retry_after_s=RETRY_FAILED_S)
