"""Does what an admin may do: wake a model, park one, and have the config file read again."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from serve_app.access.keys import ApiKey
from serve_app.console.events import Kind
from serve_app.console.guard import Visitor, require_admin
from serve_app.console.reload import Reload, Reloaded
from serve_app.errors import AdminOnly, Conflict, InvalidRequest, ModelNotFound
from serve_app.residency.operator import KeeperSilent, Operator, Wishes
from serve_app.router.model_status import ModelStatus
from serve_app.wire.asked_model import Asked

logger = logging.getLogger("ray.serve")

HOW_TO_GIVE_BACK = (
    "To let models give back their memory, put them in a pool (residency: {policy: swap}), or let this one scale to "
    "zero (autoscaling_config: {min_replicas: 0})."
)


class Models(Protocol):
    """Has what actions need of the router."""

    async def find(self, name: str) -> ModelStatus:
        """Returns a model by any spelling of its name, as it is now. Raises ModelNotFound."""
        ...


class Waker(Protocol):
    """Starts replicas."""

    def wake(self, name: str) -> None:
        """Starts a replica of a model at zero replicas, in the background, and returns at once."""
        ...


@dataclass(frozen=True)
class Done:
    """This is the answer to an action. `has_begun` says that something happens now, of which events tell."""

    model: str
    has_begun: bool
    message: str

    @property
    def status(self) -> int:
        """Returns the HTTP status."""
        return HTTPStatus.ACCEPTED if self.has_begun else HTTPStatus.OK

    def to_json(self) -> dict[str, Any]:
        """Returns it as `POST /ui/api/models/NAME/wake` answers."""
        return {"model": self.model, "has_begun": self.has_begun, "message": self.message}


Note = Callable[[Kind, str, str], object]


class Actions:
    """Acts for one router replica. `alias_of` returns what a name of a client stands for, and `note` takes an event:
    its kind, the model that it concerns, or an empty text, and the text for a person."""

    def __init__(
        self,
        models: Models,
        waker: Waker,
        alias_of: Callable[[str], str] = lambda name: name,
        wishes: Wishes | None = None,
        reload: Callable[[str], Any] | None = None,
    ):
        self._models, self._waker, self._alias_of = models, waker, alias_of
        self.note: Note = lambda kind, model, text: None
        self._wishes, self._reload = wishes or Operator(), reload or Reload()
        self._reloads: set[asyncio.Task[Reloaded]] = set()

    async def wake(self, visitor: Visitor, name: str) -> Done:
        """Starts a replica of a model that sleeps, or lets one that is parked have its memory, as a request would.

        Raises AdminOnly, ModelNotFound, and Conflict if the model cannot be woken.
        """
        model = await self._found(visitor, name)
        if model.state in ("failed", "stopping"):
            why = f"has failed: {model.message}" if model.state == "failed" else "is being removed"
            raise Conflict(f"The model '{model.name}' cannot be woken, because it {why}", param="model")
        if model.state == "loading":
            return Done(model.name, False, f"'{model.name}' is loading already.")
        if model.state == "asleep":
            self._waker.wake(model.name)
            return self._begun(visitor, model.name, "scaled", f"'{model.name}' starts, because an admin has woken it.")
        before = await _asked(self._wishes.wake(model.application))
        if before in (None, "resident"):
            return Done(model.name, False, f"'{model.name}' is ready already.")
        text = f"'{model.name}' becomes resident, because an admin has woken it."
        return self._begun(visitor, model.name, "swapped", text, model.application)

    async def park(self, visitor: Visitor, name: str) -> Done:
        """Makes a model that shares memory give it back once its requests have ended, also if nobody needs it.

        Raises AdminOnly, ModelNotFound, and Conflict if the model shares no memory.
        """
        model = await self._found(visitor, name)
        before = await _asked(self._wishes.park(model.application))
        if before is None:
            if model.state == "asleep":
                return Done(model.name, False, f"'{model.name}' has no replica, so it holds no memory.")
            raise Conflict(
                f"The model '{model.name}' shares its memory with no other one, so it cannot be parked. "
                f"{HOW_TO_GIVE_BACK}",
                param="model",
            )
        if not any(state in ("resident", "waking") for state in before):
            return Done(model.name, False, f"'{model.name}' has given back its memory already, or is about to.")
        text = f"'{model.name}' gives back its memory once its requests have ended, because an admin has parked it."
        return self._begun(visitor, model.name, "swapped", text, model.application)

    async def reload(self, visitor: Visitor) -> dict[str, Any]:
        """Has the config file read again, checked and deployed. Returns the file, its node, and what changes. It also
        goes on when the visitor leaves, because the file is deployed then too.

        Raises AdminOnly, and what `Reload` raises.
        """
        require_all_models(visitor)
        self._note(visitor, "config", "", "An admin has asked for the config file to be read again.")
        task = asyncio.create_task(self._reloaded(visitor))
        self._reloads.add(task)
        task.add_done_callback(self._was_reloaded)
        done = await asyncio.shield(task)
        return {"file": done.file, "node": done.node, "changes": list(done.lines)}

    async def _reloaded(self, visitor: Visitor) -> Reloaded:
        """Reads the file again and notes what has come of it. The reason of a failure is in the answer and in the log
        alone, because it may have lines of the file, and every key sees the event."""
        try:
            done: Reloaded = await self._reload(_who(visitor.key))
        except Exception as error:
            logger.warning("The console could not have the config file read again: %s", error)
            text = (
                "The config file is wrong, so nothing was changed."
                if isinstance(error, InvalidRequest)
                else "The config file was not read again, or not to the end. The log of the router says why."
            )
            self._note(visitor, "config", "", text)
            raise
        count = len(done.lines)
        changes = "and nothing changes" if not count else f"and {count} change{'s follow' if count > 1 else ' follows'}"
        self._note(visitor, "config", "", f"The config file was read again, {changes}, because an admin asked for it.")
        return done

    def _was_reloaded(self, task: "asyncio.Task[Reloaded]") -> None:
        self._reloads.discard(task)
        if not task.cancelled():
            task.exception()  # Its visitor may have left.

    async def _found(self, visitor: Visitor, name: str) -> ModelStatus:
        """Returns the model for an admin, who must also be one of its base model if it is an adapter, since the base
        model is what acts. A key learns nothing of models that it may not use."""
        require_admin(visitor)
        key = visitor.key
        with suppress(ModelNotFound):  # Its message names all models.
            model = await self._models.find(self._alias_of(name))
            if key is None or key.may_use(model.asked):
                if key is not None and not key.may_use(Asked(model.application)):
                    raise AdminOnly(
                        f"'{model.name}' is an adapter, and the API key '{key.name}' may not use its base model, which "
                        "is woken and parked with all of its adapters. Use the key of an admin of the base model."
                    )
                return model
        raise ModelNotFound(f"There is no model '{name[:200]}' here that you may use.", param="model")

    def _begun(self, visitor: Visitor, name: str, kind: Kind, text: str, application: str = "") -> Done:
        self._note(visitor, kind, application or name, text)
        return Done(name, True, text)

    def _note(self, visitor: Visitor, kind: Kind, model: str, text: str) -> None:
        self.note(kind, model, text)
        logger.info("The console, for %s: %s", _who(visitor.key), text)


def possible(model: ModelStatus, states: Sequence[str]) -> list[str]:
    """Returns what an admin could do with a model now. `states` are those of its replicas if it shares memory."""
    has_memory = any(state in ("resident", "waking") for state in states)
    can = ["park"] if has_memory else []
    if model.state == "asleep" or (model.state == "ready" and states and not has_memory):
        can.append("wake")
    return can


def require_all_models(visitor: Visitor) -> None:
    """Raises AdminOnly unless the visitor is an admin of all models, since what is asked for concerns all of them."""
    require_admin(visitor)
    if visitor.key is not None and not may_all(visitor.is_admin, visitor.key):
        raise AdminOnly(
            f"The API key '{visitor.key.name}' is an admin of some models, and this concerns all of them. Use a key "
            "with role: admin and without models."
        )


def may_all(is_admin: bool, key: ApiKey | None) -> bool:
    """Returns whether an admin with this key, or without any where none is needed, may do what concerns all models."""
    return is_admin and (key is None or key.models is None)


def _who(key: ApiKey | None) -> str:
    return "a visitor of the console" if key is None else f"the key '{key.name}'"


async def _asked(wish: Any) -> Any:
    """Returns what the keepers say. Raises Conflict if one does not answer."""
    try:
        return await wish
    except KeeperSilent as error:
        raise Conflict(str(error)) from None
