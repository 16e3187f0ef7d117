"""A stand-in for Dragon in the process of the driver, whose functions have ended at once.

A module of its own, for what is pickled has to be found by name.
"""

from __future__ import annotations

import itertools
import pickle
import queue
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks import side
from rhapsody.backends.execution.dragon.node.messages import CallEnded, pack_messages

_HOST = "here"
_NONE = pickle.dumps(None)


class _Queue(queue.SimpleQueue[Any]):
    """A native queue, as far as it is used; pickled, it stays the same one."""

    def __init__(self, policy: object = None) -> None:
        _queues.append(self)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return self.get_nowait() if timeout == 0 else super().get(block, timeout)

    def __reduce__(self) -> tuple[Any, ...]:
        return _queue, (_queues.index(self),)

    def destroy(self) -> None:
        pass


_queues: list[_Queue] = []  # the first is that to the driver


def _queue(number: int) -> _Queue:
    return _queues[number]


class _Process(threading.Thread):
    """A native process: that is the agent of the node, on a thread."""

    def __init__(self, target: Any, args: Any, policy: Any) -> None:
        super().__init__(target=target, args=args, daemon=True)


class _Channel:
    @classmethod
    def make_process_local(cls) -> _Channel:
        return cls()

    def destroy_process_local(self) -> None:
        pass


class _Policy(SimpleNamespace):
    Placement = SimpleNamespace(HOST_NAME=None)


class _Handle:
    __slots__ = ("uid",)

    def __init__(self, uid: str) -> None:
        self.uid = uid

    def get(self, timeout: float) -> None:
        pass


class _Batch:
    """A Batch whose functions have ended at once, with None."""

    def __init__(self, **_: Any) -> None:
        self._task_log_tasks: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def topology(self) -> Any:
        return SimpleNamespace(pool_hostnames=[[_HOST]], workers_per_pool=[side.cores()])

    def function(self, target: Any, context: Any, executor: int, number: int, data: bytes) -> Any:
        uid = str(next(self._numbers))
        handle = self._task_log_tasks[uid] = _Handle(uid)
        # What `run_task` sends from a worker.
        _queues[0].put(pack_messages(CallEnded(number, True, _NONE, _HOST, 0.0)))
        self._ended.put(uid)
        return handle

    def poll(self, timeout: float) -> str | None:
        try:
            return self._ended.get(timeout=timeout)
        except queue.Empty:
            return None

    def terminate(self, timeout: float) -> None:
        pass


def install() -> None:
    """Let the modules of Dragon that the backend imports be ours."""
    node = SimpleNamespace(hostname=_HOST, num_cpus=2 * side.cores(), gpus=None)
    modules: dict[str, dict[str, Any]] = {
        "dragon": {"in_dragon": lambda: True},
        "dragon.channels": {"Channel": _Channel, "ChannelError": OSError},
        "dragon.infrastructure.policy": {"Policy": _Policy},
        "dragon.native.machine": {
            "Node": lambda uid: node,
            "System": lambda: SimpleNamespace(nodes=[0]),
        },
        "dragon.native.process": {"Process": _Process},
        "dragon.native.queue": {"Queue": _Queue},
        "dragon.workflows.batch.batch": {"Batch": _Batch},
    }
    for name, content in modules.items():
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(content)
