"""Finds the Dragon runtime that this process is part of, or starts one on this node.

Dragon's public function for the latter, `dragon.workflows.runtime.start_local_runtime`, prints the
runtime's access token, starts the runtime in this process's group, and leaves it behind when this
process is killed. So the same command is started here, in a process group that the warden guards.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from rhapsody.backends.discovery import install_hint
from rhapsody.launch.dragon.command import find_launcher, path_with_launcher
from rhapsody.launch.dragon.pmix import with_pmix
from rhapsody.launch.dragon.shared_memory import SegmentTracker, check_shared_memory
from rhapsody.runtime.errors import BackendError, ResourceError
from rhapsody.runtime.local.children import Children

__all__ = ["Runtime", "init_local_services", "on_thread"]

_T = TypeVar("_T")

# Releases of dragonhpc for which the code here was read and tested.
_TESTED = ("0.15.",)
_START = 60.0  # seconds for a runtime to come up: 2 to 5 s on an idle machine
_STOP = 15.0  # seconds for it to end: 0.7 s on an idle machine
_INIT_ATTEMPTS = 1000  # to initialize the local services: each may find a freed lock's memory
_init_lock = threading.Lock()
# Variables of the processes of a runtime, which must not reach another runtime.
_RUNTIME_VARIABLES = ("DRAGON_RT_UID", "DRAGON_FE_EXTERNAL_IP_ADDR", "DRAGON_HEAD_NODE_IP_ADDR")


async def on_thread(function: Callable[..., _T], *args: object, timeout: float) -> _T:
    """Call what may block for good on a daemon thread, which is abandoned after `timeout` seconds.

    A daemon, because a call that never returns must not keep the program from ending.

    Raises:
        asyncio.TimeoutError: the call has not returned.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(value: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("_T", value))

    def run() -> None:
        value: _T | None = None
        error: BaseException | None = None
        try:
            value = function(*args)
        except BaseException as raised:  # `settle` raises it to the caller
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, daemon=True, name=f"dragon-{function.__name__}").start()
    return await asyncio.wait_for(future, timeout)


