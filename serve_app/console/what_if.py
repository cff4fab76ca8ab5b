"""Plans what a visitor has sent, beside what the cluster runs.

Planning takes seconds of a processor and reads files that the text names, so each plan runs in a process of its own
(`cli/plan/what_if.py`), which is ended with all that it has started when it takes too long or its visitor leaves. The
router only reads what runs, in a thread, once for all who ask at about the same time.
"""

import asyncio
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from serve_app.access.keys import ENVIRONMENT
from serve_app.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    RequestError,
    RequestTooLarge,
    nearest,
)
from serve_app.facts.inventory import Inventory
from serve_app.status.beside import Running
from serve_app.status.running import read_running
from serve_app.status.served_file import ServedFiles
from serve_app.wire.openai_errors import read_json

logger = logging.getLogger("ray.serve")

PLANNER = "serve_app.cli.plan.what_if"
MOST_BODY_BYTES = 256 * 2**10
MOST_AT_ONCE = 2
TIMEOUT_S = 60.0
MOST_MEMORY_BYTES = 2 * 2**30
# Who finds both places taken is told to come again after so many seconds.
RETRY_S = 5.0
# What runs is read again for a plan if it was read longer ago than so many seconds.
FRESH_S = 5.0
# A process that was killed has this many seconds to be gone.
END_S = 10.0
# Fields of one model that is sent without a file. All but `model` are as in a file.
MODEL_FIELDS = (
    "model", "infer_backend", "num_gpus", "max_model_len", "max_num_seqs", "max_memory", "quantization", "dtype",
    "tensor_parallel_size",
)  # fmt: skip
MOST_NAME = 1024
# The planner exits so if what it was sent is wrong, and has said what.
WRONG = 2


@dataclass(frozen=True)
class PlanJob:
    """This is what is to be planned: a config file, or the `args` of one model without a file, neither of which was
    checked. The devices and what runs there are those of the cluster. `served` is the name and the text of the file
    that `serve-app run` serves, or None. A plan takes some hundred megabytes, and its process may hold
    `most_memory_bytes`."""

    inventory: Inventory
    running: Running
    yaml: str | None = None
    args: Mapping[str, Any] | None = None
    most_memory_bytes: int = MOST_MEMORY_BYTES
    served: tuple[str, str] | None = None


Run = Callable[[PlanJob], Awaitable[bytes]]


class WhatIf:
    """Plans for one router replica. `read` returns the devices and what runs there, `served` returns the name and the
    text of the file that is served, for which both may block, and `run` makes the plan."""

    def __init__(
        self,
        read: Callable[[], tuple[Inventory, Running]] = read_running,
        run: Run | None = None,
        served: Callable[[], tuple[str, str] | None] | None = None,
    ):
        self._read, self._run, self._served = read, run or run_planner, served or ServedFiles().text
        self._reading: asyncio.Future[tuple[Inventory, Running]] | None = None
        self._read_at = float("-inf")
        self._at_once = 0

    async def answer(self, body: bytes) -> bytes:
        """Returns the JSON of a plan for what a visitor has sent. It ends its process when it is cancelled.

        Raises RequestTooLarge, InvalidRequest with all that is wrong, Overloaded, DeadlineExceeded, and
        ModelUnavailable while the cluster does not say what runs.
        """
        yaml, args = asked_for(body)
        if self._at_once >= MOST_AT_ONCE:
            raise Overloaded(
                f"{MOST_AT_ONCE} plans are being made already. Try again in a moment.", retry_after_s=RETRY_S
            )
        self._at_once += 1
        try:
            async with asyncio.timeout(TIMEOUT_S):
                inventory, running = await self._facts()
                served = None if args is None else await self._served_file()
                return await self._run(PlanJob(inventory, running, yaml, args, served=served))
        except TimeoutError:
            raise DeadlineExceeded(
                f"The plan was not made within {TIMEOUT_S:g} s. Plan fewer models at once, or use `serve-app plan FILE "
                "--beside-running` on the server."
            ) from None
        finally:
            self._at_once -= 1

    async def _facts(self) -> tuple[Inventory, Running]:
        """Returns what was read last, or reads it. A visitor who leaves does not end the reading of others."""
        if self._reading is None or (self._reading.done() and time.monotonic() - self._read_at > FRESH_S):
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read))
            self._reading.add_done_callback(self._was_read)
        try:
            return await asyncio.shield(self._reading)
        except Exception as error:  # A node or Ray's head may be restarting, and Ray raises several kinds then.
            self._reading = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelUnavailable(f"The cluster did not say what it runs: {reason}", retry_after_s=RETRY_S) from None

    async def _served_file(self) -> tuple[str, str] | None:
        """Returns the file that is served. The plan is made without it if Ray's head does not answer."""
        try:
            return await asyncio.to_thread(self._served)
        except Exception as error:  # As above, Ray raises several kinds.
            logger.warning("A plan is made without the file that is served: %s", error)
            return None

    def _was_read(self, reading: "asyncio.Future[tuple[Inventory, Running]]") -> None:
        self._read_at = time.monotonic()
        if not reading.cancelled():
            reading.exception()  # Nobody may be waiting for it any more.


