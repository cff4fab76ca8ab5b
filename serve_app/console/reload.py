"""Has the config file read again by the process of `serve-app run` that serves it."""

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from ray.exceptions import RayError

from serve_app.errors import Conflict, DeadlineExceeded, InvalidRequest, ModelUnavailable, Overloaded
from serve_app.status.served_file import Outcome, ServedFile, ServedFiles

logger = logging.getLogger("ray.serve")

# These are seconds. The process looks for wishes every two seconds, and less often while Serve does not answer it.
LOOK_S, HEARD_S, OUTCOME_S = 0.2, 30.0, 180.0
RETRY_S = 5.0
INSTEAD = "Deploy the changed file with `serve deploy FILE`"


@dataclass(frozen=True)
class Reloaded:
    """This is a file that was read again, with a line for each application that changes."""

    file: str
    node: str
    lines: tuple[str, ...]


class Reload:
    """Asks for one reading at a time, for one router replica. Times are in seconds."""

    def __init__(self, files: ServedFiles | None = None, heard_s: float = HEARD_S, outcome_s: float = OUTCOME_S):
        self._files = files or ServedFiles()
        self._heard_s, self._outcome_s = heard_s, outcome_s
        self._is_busy = False

    async def __call__(self, by: str) -> Reloaded:
        """Returns what has changed, for who is called so.

        Raises InvalidRequest with all mistakes of the file, which has changed nothing then, and Conflict if no process
        serves a file or if Serve runs applications that would end. Raises Overloaded, DeadlineExceeded, and
        ModelUnavailable while Ray's head does not answer.
        """
        if self._is_busy:
            raise Conflict("The config file is being read already. Wait until that is done.")
        self._is_busy = True
        try:
            served = await asyncio.to_thread(self._files.served)
            if served is None:
                raise Conflict(
                    "No process serves a config file here, because the models were not deployed by `serve-app run "
                    f"FILE`, or it has ended. {INSTEAD}."
                )
            outcome = await self._outcome(served, by)
        except (RayError, RuntimeError) as error:
            raise ModelUnavailable(f"Ray's head does not answer: {error}", retry_after_s=RETRY_S) from None
        finally:
            self._is_busy = False
        if outcome.problem:
            raise (Conflict if outcome.is_conflict else InvalidRequest)(outcome.problem)
        return Reloaded(Path(served.file).name, served.node, outcome.lines)

    async def _outcome(self, served: ServedFile, by: str) -> Outcome:
        asking = asyncio.ensure_future(asyncio.to_thread(self._files.ask, served.token, by))
        try:
            wish = await asyncio.shield(asking)
            if wish is None:
                raise Overloaded("Too many wait for the config file to be read.", retry_after_s=RETRY_S)
            begun = time.monotonic()
            while time.monotonic() - begun < self._outcome_s:
                await asyncio.sleep(LOOK_S)
                outcome = await asyncio.to_thread(self._files.outcome, served.token, wish)
                if outcome is not None:
                    return outcome
                is_late = time.monotonic() - begun > self._heard_s
                if is_late and await asyncio.to_thread(self._files.waits, served.token, wish):
                    raise Conflict(
                        f"The process {served.pid} of `{served.command}` on {served.node}, which serves {served.file}, "
                        f"does not answer. It may have been killed. {INSTEAD}, or run it again."
                    )
        finally:
            await asyncio.shield(self._withdraw(served.token, asking))
        raise DeadlineExceeded(
            f"`{served.command}` on {served.node} has not read {served.file} within {self._outcome_s:g} s. Its "
            "terminal says what it does."
        )

    async def _withdraw(self, token: str, asking: "asyncio.Future[str | None]") -> None:
        """Takes back a wish, which a thread may still be writing if who asked has left."""
        try:
            wish = await asking
        except Exception:
            return  # It was not written, and who asked is told.
        if wish is not None:
            await asyncio.to_thread(self._files.withdraw, token, wish)
