"""Patches Dragon for machines with few cores: loops that spin while they wait sleep instead.

Dragon is written for nodes with cores to spare. Several of its processes wait in loops that keep
a core busy, so that on a laptop, or where several nodes share a machine, they take the cores from
the tasks. `install` patches these loops in the running Python when their modules are imported.

Only ``rhapsody launch --small-machine`` and the tests use it, by putting the folder
``_sitecustomize`` beside this module on PYTHONPATH: its ``sitecustomize`` calls `install` in every
Python of the runtime. It replaces internals of dragonhpc 0.15.0; with another minor version it
warns and does nothing. Standard library only, and loaded by its path: it runs at the start of every
Python of the runtime.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["VERSION", "install"]

#: the minor version of dragonhpc that the patches were written against
VERSION = "0.15"

Patch = Callable[[Any], None]


def _sleeping_monitor(module: Any) -> None:
    # ProcessGroup._exq_monitor: its queue's poll(timeout) returns at once, so that every open
    # group keeps a core busy, in every client. Its shutdown event can be waited for.
    def _exq_monitor(self: Any) -> None:
        while not self._exq_shutdown.wait(0.1):
            if self._exq.poll(timeout=0):
                with self._exq_lock:
                    error = self._exq.get()
                    self._exq.put(error)
                if isinstance(error, Exception):
                    self._ex_raised = True
                    return

    module.ProcessGroup._exq_monitor = _exq_monitor


def _short_batches(module: Any) -> None:
    # A manager of Batch collects requests until none came for this long, by default 50 ms, and
    # every batch of tasks goes through two managers.
    module.manager_work_queue_poll_timeout = 0.005


def _tolerant_front_end(module: Any) -> None:
    # The launcher fails the start when "global services are up" arrives before a slower node's
    # "transport is up". Messages that arrive too early are kept until they are expected.
    def _recv_startup_msgs(
        self: Any, expected_type: type, count: int = 1, *, what: str | None = None
    ) -> list[Any]:
        early = self.__dict__.setdefault("_early_startup_msgs", [])
        found: list[Any] = []
        for message in list(early):
            if isinstance(message, expected_type) and len(found) < count:
                early.remove(message)
                found.append(message)
        while len(found) < count:
            message = module.dlutil.get_with_blocking(self.la_fe_stdin)
            if isinstance(message, expected_type):
                found.append(message)
            elif type(message).__name__ in ("GSIsUp", "TAUp"):
                early.append(message)
            else:
                self._raise_startup_failure(message, what or expected_type.__name__)
        return found

    module.LauncherFrontEnd._recv_startup_msgs = _recv_startup_msgs


def _sleeping_agent(module: Any) -> None:
    # A TCP agent calls poll(timeout=5) of its control queue on a thread, again and again; it
    # returns at once. Each node has two agents and the front end one.
    import asyncio

    async def to_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__name__", "") != "poll" or kwargs.get("timeout", 0) <= 1:
            return await asyncio.to_thread(function, *args, **kwargs)
        for _ in range(int(kwargs["timeout"] / 0.05)):
            if function(timeout=0):
                return True
            await asyncio.sleep(0.05)
        return False

    public = {name: getattr(asyncio, name) for name in dir(asyncio) if not name.startswith("__")}
    module.asyncio = types.SimpleNamespace(**{**public, "to_thread": to_thread})


def _sleeping_client(module: Any) -> None:
    # An agent polls for messages in the same way. It sleeps on the loop instead: little while
    # messages arrive, up to 4 ms when they do not.
    async def recv(self: Any, interval: float = 0.1) -> Any:
        nap = 0.0
        while True:
            try:
                message = self._recv_handle.recv(blocking=False)
                break
            except (module.ChannelEmpty, module.ChannelRecvTimeout):
                await module.asyncio.sleep(nap)
                nap = min(0.004, nap + 0.0002)
        try:
            return module.GatewayMessage.from_message(message)
        finally:
            message.destroy()

    module.Client.recv = recv


_PATCHES: dict[str, Patch] = {
    "dragon.launcher.frontend": _tolerant_front_end,
    "dragon.native.process_group": _sleeping_monitor,
    "dragon.transport.tcp.__main__": _sleeping_agent,
    "dragon.transport.tcp.client": _sleeping_client,
    "dragon.workflows.batch.facts": _short_batches,
}


class _Finder:  # no base: importlib.abc is long to import
    """Finds modules as the default finder does, and patches them right after they have run."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        self.patches = patches

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self.patches.get(fullname)
        if patch is None or not _known_version():
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_patch(module: types.ModuleType) -> None:
            run(module)
            patch(module)

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


def _known_version() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("dragonhpc")
    except PackageNotFoundError:
        found = "of unknown version"
    if found.startswith(f"{VERSION}."):
        return True
    warnings.warn(
        f"the patches for small machines are for dragonhpc {VERSION}, this is {found}: not applied",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def install(patches: Mapping[str, Patch] = _PATCHES) -> None:
    """Patch Dragon's modules when they are imported from now on; a second call does nothing.

    Args:
        patches: by the name of a module, what is called with it after it has run.
    """
    if not any(isinstance(f, _Finder) and f.patches is patches for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(patches))