def asked_for(body: bytes) -> tuple[str | None, dict[str, Any] | None]:
    """Returns the config file that a body has, or else the fields of its model. Raises RequestTooLarge and
    InvalidRequest."""
    if len(body) > MOST_BODY_BYTES:
        raise RequestTooLarge(f"The body has {len(body)} bytes, but a plan takes at most {MOST_BODY_BYTES}.")
    try:
        fields = read_json(body)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {' '.join(str(error).split())[:200]}.") from None
    if not isinstance(fields, dict):
        raise InvalidRequest('The body must be a JSON object: {"yaml": "…"} or {"model": "…"}.')
    if "yaml" in fields:
        for other in fields.keys() - {"yaml"}:
            raise InvalidRequest(f"The field '{other[:100]}' has no place beside 'yaml'. Write it there.", param="yaml")
        return _text(fields, "yaml", MOST_BODY_BYTES), None
    for name in fields:
        if name not in MODEL_FIELDS:
            hint = nearest(name[:100], MODEL_FIELDS) or f" Known fields: yaml, or {', '.join(MODEL_FIELDS)}."
            raise InvalidRequest(f"unknown field '{name[:100]}'.{hint}")
    if "model" not in fields:
        raise InvalidRequest("Send the field 'yaml' with a config file, or 'model' with an id or a folder.")
    _text(fields, "model", MOST_NAME)
    return None, {name: value for name, value in fields.items() if value is not None}


def _text(fields: Mapping[str, Any], name: str, most: int) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise InvalidRequest(f"The field '{name}' must be a text.", param=name)
    if not value.strip():
        what = "Name a model: its id on the hub, or a folder of the server." if name == "model" else "Send a file."
        raise InvalidRequest(f"The field '{name}' is empty. {what}", param=name)
    if len(value) > most:
        raise InvalidRequest(f"The field '{name}' has {len(value)} characters, but takes at most {most}.", param=name)
    return value


async def run_planner(job: PlanJob) -> bytes:
    """Returns what the planner's process answers. It ends with all that it has started, whatever happens here. Raises
    InvalidRequest with what it says of a wrong file, and RequestError if it fails."""
    with tempfile.TemporaryDirectory(prefix="serve-app-plan-") as folder:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", PLANNER, cwd=folder, env=_environment(), start_new_session=True,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = await process.communicate(pickle.dumps(job))
        finally:
            await asyncio.shield(_end(process))
    if process.returncode == WRONG:
        raise InvalidRequest(out.decode(errors="replace").strip())
    if process.returncode != 0:
        last = " ".join(err.decode(errors="replace").split())[-1000:]
        logger.error("A plan of the console has failed with %s: %s", process.returncode, last)
        raise RequestError(
            "The plan has failed, and the log of the router says why. Tell the operator of this service."
        )
    return out


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(END_S):
            await process.wait()


def _environment() -> dict[str, str]:
    """Returns this process's environment without API keys."""
    return {name: value for name, value in os.environ.items() if name != ENVIRONMENT}
