"""Is the engine's side of the processes in which formats are compiled and followed (`worker`).

Each format has a process, so what it takes in time and memory is taken only from those who ask for the same one.
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
from collections import deque

from serve_app.engines.pt.grammar import worker
from serve_app.engines.pt.grammar.worker import DEATH, END, FIRST, MASK, PACKET_BYTES, REFUSED, REPLY, REQUEST
from serve_app.errors import InvalidRequest, Overloaded, RequestError

# Python and xgrammar may take this many seconds to start on a busy machine.
START_SECONDS = 120.0
# After this many seconds, a client may ask again for a format whose process was lost. Compiling it again takes less.
LOST_RETRY_S = 1.0

LOST = "The process that followed this output format has ended before the text was complete. Try again."


class GrammarError(Exception):
    """The format cannot be followed. The text is a sentence for the client."""


class GrammarLostError(Exception):
    """The format's process has died, but not of its work, so the format may be as good as any other."""


class Grammar:
    """This is one compiled format and its process, which ends when nothing holds this object any more.

    Only `GrammarServer` makes it. The matchers belong to one thread, the engine's, and nothing that they do blocks it.
    What the process has no room for is sent later.
    """

    def __init__(self, connection: socket.socket, first_mask: bytes):
        self.first_mask = first_mask
        self._connection = connection
        connection.setblocking(False)
        weakref.finalize(self, connection.close)
        self._numbers = itertools.count(FIRST + 1)
        self._matchers: weakref.WeakValueDictionary[int, Matcher] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._unsent: deque[tuple[int, int]] = deque()  # It has at most a token and an end for each sequence.
        self._asked: deque[int] = deque()  # It has the sequences that wait for an answer, in order.
        self._cause = ""

    @property
    def has_ended(self) -> bool:
        """Returns whether its process has ended, even if that was not noticed yet. Any thread may call it."""
        poll = select.poll()
        poll.register(self._connection, 0)  # The other side's end is always reported.
        return bool(poll.poll(0))

    def matcher(self) -> "Matcher":
        """Returns a matcher that follows the format for one sequence. Call its `close` at the end."""
        with self._lock:
            matcher = Matcher(self, next(self._numbers))
            self._matchers[matcher.number] = matcher
        return matcher

    def forget(self, number: int) -> None:
        """Forgets a sequence that has ended."""
        self._matchers.pop(number, None)
        self._send(number, END)

    def accept(self, number: int, token: int) -> None:
        """Asks for the mask after `token`."""
        self._send(number, token)

    def collect(self, wait_s: float) -> None:
        """Hands out the masks that have come, and sends what there was no room for. It waits at most `wait_s` seconds
        for either."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if poll.poll(1000 * wait_s):
            self._receive()
            self._flush()

    def _send(self, number: int, token: int) -> None:
        self._unsent.append((number, token))
        self.collect(0)  # Even masks for ended sequences take the process's room.

    def _flush(self) -> None:
        while self._unsent:
            number, token = self._unsent[0]
            try:
                self._connection.send(REQUEST.pack(number, token))
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()  # The process has ended, which is read as well.
                return
            self._unsent.popleft()
            if token != END:
                self._asked.append(number)

    def _receive(self) -> None:
        while True:
            try:
                packet = self._connection.recv(PACKET_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:  # It comes once, before what was sent, if not all was read.
                continue
            if not packet:
                self._end()
                return
            number, kind = REPLY.unpack_from(packet)
            content = packet[REPLY.size :]
            if number == DEATH:
                self._cause = content.decode()
                continue
            self._asked.popleft()
            if (matcher := self._matchers.get(number)) is not None:
                matcher.receive(kind, content)

    def _end(self) -> None:
        """Tells all sequences. If the process died of its work, only the sequence that it worked for is to blame."""
        culprit = self._asked[0] if self._cause and self._asked else None
        for number, matcher in list(self._matchers.items()):
            matcher.problem = InvalidRequest(self._cause) if number == culprit else _try_again(LOST)


class Matcher:
    """Knows which tokens may come next in one sequence. `problem` is the client's error once none may come.

    `mask` has a bit for each token, in int32 words as in xgrammar. It is None while it is being computed. `was_late`
    says that the mask before this one was not ready when it was needed.
    """

    def __init__(self, grammar: Grammar, number: int):
        self.number = number
        self.problem: RequestError | None = None
        self.mask: bytes | None = grammar.first_mask
        self.was_late = False
        self._is_late = False
        self._grammar = grammar

    def accept(self, token: int) -> None:
        """Takes the next token, whose mask comes later."""
        self.was_late, self._is_late = self._is_late, False
        self.mask = None
        self._grammar.accept(self.number, token)

    def is_ready(self, until: float) -> bool:
        """Returns whether there is a mask or a problem, and waits for it until that time (`time.monotonic`).

        A sequence whose mask was late is not waited for again until one of its masks was in time.
        """
        is_patient = not (self.was_late or self._is_late) and until > time.monotonic()
        while self.mask is None and not self.problem:
            wait_s = until - time.monotonic() if is_patient else 0.0
            self._grammar.collect(max(0.0, wait_s))
            if wait_s <= 0 and self.mask is None and not self.problem:
                self._is_late = True
                return False
        return True

    def receive(self, kind: int, content: bytes) -> None:
        """Takes an answer of the process."""
        if kind == MASK:
            self.mask = content
        elif kind == REFUSED:
            self.problem = InvalidRequest(content.decode())
        else:
            self.problem = _try_again(content.decode())

    def close(self) -> None:
        """Ends the sequence."""
        self._grammar.forget(self.number)


class GrammarServer:
    """Runs the process that forks one for each format. `tokenizer` is xgrammar's `TokenizerInfo` as JSON.

    Starting it takes seconds, so the event loop must not do it. Any thread may call its methods.
    """

    def __init__(self, tokenizer: str):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def open(self, kind: str, source: str, wait_s: float) -> Grammar:
        """Compiles a format and returns it with its process.

        Raises GrammarError, GrammarLostError if its process was killed, and TimeoutError if there was no time
        for it in `wait_s`.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._fork(theirs)
            ours.settimeout(wait_s)
            return Grammar(ours, _first_mask(ours, kind, source))
        except BaseException:
            ours.close()
            raise

    def close(self) -> None:
        """Ends the process. The processes of the formats end when nothing holds them."""
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
                except OSError as error:  # The process was killed.
                    self._end()
                    if is_last:
                        raise GrammarLostError(str(error)) from None

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
            ]  # -P keeps its folder's modules out.
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
            raise RuntimeError("the process for output formats did not start, and its error is in this replica's log")
        control.settimeout(None)


def _first_mask(connection: socket.socket, kind: str, source: str) -> bytes:
    try:
        connection.send(f"{kind}\n{source}".encode())
        packet = connection.recv(PACKET_BYTES)
    except TimeoutError:
        raise
    except OSError as error:
        raise GrammarLostError(str(error)) from None
    if not packet:
        raise GrammarLostError("its process was killed")
    if REPLY.unpack_from(packet)[1] != MASK:
        raise GrammarError(packet[REPLY.size :].decode())
    return packet[REPLY.size :]


def _try_again(reason: str) -> Overloaded:
    """Returns Overloaded, since with ModelUnavailable the router would count the whole replica as lost."""
    return Overloaded(reason, retry_after_s=LOST_RETRY_S)
