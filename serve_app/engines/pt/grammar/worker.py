"""The processes in which xgrammar works: run as `python worker.py CONTROL_FD`.

Compiling a format and following it take as long as the client who wrote it likes, and nothing inside xgrammar ends
that. So it happens where the kernel can end it. This process reads the tokenizer from its standard input and then
forks one child for each socket that arrives on its control socket: starting Python and xgrammar takes seconds, a fork
takes milliseconds. A child compiles one format and follows it for all sequences that ask for it.

Laws: a child is killed when one piece of work takes more processor time than it may, or when it needs more memory. It
ends when its socket closes, and all of them end with the replica.

Messages of a child, each one packet: the format comes in, its kind, a line break and its source, and its first mask
goes out. Then come `REQUEST` packets, a sequence's number and its next token, and for each goes out the mask for the
token after it. The token END only forgets the sequence. What goes out is `REPLY` and the mask's bytes, or a sentence
that says why there is none.
"""

import ctypes
import gc
import os
import resource
import signal
import socket
import struct
import sys
import time
import types
from typing import Any

import numpy

REQUEST = struct.Struct("<Qi")
REPLY = struct.Struct("<Q?")
END = -1
FIRST = 0  # The number of the reply that has the first mask; sequences begin at 1.

# Seconds of processor time for compiling and the first mask, and for any later mask.
COMPILE_SECONDS = 3.0
MASK_SECONDS = 0.5
# Those that one sequence's masks may take together: at first, and for each token. Usual are 0.00002 to 0.0001 a token.
FREE_SECONDS = 0.5
SECONDS_PER_TOKEN = 0.002
# What a child may need beyond what it has when it is forked.
MEMORY_BYTES = 128 * 2**20
# The engine goes first: formats wait while the processor is short.
NICENESS = 10
# Between two tokens of JSON: room for a line break and its indentation, but not for a model that only writes spaces.
MOST_WHITESPACE = 24
# A packet holds the longest format (grammar.MOST_BYTES), and the mask of a million tokens. The kernel's own bound on a
# packet is 208 KiB.
PACKET_BYTES = 2**17

TOO_SLOW = "The output format takes too long to follow: its grammar is ambiguous. Make it simpler."
NO_TEXT = "The output format allows no text, or none that this model's vocabulary can write."


def main(control: socket.socket) -> None:
    """Forks a child for each socket that arrives, until `control` closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the replica, which closes the socket.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel clears children away.
    xgrammar = _import_xgrammar()
    info = xgrammar.TokenizerInfo.deserialize_json(sys.stdin.buffer.read().decode())
    gc.freeze()
    control.send(b"ready")
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            control.close()
            try:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with this process.
                _follow(socket.socket(fileno=descriptors[0]), xgrammar, info)
            finally:
                os._exit(0)  # Whatever happened: nothing of the parent's may run here.
        os.close(descriptors[0])


def _follow(connection: socket.socket, xgrammar: Any, info: Any) -> None:
    """The life of a child."""
    os.nice(NICENESS)
    space = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + MEMORY_BYTES  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    bitmask = numpy.zeros((1, -(-info.vocab_size // 32)), dtype=numpy.int32)

    def mask(matcher: Any) -> tuple[bool, bytes]:
        matcher.fill_next_token_bitmask(bitmask)
        return (True, bitmask.tobytes()) if bitmask.any() else (False, NO_TEXT.encode())

    kind, _, source = connection.recv(PACKET_BYTES).decode().partition("\n")
    _limit(COMPILE_SECONDS)
    try:
        compiled = _compile(xgrammar.GrammarCompiler(info, max_threads=1), kind, source)
        reply = mask(xgrammar.GrammarMatcher(compiled))
    except RuntimeError as error:
        reply = False, _reason(error).encode()
    _limit(0)
    connection.send(REPLY.pack(FIRST, reply[0]) + reply[1])
    sequences: dict[int, _Sequence] = {}
    while request := connection.recv(REQUEST.size):
        number, token = REQUEST.unpack(request)
        if token == END:
            sequences.pop(number, None)
            continue
        sequence = sequences.setdefault(number, _Sequence(xgrammar.GrammarMatcher(compiled)))
        _limit(MASK_SECONDS)
        reply = sequence.next(token, mask)
        _limit(0)
        connection.send(REPLY.pack(number, reply[0]) + reply[1])


def _import_xgrammar() -> Any:
    """xgrammar without torch and transformers, which it imports and whose help nothing here needs: 60 MB and half a
    second of processor time, and not 290 MB and four seconds."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # tvm_ffi does without.
    import tvm_ffi  # noqa: F401

    for name in ("torch", "transformers"):
        sys.modules[name] = _Absent(name)
    import xgrammar

    return xgrammar


class _Absent(types.ModuleType):
    """A module whose every name is an empty class: good for annotations, and for nothing else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *arguments, **named: None})


class _Sequence:
    """xgrammar's matcher of one sequence, and the processor time that it has taken."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._allowed = FREE_SECONDS

    def next(self, token: int, mask: Any) -> tuple[bool, bytes]:
        start = time.process_time()
        try:
            accepted = self._matcher.accept_token(token)
            reply: tuple[bool, bytes] = mask(self._matcher) if accepted else (False, NO_TEXT.encode())
        except RuntimeError as error:
            return False, f"The output format cannot be followed: {' '.join(str(error).split())[:200]}".encode()
        self._allowed += SECONDS_PER_TOKEN - (time.process_time() - start)
        return reply if self._allowed > 0 else (False, TOO_SLOW.encode())


def _compile(compiler: Any, kind: str, source: str) -> Any:
    if kind == "regex":
        return compiler.compile_regex(source)
    if kind == "grammar":
        return compiler.compile_grammar(source)
    return compiler.compile_json_schema(source, max_whitespace_cnt=MOST_WHITESPACE)


def _reason(error: RuntimeError) -> str:
    text = str(error).partition("] ")[2].partition(": ")[2].strip() or str(error)
    if "bad_alloc" in text:
        return "The format needs more memory than it may. Make it simpler."
    return f"The format is not understood: {text[:300]}"


def _limit(seconds: float) -> None:
    """The kernel ends this process after so much processor time; 0 is without a limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
