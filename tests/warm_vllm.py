"""One process that has imported vLLM and answers calls of tests, each in a fork of it.

Importing vLLM takes ten CPU-seconds, and tests ask it in half a dozen places. So `WarmVllm` starts one process that
imports torch and transformers. It forks a process for each of the rules of `vllm_meta_model.prepare` ("cuda" and
"cpu"), which have different platforms and import vLLM once each. Every call runs in a fork of that one, so nothing that
a call changes in vLLM is there for the next one.

A call names a function of this repository by its module and name. Its arguments and its result are JSON. The processes
end when the tests' end of the pipe is closed, and all of them are killed if a call takes longer than its time.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from serve_app.engines.vllm.vllm_meta_model import ENVIRONMENT

ROOT = Path(__file__).parents[1]
# What building a model imports, beside vLLM's configuration. A fork imports again what its parent did not.
IMPORTED = (
    "vllm.config",
    "vllm.engine.arg_utils",
    "vllm.model_executor.model_loader.utils",
    "vllm.v1.worker.gpu.attn_utils",
    "vllm.v1.core.kv_cache_utils",
)
# Of what a call that failed has printed, this many letters are reported.
MOST_PRINTED = 3000
CLOSE_S = 20.0


class WarmVllm:
    """The process as tests see it. Processes start at the first call that needs them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, rules: str, function: str, *arguments: Any, timeout_s: float) -> Any:
        """Returns what `function` ("module:name") returns where vLLM is prepared by `rules`. Raises AssertionError with
        the traceback and the end of what was printed if it raises, crashes, or takes longer than `timeout_s` seconds,
        imports included."""
        process = self._started()
        assert process.stdin is not None
        request = {"rules": rules, "function": function, "arguments": arguments}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer = json.loads(self._line(process, function, timeout_s))
        assert "failure" not in answer, f"{function} by the rules of {rules!r}:\n{answer['failure']}"
        return answer["result"]

    def close(self) -> None:
        """Ends the processes, and waits until all of them are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            _kill_session(process)
        process.stdout.close()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm_vllm"], cwd=ROOT, env=os.environ | ENVIRONMENT,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
            )  # fmt: skip
        return self._process

    def _line(self, process: "subprocess.Popen[bytes]", function: str, timeout_s: float) -> bytes:
        """Returns the next line of the answers."""
        assert process.stdout is not None
        deadline, parts = time.monotonic() + timeout_s, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not parts.endswith(b"\n"):
                is_ready = selector.select(max(0.0, deadline - time.monotonic()))
                part = os.read(process.stdout.fileno(), 2**20) if is_ready else b""
                if not part:
                    _kill_session(process)
                    why = "the warm process ended" if is_ready else f"no answer within {timeout_s:g} s"
                    raise AssertionError(f"{function}: {why}")
                parts += part
        return bytes(parts)


def _kill_session(process: "subprocess.Popen[bytes]") -> None:
    """Kills the process and its forks, which share its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(CLOSE_S)


def main() -> None:
    """Hands each request of stdin to the process of its rules, until stdin is closed. Answers go to what stdout was,
    and all that libraries print goes to stderr."""
    replies = os.dup(1)
    os.dup2(2, 1)
    import torch  # noqa: F401
    import transformers  # noqa: F401

    by_rules: dict[str, IO[bytes]] = {}
    for line in sys.stdin.buffer:
        rules = json.loads(line)["rules"]
        if rules not in by_rules:
            by_rules[rules] = _forked_for(rules, replies)
        by_rules[rules].write(line)
        by_rules[rules].flush()
    for requests in by_rules.values():
        requests.close()
    for _ in by_rules:  # The youngest ends first, since it has the older ones' pipes open too.
        os.wait()


def _forked_for(rules: str, replies: int) -> IO[bytes]:
    """Forks the process of these rules, and returns the pipe that it reads requests from."""
    receiver, sender = os.pipe()
    if os.fork():
        os.close(receiver)
        return os.fdopen(sender, "wb")
    os.close(sender)
    try:
        _serve(rules, receiver, replies)
    finally:
        os._exit(0)


def _serve(rules: str, receiver: int, replies: int) -> None:
    """Imports vLLM, and answers each request in a fork until nobody can send one."""
    with os.fdopen(receiver, "rb") as requests:
        failure = ""
        try:
            import_module("serve_app.engines.vllm.vllm_meta_model").prepare(rules)
            for name in IMPORTED:
                import_module(name)
        except BaseException:
            failure = traceback.format_exc()
        for line in requests:
            _write(replies, {"failure": failure} if failure else _answer_of_fork(json.loads(line)))


def _answer_of_fork(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the call in a fork, and returns its result, or why there is none."""
    with tempfile.TemporaryFile() as answered, tempfile.TemporaryFile() as printed:
        child = os.fork()
        if not child:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            _write(answered.fileno(), _called(request))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        answered.seek(0)
        text = answered.read()
        crashed = {"failure": f"its process ended with {os.waitstatus_to_exitcode(status)}"}
        answer: dict[str, Any] = json.loads(text) if text else crashed
        if "failure" in answer:
            printed.seek(0)
            answer["failure"] += "\n" + printed.read().decode(errors="replace")[-MOST_PRINTED:]
    return answer


def _called(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a call, or its traceback."""
    try:
        module, name = request["function"].split(":")
        return {"result": json.loads(json.dumps(getattr(import_module(module), name)(*request["arguments"])))}
    except BaseException:
        return {"failure": traceback.format_exc()}


def _write(file: int, answer: dict[str, Any]) -> None:
    """Writes one line. A pipe may take less than all of it at once."""
    rest = memoryview(json.dumps(answer).encode() + b"\n")
    while rest:
        rest = rest[os.write(file, rest) :]


if __name__ == "__main__":
    main()
