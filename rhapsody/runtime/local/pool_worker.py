"""In a worker process: calls in, results out (see `workers`, which drives it)."""

from __future__ import annotations

import asyncio
import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rhapsody.runtime import serialization
from rhapsody.runtime.errors import SerializationError

from .calls import is_coroutine
from .frames import FrameSocket, keep_from_forks
from .worker_termination import EscapedDescendants

__all__ = ["main"]

# Kinds of frames. To a worker: a bundle, "give back what has not begun", "quit".
# From it: "the first call begins", a result, an exception, "given back", "this bundle cannot be
# unpickled", "the initializer raised". A result or an exception in lower case says that the next
# call of the bundle has begun.
BUNDLE, BACK, QUIT = b"C", b"B", b"Q"
BEGUN, RESULT, ERROR, GIVEN, UNREADABLE, BROKEN = b"N", b"R", b"E", b"G", b"U", b"X"


def main(
    sock: socket.socket, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]
) -> None:
    """Serve calls from a socket until told to quit, or until the other side has gone."""
    os.setpgid(0, 0)  # what the functions start is in a group that ends with us
    _reset_signals()
    # What a function forks would hold the connection open, and hide the death of this process.
    keep_from_forks(sock)
    wire = FrameSocket(sock)
    lock = threading.Lock()
    messages: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
    calls: deque[tuple[Any, ...]] = deque()
    if initializer is not None:
        try:
            initializer(*initargs)
        except BaseException as error:
            wire.receive()
            wire.send(BROKEN, serialization.pack_exception(error))
            return
    listener = threading.Thread(target=_listen, args=(wire, lock, messages, calls), daemon=True)
    listener.start()
    try:
        _work(wire, lock, messages, calls)
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


def _work(
    wire: FrameSocket,
    lock: threading.Lock,
    messages: queue.SimpleQueue[bytearray | None],
    calls: deque[tuple[Any, ...]],
) -> None:
    while (payload := messages.get()) is not None:
        try:
            bundle = serialization.loads(payload, "calls")
        except SerializationError as error:
            with lock:
                wire.send(UNREADABLE, serialization.pack_exception(error))
            continue
        del payload
        with lock:
            calls.extend(bundle)
            following: tuple[Any, ...] | None = calls.popleft()
            wire.send(BEGUN)
        del bundle
        while following is not None:
            kind, data, started, ended = _run(following)
            # Under the lock: a call either begins now, or can be given back.
            with lock:
                following = calls.popleft() if calls else None
                wire.send(kind if following is None else kind.lower(), data, started, ended)
            del data


def _listen(
    wire: FrameSocket,
    lock: threading.Lock,
    messages: queue.SimpleQueue[bytearray | None],
    calls: deque[tuple[Any, ...]],
) -> None:
    while (frame := wire.receive()) is not None:
        if frame.kind == BUNDLE:
            messages.put(frame.data)
        elif frame.kind == QUIT:
            messages.put(None)
            return
        else:
            # Under the lock, no result is written between the count and its report.
            with lock:
                wire.send(GIVEN, len(calls).to_bytes(8, "big"))
                calls.clear()
    _end_group()  # the driver has died


def _end_group() -> None:
    """End whatever runs here, and what it has started."""
    strays = EscapedDescendants(os.getpid())
    strays.signal(signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def _run(call: tuple[Any, ...]) -> tuple[bytes, bytes, float, float]:
    """Return the kind of the answer, what it holds, and when the call began and ended."""
    function, args, kwargs, cores, env = call
    started = time.monotonic()
    try:
        with _around(cores, env):
            value = function(*args, **kwargs)
            if is_coroutine(value):
                value = asyncio.run(value)
        kind, data = RESULT, _dump_result(value)
    except BaseException as error:
        # SystemExit too: it is the function that ends, not the worker.
        trace = error.__traceback__
        error.__traceback__ = trace.tb_next if trace is not None else None
        kind, data = ERROR, serialization.pack_exception(error)
    return kind, data, started, time.monotonic()


def _dump_result(value: Any) -> bytes:
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:  # what the plain pickler cannot do, the other one may; else it says why
        return serialization.dumps(value, "result")


class _around:  # noqa: N801 - it is used as a function
    """The cores and the environment of one call."""

    def __init__(self, cores: tuple[int, ...], env: dict[str, str] | None) -> None:
        self.cores = cores if hasattr(os, "sched_setaffinity") else ()
        self.env = env

    def __enter__(self) -> None:
        if self.cores:
            self.old_cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self.cores)
        if self.env:
            self.old_env = {name: os.environ.get(name) for name in self.env}
            os.environ.update(self.env)

    def __exit__(self, *exc: object) -> None:
        if self.cores:
            os.sched_setaffinity(0, self.old_cores)
        for name, value in (self.old_env if self.env else {}).items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
