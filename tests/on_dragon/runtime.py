"""A Dragon runtime for the tests of a module: started once, called many times."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from . import head
from .command import Result
from .nodes import Nodes, Sandbox

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
T = TypeVar("T")

_START = 60.0  # seconds; one node takes 1, two 6, with all cores busy a few times that


class HeadDied(Exception):
    """Raised when the program in the runtime ended during a call; says what was written."""


class RemoteTraceback(Exception):
    """Where an error arose in the runtime, as the cause of that error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Runtime:
    """A program inside Dragon that runs what a test calls it with.

    Args:
        place: where; it is the caller's, and stays.
        env: beside that of the place, as `small.environment` makes it.
        launcher: what starts the program, by default ``dragon`` as the place has it.
    """

    def __init__(
        self,
        place: Sandbox | Nodes,
        env: Mapping[str, str],
        *,
        launcher: Sequence[str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        self.place = place
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rhapsody-"))
            path = os.path.join(folder, "calls")  # reached from every network namespace
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen(1)
            listener.settimeout(_START)
            line = [*(launcher or place.launcher), str(Path(head.__file__)), path]
            #: the command that runs, for its output, and for signals to it
            self.command = place.start(line, env=env, cwd=cwd)
            try:
                self._connection, _ = listener.accept()
            except TimeoutError:
                place.kill_all()
                raise TimeoutError(f"no runtime came up: {self.command.wait()}") from None

    @overload
    def call(
        self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...

    @overload
    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As `call_within`, with a minute's time."""
        return self.call_within(60.0, function, *args, **kwargs)

    def call_within(
        self, timeout: float, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call a function, sync or async, in the runtime's program, and return what it returns.

        It and its arguments travel by cloudpickle: functions of test modules by name.

        Raises:
            HeadDied: the program ended meanwhile.
            TimeoutError: no answer within `timeout` seconds; then all in the place is killed.
            BaseException: what the function raised, with a `RemoteTraceback` as its cause.
        """
        self._connection.settimeout(timeout)
        try:
            head.send(self._connection, (function, args, kwargs, timeout))
            ok, value, text = head.receive(self._connection)
        except (EOFError, BrokenPipeError):
            self.close()
            raise HeadDied(str(self.command.wait())) from None
        except TimeoutError:
            self.close()
            name = getattr(function, "__qualname__", repr(function))
            raise TimeoutError(f"{name}: {timeout:g} s, {self.command.wait()}") from None
        if not ok:
            raise value from RemoteTraceback(text)
        return value

    def stop(self, timeout: float = 60.0) -> Result:
        """Let the program come to its end, and return how the launcher ended.

        Raises:
            TimeoutError: it did not end within `timeout` seconds; then all in the place is killed.
        """
        with contextlib.suppress(OSError):
            head.send(self._connection, None)
        self._connection.close()
        return self.command.wait(timeout)

    def close(self) -> None:
        """Kill what still runs in the place."""
        self._connection.close()
        self.place.kill_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
