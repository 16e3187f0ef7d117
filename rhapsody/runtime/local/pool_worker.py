"""A worker process: receives bundles of calls, sends results (`process_pool` drives it)."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rhapsody.runtime import serialization
from rhapsody.runtime.errors import SerializationError

from .calls import call_function, strip_frames
from .frames import FrameSocket, keep_from_forks
from .worker_termination import EscapedDescendants

__all__ = ["CallMessage", "main"]

#: a call as it travels: the positional arguments of `call_function`
CallMessage = tuple[
    Callable[..., Any],
    Sequence[Any],
    Mapping[str, Any],
    Sequence[int],
    "Mapping[str, str] | None",
]

# Kinds of frames. To a worker: a bundle, "return what has not begun", "quit".
# From it: "the first call begins", a result, an exception, "returned", "this bundle cannot be
# unpickled", "the initializer raised". A result or an exception in lower case says that the next
# call of the bundle has begun.
BUNDLE, RETURN, QUIT = b"C", b"B", b"Q"
BEGUN, RESULT, ERROR, RETURNED, UNREADABLE, BROKEN = b"N", b"R", b"E", b"G", b"U", b"X"


def main(
    sock: socket.socket, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]
) -> None:
    """Serve calls from a socket until told to quit, or until the other side has gone."""
    os.setpgid(0, 0)  # what the functions start is in a group that ends with us
    _reset_signals()
    # What a function forks would hold the connection open, and hide the death of this process.
    keep_from_forks(sock)
    connection = FrameSocket(sock)
    if initializer is not None:
        try:
            initializer(*initargs)
        except BaseException as error:
            connection.receive()
            connection.send(BROKEN, serialization.pack_exception(error))
            return
    worker = _Worker(connection)
    threading.Thread(target=worker.listen, daemon=True).start()
    try:
        worker.run()
    except OSError:
        _end_group()  # the driver has died


def _reset_signals() -> None:
    """Leave the driver's handlers, which a fork inherits, to the driver.

    With asyncio's the signal that shall end us would be written to the driver's own event loop.
    """
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
    # When the driver dies, our group is orphaned, and where a member of it is stopped by then the
    # kernel sends it SIGHUP (setpgid(2)). It would end us before we have ended what we stopped.
    # A handler, because what functions start would inherit it if it were ignored.
    signal.signal(signal.SIGHUP, _stay)


def _stay(number: int, frame: object) -> None:
    """Do nothing: the end of the connection says when the driver has died."""


class _Worker:
    """Runs calls on the main thread, and listens on another one.

    `calls` are those of the present bundle that have not begun. Under the lock, a call either
    begins or is returned, and no result is sent between the count of returned calls and its report.
    """

    def __init__(self, connection: FrameSocket) -> None:
        self.connection = connection
        self.lock = threading.Lock()
        self.bundles: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        self.calls: deque[CallMessage] = deque()

    def run(self) -> None:
        """Run bundles until told to quit; raises OSError when the driver has died."""
        connection, lock, calls = self.connection, self.lock, self.calls
        while (payload := self.bundles.get()) is not None:
            try:
                bundle = serialization.loads(payload, "calls")
            except SerializationError as error:
                with lock:
                    connection.send(UNREADABLE, serialization.pack_exception(error))
                continue
            del payload
            with lock:
                calls.extend(bundle)
                call: CallMessage | None = calls.popleft()
                connection.send(BEGUN)
            del bundle
            while call is not None:
                kind, data, started, ended = _run(call)
                with lock:
                    call = calls.popleft() if calls else None
                    connection.send(kind if call is None else kind.lower(), data, started, ended)
                del data

    def listen(self) -> None:
        """Take what the driver sends; end this process's group when it has died."""
        while (frame := self.connection.receive()) is not None:
            if frame.kind == BUNDLE:
                self.bundles.put(frame.data)
            elif frame.kind == QUIT:
                self.bundles.put(None)
                return
            else:
                with self.lock:
                    self.connection.send(RETURNED, len(self.calls).to_bytes(8, "big"))
                    self.calls.clear()
        _end_group()


def _end_group() -> None:
    """End whatever runs here, and what it has started."""
    escaped = EscapedDescendants(os.getpid())
    escaped.signal(signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def _run(call: CallMessage) -> tuple[bytes, bytes, float, float]:
    """Return the kind of the answer, its data, and when the call began and ended."""
    started = time.monotonic()
    try:
        kind, data = RESULT, _dump_result(call_function(*call))
    except BaseException as error:
        # SystemExit too: it is the function that ends, not the worker.
        strip_frames(error)
        kind, data = ERROR, serialization.pack_exception(error)
    return kind, data, started, time.monotonic()


def _dump_result(value: Any) -> bytes:
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:  # what the plain pickler cannot do, the other one may; else it says why
        return serialization.dumps(value, "result")