class Runtime:
    """Access to a Dragon runtime, for the life of a backend.

    Args:
        name: of the backend, for errors.
        num_nodes: how many nodes the backend wants; None for what there is.
    """

    def __init__(self, name: str, num_nodes: int | None) -> None:
        self.name = name
        self._num_nodes = num_nodes
        self._handle: Any = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._children: Children | None = None
        self._segments: SegmentTracker | None = None
        self._libraries: str | None = None  # a folder that the runtime takes libraries from

    async def open(self) -> None:
        """Find or start the runtime.

        Raises:
            BackendError: Dragon is not there, or there is no runtime and none can be started.
        """
        self._check_release()
        if await on_thread(_in_dragon, timeout=_START):
            await on_thread(init_local_services, timeout=_START)
            return
        if self._num_nodes not in (None, 1):
            raise BackendError(
                f"backend '{self.name}' asks for {self._num_nodes} nodes, and this program was not"
                f" started under Dragon; start it with: rhapsody launch --dragon --nodes"
                f" {self._num_nodes} {sys.argv[0]}",
                backend=self.name,
            )
        try:
            check_shared_memory()  # with too little of it Dragon's launcher hangs
        except ResourceError as error:
            raise BackendError(
                f"backend '{self.name}' cannot start Dragon: {error}", backend=self.name
            ) from error
        await self._start()

    def _check_release(self) -> None:
        hint = install_hint("dragon_v3")
        running = sys.version_info[:2]
        if running < (3, 11):
            raise BackendError(
                f"backend '{self.name}' needs Python 3.11 or later, for Dragon; this is"
                f" {running[0]}.{running[1]}",
                backend=self.name,
            )
        try:
            release = importlib.metadata.version("dragonhpc")
            importlib.import_module("dragon.workflows.batch.batch")
        except ImportError as error:  # PackageNotFoundError is one
            raise BackendError(
                f"backend '{self.name}' needs Dragon, which is not installed, or not whole"
                f" ({error}): {hint}",
                backend=self.name,
            ) from error
        if not release.startswith(_TESTED):
            raise BackendError(
                f"backend '{self.name}' needs dragonhpc {' or '.join(t + 'x' for t in _TESTED)},"
                f" and {release} is installed: {hint}",
                backend=self.name,
            )

    async def _start(self) -> None:
        self._children = Children(lambda events: None)
        self._segments = SegmentTracker()
        dragon = find_launcher(os.environ) or "dragon"
        runtime = importlib.import_module("dragon.workflows.runtime")
        # The program that keeps a runtime up until it is stopped; private, read in 0.15.0.
        head = runtime._HEAD_SCRIPT
        environ = {k: v for k, v in os.environ.items() if k not in _RUNTIME_VARIABLES}
        environ["PATH"] = path_with_launcher(dragon, environ)
        self._process = await asyncio.create_subprocess_exec(
            *(dragon, "-s", "-a", head),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=with_pmix(environ, self._folder_of_libraries),
            limit=1 << 20,
            # Not for Ctrl-C, which this process handles; with a session of its own it hangs.
            process_group=0,  # type: ignore[call-arg]  # since 3.11, as Dragon
        )
        self._children.guard(self._process.pid)
        try:
            info = await asyncio.wait_for(self._read_info(runtime.RUNTIME_INFO_PREFIX), _START)
            await on_thread(self._attach, runtime, info, timeout=_START)
        except BaseException as error:
            await self.close()
            if isinstance(error, asyncio.TimeoutError):
                raise BackendError(
                    f"the Dragon runtime of backend '{self.name}' did not come up within"
                    f" {_START:g} s",
                    backend=self.name,
                    transient=True,
                ) from None
            raise

    def _folder_of_libraries(self) -> str:
        self._libraries = tempfile.mkdtemp(prefix="rhapsody-libraries-")
        return self._libraries

    async def _read_info(self, prefix: str) -> dict[str, Any]:
        """Read until the line that says how to attach; discard what the runtime prints later."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        while line := await process.stdout.readline():
            _, found, text = line.decode(errors="replace").partition(prefix)
            if found:
                self._reader = asyncio.create_task(_discard(process.stdout))
                return dict(json.loads(text))
        raise BackendError(
            f"the Dragon runtime of backend '{self.name}' ended before it was up, with exit code"
            f" {await process.wait()}; its output is on stderr",
            backend=self.name,
        )

    def _attach(self, runtime: Any, info: dict[str, Any]) -> None:
        messages = importlib.import_module("dragon.infrastructure.messages")
        described = messages.AttachableRuntimeDescr.from_sdict({**info, "tag": 0})
        handle = runtime.LocalRuntime(None, described, info.get("auth_token"))
        runtime.attach(timeout=_START, runtime=handle)
        self._handle = handle
        init_local_services()

    async def close(self) -> None:
        """Stop a runtime that was started here; what does not end is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if self._handle is not None:
                await on_thread(self._handle.stop, timeout=_STOP)
                await asyncio.wait_for(process.wait(), _STOP)
        except asyncio.TimeoutError:
            pass
        finally:
            await self._end(process)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Kill what is left of the runtime's processes, with their files in shared memory."""
        if process.returncode is None:
            await asyncio.to_thread(self._kill, process.pid)
            await process.wait()
            if self._segments is not None:
                self._segments.unlink()
        if self._libraries is not None:
            shutil.rmtree(self._libraries, ignore_errors=True)
        if self._reader is not None:
            self._reader.cancel()
        if self._children is not None:
            self._children.unguard(process.pid)
            await self._children.close()

    def _kill(self, root: int) -> None:
        from rhapsody.runtime.local.warden.process_tree import descendants, suspend

        members = suspend(lambda table: {root, *descendants([root], table)})
        if self._segments is not None:
            self._segments.record(members)
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def init_local_services() -> None:
    """Make this process's first request to Dragon's local services, on one thread.

    libdragon (0.15.0) makes a lock at the first request, in memory from malloc. Where another lock
    was freed at that address, which Dragon does often, it takes the new one for a lock in use and
    fails; also, two threads may both make it. A Batch that makes the first request fails with it.
    Another attempt gets other memory.
    """
    channels = importlib.import_module("dragon.channels")
    with _init_lock:
        for left in reversed(range(_INIT_ATTEMPTS)):
            try:
                channels.Channel.make_process_local().destroy_process_local()
                return
            except channels.ChannelError as error:
                if "LOCK_ALREADY_INITD" not in str(error) or not left:
                    raise


def _in_dragon() -> bool:
    return bool(importlib.import_module("dragon").in_dragon())


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass
