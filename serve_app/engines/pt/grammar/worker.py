"""Runs the processes in which xgrammar works, as `python worker.py CONTROL_FD`.

Compiling a format and following it take as long as the client who wrote it likes, and nothing inside xgrammar ends
that. So it happens where the kernel can end it. This process reads the tokenizer from its standard input and then
forks one child for each socket that arrives on its control socket, because starting Python and xgrammar takes seconds
and a fork takes milliseconds. A child compiles one format and follows it for all sequences that ask for it.

These are its laws: a child is killed when one piece of work takes more processor time than it may, and gets no more
memory than it may have. It ends when its socket closes, and all of them end with the replica.

Each message of a child is one packet. The format comes in as its kind, a line break and its source, and its first mask
goes out. Then `REQUEST` packets come in, each with a sequence's number and its next token, and for each the mask for
the token after it goes out, in the order of the requests. The token END only forgets the sequence, and nothing goes
out. A reply is `REPLY` and the mask's bytes, or a sentence that says why there is none. If a child has died of its
work, the process that forked it says so on the child's socket, under the number DEATH. If something else has killed it,
the socket closes without a message.
"""

import contextlib
import ctypes
import gc
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy

REQUEST = struct.Struct("<Qi")
REPLY = struct.Struct("<QB")
END = -1
FIRST = 0  # This number is of the reply with the first mask. Sequences begin at 1.
DEATH = 2**64 - 1
# A reply has a mask, or the reason why the format allows none, or why there is none although the format is sound.
MASK, REFUSED, UNAVAILABLE = range(3)

# These are seconds of processor time for compiling and the first mask, and for any later mask.
COMPILE_SECONDS = 3.0
MASK_SECONDS = 0.5
# One sequence's masks may take these seconds together: at first, and for each token. Usual are 0.00002 to 0.0001.
FREE_SECONDS = 0.5
SECONDS_PER_TOKEN = 0.002
# A child may need these bytes beyond what it has when it is forked: for its format, for each token that it follows, and
# in total. xgrammar keeps its states of every token for a rollback, and no setting ends that (`max_rollback_tokens` has
# no effect in 0.2). As measured with 0.2.8, a regular expression takes 70 bytes a token, strings of JSON take 160,
# objects 520, and lists of lists 1200.
MEMORY_BYTES = 128 * 2**20
BYTES_PER_TOKEN = 2048
MOST_MEMORY_BYTES = 512 * 2**20
# One sequence may add this to the child beside its tokens' share, so that it cannot use up what all of them have.
# xgrammar's lists double when they grow, which needs three times their size.
SEQUENCE_BYTES = MEMORY_BYTES // 4
# The engine goes first, and formats wait while processor time is short.
NICENESS = 10
# Between two tokens of JSON there may be a line break and its indentation, but a model may not write only spaces.
MOST_WHITESPACE = 24
# A packet holds the longest format (spec.MOST_BYTES), and the mask of a million tokens. The kernel's own bound on a
# packet is 208 KiB.
PACKET_BYTES = 2**17

TOO_SLOW = "The output format takes too long to follow: its grammar is ambiguous. Make it simpler."
TOO_LARGE = "The output format takes too much memory to follow: its grammar is ambiguous. Make it simpler."
NO_TEXT = "The output format allows no text, or none that this model's vocabulary can write."
FULL = "The requests that follow this output format now have used up its memory. Try again."

# A child's own work causes these signals: the end of its time, and xgrammar's end if it gets no memory or has an error.
# Any other signal comes from outside.
OWN_SIGNALS = frozenset({signal.SIGPROF, signal.SIGABRT, signal.SIGSEGV, signal.SIGFPE})
DIED = f"{TOO_SLOW[:-1]}, or ask for less: it needed more time or memory than a format may."

Reply = tuple[int, bytes]


def main(control: socket.socket) -> None:
    """Forks a child for each socket that arrives, and reaps those that have died, until `control` closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the replica, which closes the socket.
    xgrammar = _import_xgrammar()
    info = xgrammar.TokenizerInfo.deserialize_json(sys.stdin.buffer.read().decode())
    gc.freeze()
    deaths = _bell_of_deaths()
    poll = select.poll()
    for readable in (control, deaths):
        poll.register(readable, select.POLLIN)
    connections: dict[int, socket.socket] = {}  # These are the children's, by pid.
    control.send(b"ready")
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if deaths.fileno() in ready:
            deaths.recv(PACKET_BYTES)
            _bury(connections)
        if control.fileno() in ready:
            _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not descriptors:
                return
            connection = socket.socket(fileno=descriptors[0])
            try:
                pid = os.fork()
            except OSError:  # No memory or no process is left, so the format has to be asked for again.
                connection.close()
                continue
            if pid == 0:
                for other in (control, deaths, *connections.values()):  # Other processes read the ends of these.
                    other.close()
                _live(connection, xgrammar, info)
            connections[pid] = connection


def _bell_of_deaths() -> socket.socket:
    """Returns a socket that has bytes to read once a child has died."""
    deaths, bell = socket.socketpair()
    bell.setblocking(False)
    signal.set_wakeup_fd(bell.detach(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # An ignored signal would not be reported.
    return deaths


def _bury(connections: dict[int, socket.socket]) -> None:
    """Reaps the dead children, and reports each that has died of its work."""
    for pid in list(connections):
        dead, status = os.waitpid(pid, os.WNOHANG)
        if not dead:
            continue
        with connections.pop(pid) as connection:
            if os.waitstatus_to_exitcode(status) > 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in OWN_SIGNALS):
                # If nothing listens or has room for it, the end of the socket has to be enough.
                with contextlib.suppress(OSError):
                    connection.send(REPLY.pack(DEATH, REFUSED) + DIED.encode(), socket.MSG_DONTWAIT)


def _live(connection: socket.socket, xgrammar: Any, info: Any) -> NoReturn:
    """Runs a child until its end. It exits with 1 if its work has failed."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG ends it with its parent.
        os.nice(NICENESS)
        child = _Child(connection, xgrammar, info)
        child.compile()
        child.follow()
        status = 0
    finally:
        os._exit(status)  # Whatever happened, nothing of the parent's may run here.


