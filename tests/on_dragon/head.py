"""The program that Dragon starts for a test module: calls what the tests send it, in one process.

It is the driver of a workflow, with a main thread and an event loop that last over the calls; what
a module keeps from one call to the next is in variables of the module.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import pickle
import socket
import struct
import sys
import traceback
from typing import Any

import cloudpickle


def send(connection: socket.socket, value: Any) -> None:
    """Send a value; functions of importable modules go by name, others with their code."""
    data = cloudpickle.dumps(value)
    connection.sendall(struct.pack("!Q", len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """Receive a value.

    Raises:
        EOFError: the other side has gone.
        TimeoutError: the connection's timeout.
    """
    (length,) = struct.unpack("!Q", _exactly(connection, 8))
    return pickle.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        try:
            more = connection.recv(min(length - len(data), 1 << 20))
        except ConnectionResetError:
            more = b""
        if not more:
            raise EOFError("the other side has gone")
        data += more
    return bytes(data)


def serve(path: str) -> None:
    """Answer calls on a Unix socket until the other side sends None, or closes it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            while (call := _next_call(connection)) is not None:
                _answer(connection, loop, *call)
        finally:
            loop.close()


def _next_call(connection: socket.socket) -> Any:
    try:
        return receive(connection)
    except EOFError:
        return None


def _answer(
    connection: socket.socket,
    loop: asyncio.AbstractEventLoop,
    function: Any,
    args: Any,
    kwargs: Any,
    timeout: float,
) -> None:
    # Where all threads are when it takes too long; the test shows it.
    faulthandler.dump_traceback_later(max(1.0, timeout - 1.0))
    try:
        value = function(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = loop.run_until_complete(value)
        send(connection, (True, value, ""))
    except BaseException as error:  # the test raises it
        text = traceback.format_exc()
        try:
            send(connection, (False, error, text))
        except (TypeError, pickle.PicklingError, AttributeError):
            send(connection, (False, RuntimeError(repr(error)), text))
    finally:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    from on_dragon.head import serve as serve_by_name  # so that it pickles by that name

    serve_by_name(sys.argv[1])
