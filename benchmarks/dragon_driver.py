"""What the Dragon backend costs in the driver: a session on a stand-in for Dragon.

The stand-in is in this process, and every function has ended by the time that it is handed over,
so that what is measured is ours: from `submit_tasks` to the last task that is settled, over all
threads of the driver. The little that the stand-in itself takes is among it.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import queue
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks import sessions, side
from rhapsody.api import Session
from rhapsody.backends import DragonExecutionBackend

_HOST = "here"
_NONE = pickle.dumps(None)


class _Queue(queue.SimpleQueue[Any]):
    """A native queue, as far as it is used; what is pickled of it leads to nothing."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return self.get_nowait() if timeout == 0 else super().get(block, timeout)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Queue, ()

    def destroy(self) -> None:
        pass


class _Agent:
    """The process on a node: gives the one sign of life that a start waits for."""

    def __init__(self, **_: Any) -> None:
        pass

    def start(self) -> None:
        _queues[0].put(pickle.dumps([("beat", _HOST)]))

    def join(self, timeout: float) -> None:
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

    def function(self, target: Any, site: Any, crew: int, number: int, data: bytes) -> Any:
        uid = str(next(self._numbers))
        handle = self._task_log_tasks[uid] = _Handle(uid)
        # What `run_order` sends from a worker.
        _queues[0].put(pickle.dumps((("ended", number, (True, _NONE), _HOST, 0.0),)))
        self._ended.put(uid)
        return handle

    def poll(self, timeout: float) -> str | None:
        try:
            return self._ended.get(timeout=timeout)
        except queue.Empty:
            return None

    def terminate(self, timeout: float) -> None:
        pass


_queues: list[_Queue] = []  # the first is that for news


def _make_queue() -> _Queue:
    _queues.append(_Queue())
    return _queues[-1]


def _stand_in() -> None:
    """Let the modules of Dragon that the backend imports be ours."""
    node = SimpleNamespace(hostname=_HOST, num_cpus=2 * side.cores(), gpus=None)
    modules: dict[str, dict[str, Any]] = {
        "dragon": {"in_dragon": lambda: True},
        "dragon.infrastructure.policy": {"Policy": _Policy},
        "dragon.native.machine": {
            "Node": lambda uid: node,
            "System": lambda: SimpleNamespace(nodes=[0]),
        },
        "dragon.native.process": {"Process": _Agent},
        "dragon.native.queue": {"Queue": _make_queue},
        "dragon.workflows.batch.batch": {"Batch": _Batch},
    }
    for name, content in modules.items():
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(content)


def _backend() -> DragonExecutionBackend:
    _stand_in()
    return DragonExecutionBackend(node_timeout=600.0)


async def _cpu(number: int) -> dict[str, Any]:
    """Return as `seconds` the processor time of this process, per task."""
    async with Session(backends=[await _backend()]) as session:
        warm = sessions.increments(side.WARM_UP)
        await session.submit_tasks(warm)
        await session.wait_tasks(warm)
        tasks = sessions.increments(number)
        began = time.process_time()
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks)
        seconds = time.process_time() - began
    return {"seconds": seconds / number, "result": sum(map(sessions.worth, tasks))}


if __name__ == "__main__":
    side.main(
        {
            "cpu": lambda number: asyncio.run(_cpu(number)),
            "stall": lambda number: asyncio.run(
                sessions.stall(_backend(), sessions.increments, number)
            ),
        }
    )