class _Child:
    """Follows one format for all sequences that ask for it."""

    def __init__(self, connection: socket.socket, xgrammar: Any, info: Any):
        self._connection = connection
        self._xgrammar = xgrammar
        self._info = info
        self._bitmask = numpy.zeros((1, -(-info.vocab_size // 32)), dtype=numpy.int32)
        self._space = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
        self._sequences: dict[int, _Sequence] = {}
        self._followed = 0  # It counts the tokens of all sequences.

    def compile(self) -> None:
        """Reads the format and answers with its first mask."""
        kind, _, source = self._connection.recv(PACKET_BYTES).decode().partition("\n")
        self._bound_memory()
        with _limit(COMPILE_SECONDS):
            try:
                self._compiled = _compile(self._xgrammar.GrammarCompiler(self._info, max_threads=1), kind, source)
                reply = self._mask(self._xgrammar.GrammarMatcher(self._compiled))
            except (RuntimeError, MemoryError) as error:
                reply = REFUSED, _reason(error).encode()
        self._send(FIRST, reply)

    def follow(self) -> None:
        """Answers each token with the mask after it."""
        while request := self._connection.recv(REQUEST.size):
            number, token = REQUEST.unpack(request)
            if token == END:
                self._forget(number)
                continue
            self._followed += 1
            self._bound_memory()
            with _limit(MASK_SECONDS):
                reply = self._next(number, token)
            if reply[0] != MASK:
                self._forget(number)  # Its memory is free before the others go on.
            self._send(number, reply)

    def _next(self, number: int, token: int) -> Reply:
        try:
            if number not in self._sequences:
                self._sequences[number] = _Sequence(self._xgrammar.GrammarMatcher(self._compiled))
            return self._sequences[number].next(token, self._mask)
        except (RuntimeError, MemoryError) as error:
            if _is_of_memory(error):
                return UNAVAILABLE, FULL.encode()
            return REFUSED, f"The output format cannot be followed: {' '.join(str(error).split())[:200]}".encode()

    def _mask(self, matcher: Any) -> Reply:
        matcher.fill_next_token_bitmask(self._bitmask)
        return (MASK, self._bitmask.tobytes()) if self._bitmask.any() else (REFUSED, NO_TEXT.encode())

    def _forget(self, number: int) -> None:
        if (sequence := self._sequences.pop(number, None)) is not None:
            self._followed -= sequence.tokens

    def _send(self, number: int, reply: Reply) -> None:
        self._connection.send(REPLY.pack(number, reply[0]) + reply[1])

    def _bound_memory(self) -> None:
        own = min(MEMORY_BYTES + BYTES_PER_TOKEN * self._followed, MOST_MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (self._space + own, self._space + MOST_MEMORY_BYTES))


def _import_xgrammar() -> Any:
    """Returns xgrammar without torch and transformers, which it imports but nothing here needs. This takes 60 MB and
    half a second of processor time instead of 290 MB and four seconds."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # tvm_ffi does not need it.
    import tvm_ffi  # noqa: F401

    for name in ("torch", "transformers"):
        sys.modules[name] = _Absent(name)
    import xgrammar

    return xgrammar


class _Absent(types.ModuleType):
    """This is a module whose every name is an empty class, which is good only for annotations."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *arguments, **named: None})


class _Sequence:
    """Holds xgrammar's matcher of one sequence, and the processor time and memory that it has left."""

    def __init__(self, matcher: Any):
        self.tokens = 0
        self._matcher = matcher
        self._seconds = FREE_SECONDS
        self._bytes = float(SEQUENCE_BYTES)

    def next(self, token: int, mask: Callable[[Any], Reply]) -> Reply:
        """Returns the reply to its next token. Raises what xgrammar raises."""
        self.tokens += 1
        start, before = time.process_time(), _peak_bytes()
        reply = mask(self._matcher) if self._matcher.accept_token(token) else (REFUSED, NO_TEXT.encode())
        self._seconds += SECONDS_PER_TOKEN - (time.process_time() - start)
        self._bytes += BYTES_PER_TOKEN - (_peak_bytes() - before)  # Memory that others have freed costs nothing.
        if self._seconds <= 0:
            return REFUSED, TOO_SLOW.encode()
        return reply if self._bytes > 0 else (REFUSED, TOO_LARGE.encode())


def _compile(compiler: Any, kind: str, source: str) -> Any:
    if kind == "regex":
        return compiler.compile_regex(source)
    if kind == "grammar":
        return compiler.compile_grammar(source)
    return compiler.compile_json_schema(source, max_whitespace_cnt=MOST_WHITESPACE)


def _reason(error: RuntimeError | MemoryError) -> str:
    if _is_of_memory(error):
        return "The format needs more memory than is allowed. Make it simpler."
    text = str(error).partition("] ")[2].partition(": ")[2].strip() or str(error)
    return f"The format is not understood: {text[:300]}"


def _is_of_memory(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, MemoryError) or "bad_alloc" in str(error)


def _peak_bytes() -> int:
    """Returns the most memory that this process has had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Makes the kernel end this process if the work takes more than `seconds` of processor time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
