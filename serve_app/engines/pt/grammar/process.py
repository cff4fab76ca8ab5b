"""The engine's side of the processes in which formats are compiled and followed (`worker`).

One process a format: what a format takes, in time and memory, is taken from those who ask for the same one.
"""

import itertools
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref

from serve_app.engines.pt.grammar import worker
from serve_app.engines.pt.grammar.worker import END, FIRST, PACKET_BYTES, REPLY, REQUEST, TOO_SLOW

# Seconds until Python and xgrammar have started, on a machine that is busy.
START_SECONDS = 120.0

ENDED = f"{TOO_SLOW[:-1]}, or ask for less: it needed more time or memory than a format may."


class GrammarError(Exception):
    """A format that cannot be followed; the text is a sentence for the client."""


class Grammar:
    """One compiled format and its process, which ends when nobody holds this any more.

    Only `GrammarServer` makes it. The matchers belong to one thread, the engine's.
    """

    def __init__(self, connection: socket.socket, first_mask: bytes):
        self.first_mask = first_mask
        self._connection = connection
        weakref.finalize(self, connection.close)
        self._numbers = itertools.count(FIRST + 1)
        self._matchers: weakref.WeakValueDictionary[int, Matcher] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def matcher(self) -> "Matcher":
        """Follows the format for one sequence. Call its `close` at the end."""
        with self._lock:
            matcher = Matcher(self, next(self._numbers))
            self._matchers[matcher.number] = matcher
        return matcher

    def forget(self, number: int) -> None:
        """A sequence has ended."""
        self._matchers.pop(number, None)
        self._send(number, END)

    def accept(self, number: int, token: int) -> None:
        """Asks for the mask after `token`."""
        if not self._send(number, token):
            self._ended()

    def collect(self, wait_s: float) -> None:
        """Hands out the masks that have come; waits for one at most `wait_s` seconds."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while poll.poll(1000 * wait_s):
            try:
                packet = self._connection.recv(PACKET_BYTES)
            except OSError:
                packet = b""
            if not packet:
                self._ended()
                return
            number, is_mask = REPLY.unpack_from(packet)
            if (matcher := self._matchers.get(number)) is not None:
                matcher.receive(is_mask, packet[REPLY.size :])
            wait_s = 0

    def _send(self, number: int, token: int) -> bool:
        try:
            self._connection.send(REQUEST.pack(number, token), socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def _ended(self) -> None:
        for matcher in list(self._matchers.values()):
            matcher.receive(False, ENDED.encode())


class Matcher:
    """Which tokens may come next in one sequence. `problem` is a sentence once there is no way on.

    `mask` is a bit for each token, in int32 words as xgrammar has them; None while it is being computed.
    """

    def __init__(self, grammar: Grammar, number: int):
        self.number = number
        self.problem = ""
        self.mask: bytes | None = grammar.first_mask
        self.was_late = False
        self._grammar = grammar

    def accept(self, token: int) -> None:
        """Takes the next token; its mask comes later."""
        self.mask = None
        self._grammar.accept(self.number, token)

    def is_ready(self, until: float) -> bool:
        """Whether there is a mask or a problem. Waits for it until that time (`time.monotonic`), and only once:
        a sequence whose mask was late is not waited for again."""
        is_patient = not self.was_late and until > time.monotonic()
        while self.mask is None and not self.problem:
            wait_s = until - time.monotonic() if is_patient else 0.0
            self._grammar.collect(max(0.0, wait_s))
            if wait_s <= 0 and self.mask is None and not self.problem:
                self.was_late |= is_patient
                return False
        return True

    def receive(self, is_mask: bool, content: bytes) -> None:
        """The process has answered."""
        if is_mask:
            self.mask = content
        else:
            self.problem = content.decode()

    def close(self) -> None:
        """The sequence has ended."""
        self._grammar.forget(self.number)


class GrammarServer:
    """The process that forks one for each format. `tokenizer` is xgrammar's `TokenizerInfo` as JSON.

    Starting it takes seconds, so it is not for the event loop. Its methods may be called from any thread.
    """

    def __init__(self, tokenizer: str):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def open(self, kind: str, source: str, wait_s: float) -> Grammar:
        """Compiles a format. Raises GrammarError, and TimeoutError where there was no time for it in `wait_s`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._fork(theirs)
                ours.send(f"{kind}\n{source}".encode())
                ours.settimeout(wait_s)
            except BaseException:
                ours.close()
                raise
        try:
            packet = ours.recv(PACKET_BYTES)
        except TimeoutError:
            ours.close()
            raise
        except OSError:
            packet = b""
        if not packet or not REPLY.unpack_from(packet)[1]:
            ours.close()
            raise GrammarError(packet[REPLY.size :].decode() if packet else ENDED)
        return Grammar(ours, packet[REPLY.size :])

    def close(self) -> None:
        """Ends the process. Those of the formats end when nobody holds them."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None

    def _fork(self, connection: socket.socket) -> None:
        with self._lock:
            for is_last in (False, True):
                if self._control is None:
                    self._start()
                assert self._control is not None, "it was started"
                try:
                    socket.send_fds(self._control, [b"f"], [connection.fileno()])
                    return
                except OSError:  # Somebody has killed it.
                    self._end()
                    if is_last:
                        raise

    def _start(self) -> None:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile("w+", encoding="utf-8") as tokenizer:
            tokenizer.write(self._tokenizer)
            tokenizer.seek(0)
            command = [
                sys.executable,
                "-P",
                worker.__file__,
                str(theirs.fileno()),
            ]  # -P: not its folder's modules
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            }
            self._process = subprocess.Popen(  # noqa: S603  our own module
                command, stdin=tokenizer, pass_fds=[theirs.fileno()], env=environment, start_new_session=True
            )
        control.settimeout(START_SECONDS)
        self._control = control
        if control.recv(16) != b"ready":
            self._end()
            raise RuntimeError("the process for output formats did not start; its error is in this replica's log")
        control.settimeout(None)
