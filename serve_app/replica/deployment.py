"""Runs one replica of one model: an engine inside a Ray Serve deployment.

The engine's ASGI application is reached in two ways, and answers the same in both:
by route, where Serve calls it directly, and by name, where the router calls `http` through a handle.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp

from serve_app.access.cluster_record import joined
from serve_app.access.door import Inside, require_door, stand_behind
from serve_app.access.gate import Gate, KeyedApp
from serve_app.access.keys import configured_keys
from serve_app.access.limiter import ActorLimiter, router_token
from serve_app.adapters.configured import taken_names
from serve_app.adapters.deployed import deployed_applications
from serve_app.adapters.records import Adapters, FoundInFolder, RecordReader, ReplicaRecord, write_found
from serve_app.config import ModelConfig
from serve_app.engines.adapters import AdapterCheck
from serve_app.engines.engine import Engine, create_engine
from serve_app.errors import ConfigError, ServeAppError
from serve_app.facts.engine_facts import EngineFacts
from serve_app.facts.gpus import Gpu, as_given, local_gpus, visible_gpus
from serve_app.facts.process_memory import held_by_others, is_held
from serve_app.facts.torch_allocator import without_allocator
from serve_app.model_fields import ResidencyConfig
from serve_app.planning.plan import ModelPlan
from serve_app.replica.adapter_route import AdapterRoute
from serve_app.replica.adapter_shelf import AdapterShelf
from serve_app.replica.autoscaling import ENGINE_LOAD
from serve_app.replica.memory_watch import MemoryWatch
from serve_app.replica.node_plan import bundle_order, given_views, gpus_of, plan_over_nodes
from serve_app.replica.pool import pool_member
from serve_app.replica.replica_plan import plan_replica, split_line, visible_order, with_planned_memory
from serve_app.replica.report import ResidencyReport
from serve_app.replica.start_lock import starting_alone
from serve_app.replica.whole_body import WholeBody
from serve_app.terminal import notify, say
from serve_app.wire.asgi import HttpRequest, call_asgi

logger = logging.getLogger("ray.serve")

# A whole GPU may still be held for this many seconds by what ran there before.
LEAVE_TIMEOUT_S = 20.0
# Ray's store has this many seconds to delete a record.
FORGET_TIMEOUT_S = 2.0


class Model:
    """This is the deployment class of every model. The model's name is the application's name."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ModelConfig, environment: Mapping[str, str], facts: EngineFacts | None
    ):
        """Loads the model. `environment` is set before the engine's libraries are imported, which read it then. `facts`
        are what engines told the builder of the model, and None if it made no plan."""
        require_door()
        os.environ.update(without_allocator(environment, os.environ))
        if config.device != "cpu":
            os.environ.update(as_given(ray.get_runtime_context().get_accelerator_ids().get("GPU", [])))
        if config.leaves_threads_to_vllm:
            _forget_rays_threads(config)
        self.name = serve.get_replica_context().app_name
        self._config, self._facts = config, facts
        self._shelf: AdapterShelf | None = None
        self._is_configured = False
        source = configured_keys()
        self._access = await asyncio.to_thread(joined, source)
        self._gate = Gate(source, ActorLimiter())
        started = time.monotonic()
        say(f"loading {config.model} with {config.infer_backend}")
        try:
            await self._start(started)
            await self._start_adapters()
            app = self._app if self._shelf is None else AdapterRoute(self._app, self._shelf.require)
            self._own_route = WholeBody(app, config)
        except ServeAppError as error:
            await self._stop()
            raise error.with_traceback(None) from None  # Serve would print the traceback three times.
        except BaseException:
            await self._stop()
            raise
        await self._gate.start()
        await asyncio.to_thread(router_token)  # When the router shows it, Ray's head may be away.
        stand_behind(Inside(self._gate, lambda: config, self.name, adapters=self._adapter_names))
        say(f"ready after {time.monotonic() - started:.0f} s")

    async def _start(self, started: float) -> None:
        """Plans and starts the engine while no other one starts on any of its GPUs. `started` is when the replica did,
        by the monotonic clock."""
        if self._config.swaps is not None:
            await self._start_in_pool(self._config.swaps, started)
            return
        gpus = _gpus(self._config)
        async with starting_alone([gpu.uuid for gpu in gpus], notify):
            if self._config.nodes > 1:
                planned, gpus = await self._plan_over_nodes()
                os.environ.update(bundle_order(planned))
            else:
                planned = await self._plan()
                os.environ.update(visible_order(planned, gpus))
            if line := split_line(planned, gpus):
                say(line)
            self._engine: Engine = create_engine(with_planned_memory(self._config, planned), self.name, planned)
            await self._start_engine(planned, gpus, started)

    async def _start_in_pool(self, swaps: ResidencyConfig, started: float) -> None:
        """Starts an engine that has memory only while the keeper of its pool has leased it some. No start lock is
        needed, because leases never overlap."""
        member = await asyncio.to_thread(pool_member, self._config, swaps, self._facts)
        self._engine = engine = member.engine(self.name)
        await self._start_engine(member.planned, member.gpus, started, engine.residency)

    async def _start_adapters(self) -> None:
        """Loads the adapters, if the model may have any. One that is broken stops neither the model nor the others."""
        if not self._config.has_adapters:
            return
        self._record = record = ReplicaRecord(self.name, serve.get_replica_context().replica_id.unique_id)
        check = AdapterCheck(self._config)

        def taken(is_named: bool) -> Mapping[str, str]:
            return taken_names(deployed_applications(), self.name, RecordReader().read(), is_named)

        def found(adapters: Adapters) -> None:
            write_found(self.name, FoundInFolder(self._config.adapters_folder or "", adapters))

        self._shelf = AdapterShelf(self.name, check, self._engine, record.write, taken, found)
        await self._shelf.start(self._config)

    @property
    def _adapter_names(self) -> Callable[[], Collection[str]] | None:
        return None if self._shelf is None else self._shelf.names

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Lets the adapters of `user_config` replace those of `args`. Serve calls this at the start and after a change.

        A mistake at the start fails the start. A later one is only logged, because Serve would stop the replica. The
        first call waits for the adapters, so a replica has them before it takes requests. Later ones do not, because
        Serve sends no requests meanwhile.
        """
        try:
            config = self._config.with_live(user_config)
        except ConfigError as error:
            if not self._is_configured:
                notify(f"'{self.name}' cannot start, because its user_config is wrong: {error}")
                raise
            logger.error("The new user_config of '%s' is wrong and was not applied: %s", self.name, error)
            notify(f"the new user_config of '{self.name}' is wrong and was not applied: {error}")
            return
        if self._shelf is not None:
            await self._shelf.want(config)
            if not self._is_configured:
                await self._shelf.settled()
        self._is_configured = True

    async def _start_engine(
        self,
        planned: ModelPlan | None,
        gpus: Sequence[Gpu],
        started: float,
        residency: Callable[[], ResidencyReport | None] = lambda: None,
    ) -> None:
        self._app: ASGIApp = await self._engine.start()
        self._watch = MemoryWatch(self._config, self._engine, planned, gpus, residency)
        await self._watch.start(time.monotonic() - started)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return KeyedApp(self._own_route, self._gate, self.name, self._config, self._adapter_names)

    async def http(self, request: HttpRequest) -> AsyncIterator[bytes]:
        """Answers one request: it yields the head first, and then the body in pieces."""
        async for item in call_asgi(self._own_route, request):
            yield item

    async def check_health(self) -> None:
        """Raises an exception if the replica is not well. Serve calls this, and replaces the replica after that."""
        await self._access.check()
        await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the engine's load, which Serve passes to `autoscaling.by_engine_load`."""
        return {ENGINE_LOAD: self._engine.load()}

    async def _plan(self) -> ModelPlan | None:
        """Plans by what is free at this moment, which no engine changes while the start lock is held. Ray assigns no
        GPU itself if memory is counted by index."""
        by_index = not ray.get_runtime_context().get_accelerator_ids().get("GPU")
        if not by_index and self._config.share is None:
            await left_by_others(lambda: _gpus(self._config), notify)
        return await asyncio.to_thread(plan_replica, self._config, _gpus(self._config), by_index, self._facts)

    async def _plan_over_nodes(self) -> tuple[ModelPlan | None, list[Gpu]]:
        """Plans on what the bundles of this replica have, and returns the GPUs of all nodes too. They are whole ones,
        of which no other replica has a part, so no start lock is needed on other nodes."""
        await left_by_others(lambda: gpus_of(given_views()), notify, who=lambda _: "")
        views = await asyncio.to_thread(given_views)
        return await asyncio.to_thread(plan_over_nodes, self._config, views, self._facts), gpus_of(views)

    async def _stop(self) -> None:
        if self._shelf is not None:
            await self._shelf.stop()
            with contextlib.suppress(Exception):  # Readers ignore the record of a replica that is gone.
                async with asyncio.timeout(FORGET_TIMEOUT_S):
                    await asyncio.to_thread(self._record.forget)
        if hasattr(self, "_engine"):
            await self._engine.stop()
        if hasattr(self, "_watch"):
            await self._watch.stop()

    async def __del__(self) -> None:
        await self._stop()


def _forget_rays_threads(config: ModelConfig) -> None:
    """Removes OMP_NUM_THREADS where Ray has set it to the CPUs of this replica. vLLM would take it for the user's own
    choice, and load weights with so many threads."""
    own = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    name, of_ray = "OMP_NUM_THREADS", str(max(1, int(config.num_cpus)))
    if name not in own and os.environ.get(name) == of_ray:
        del os.environ[name]


def _gpus(config: ModelConfig) -> list[Gpu]:
    """Returns the GPUs of this process. The CPU has none, and over several nodes only the processes of ranks have."""
    return [] if config.device == "cpu" or config.nodes > 1 else visible_gpus(local_gpus())


async def left_by_others(
    gpus: Callable[[], Sequence[Gpu]],
    tell: Callable[[str], None],
    timeout_s: float = LEAVE_TIMEOUT_S,
    who: Callable[[Sequence[Gpu]], str] = held_by_others,
) -> None:
    """Waits a while until no other process holds memory of GPUs that belong to this replica alone.

    After a SIGKILL the predecessor's engine, a process of its own, may take some seconds to end, and a KV cache that is
    planned meanwhile would stay small. Processes that do not leave are reported, and the plan goes by what is free.
    `who` names them, if they can be seen from here.
    """
    deadline = time.monotonic() + timeout_s
    while others := [gpu for gpu in await asyncio.to_thread(gpus) if is_held(gpu)]:
        if time.monotonic() > deadline:
            tell(f"other processes still hold memory of this replica's GPU, so the plan leaves it out. {who(others)}")
            return
        await asyncio.sleep(0.5)
