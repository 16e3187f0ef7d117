"""The harness with Dragon on one node: a runtime for many tests, what is left of bad ends, and what
Dragon itself trips over, with our mends.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rhapsody.backends.execution.dragon.node.group_join import GroupJoinPatch
from rhapsody.backends.execution.dragon.runtime import init_local_services

from . import raw, small
from .command import Running
from .nodes import Sandbox
from .runtime import HeadDied, Runtime

CRASH = "import dragon; raise SystemError('on purpose')"
HANG = """
import dragon
from dragon.workflows.batch import Batch
batch = Batch()
batch.function(int).get()
print("ran", flush=True)  # then it never ends: nobody has joined the batch
"""


@pytest.fixture(scope="module")
def batch(runtime: Runtime) -> Iterator[Runtime]:
    runtime.call(raw.open_batch)
    yield runtime
    runtime.call(raw.close_batch)


def test_twenty_functions(batch: Runtime) -> None:
    assert batch.call(raw.hosts_of_functions, 20) == {socket.gethostname(): 20}


def test_a_process_and_a_job(batch: Runtime, tmp_path: Path) -> None:
    assert batch.call(raw.run_hostname, str(tmp_path)) == (0, socket.gethostname())
    # Two of eight logical CPUs: without the fake ones it would never be scheduled.
    assert batch.call(raw.run_job, str(tmp_path), 2) == ([0, 0], [socket.gethostname()] * 2)


def test_calls_may_be_async_and_raise_here(runtime: Runtime) -> None:
    async def double(number: int) -> int:
        if number < 0:
            raise ValueError("too small")
        return 2 * number

    assert runtime.call(double, 21) == 42
    with pytest.raises(ValueError, match="too small") as caught:
        runtime.call(double, -1)
    assert "in double" in str(caught.value.__cause__)


def test_the_node_has_the_cpus_and_gpus_that_it_is_said_to(tmp_path: Path) -> None:
    env = small.environment(cpus=6, gpus=3)
    with Sandbox() as place, Runtime(place, env, cwd=tmp_path) as runtime:
        assert runtime.call(raw.nodes) == [("localhost", 6, 3)]
        assert runtime.call(os.cpu_count) == os.cpu_count()
        assert runtime.stop().code == 0
        assert place.left() == []


def test_a_script_that_crashes_leaves_nothing(tmp_path: Path) -> None:
    with Sandbox() as place:
        result = _script(place, CRASH, tmp_path).wait()
        assert result.code != 0
        assert "on purpose" in result.stderr + result.stdout
        assert place.left() == []


def test_a_script_that_hangs_is_killed_with_all_of_its_runtime(tmp_path: Path) -> None:
    outside = set(os.listdir("/dev/shm"))
    with Sandbox() as place:
        script = _script(place, HANG, tmp_path)
        script.wait_for("ran")
        with pytest.raises(TimeoutError, match=r"after 1 s"):
            script.wait(1)
        assert place.processes() == {}
        assert all(line.startswith("/dev/shm/") for line in place.left())
    assert set(os.listdir("/dev/shm")) == outside


def test_a_signal_in_mid_run_and_a_head_that_dies(tmp_path: Path) -> None:
    with Sandbox() as place, Runtime(place, small.environment(), cwd=tmp_path) as runtime:
        runtime.command.signal(signal.SIGINT, group=True)
        with pytest.raises(HeadDied):
            runtime.call(raw.nodes)
        assert place.processes() == {}


def _script(place: Sandbox, text: str, folder: Path) -> Running:
    script = folder / "script.py"
    script.write_text(text)
    return place.start([*place.launcher, str(script)], env=small.environment(4), cwd=folder)


# ---------------------------------------------------------------------- what Dragon trips over


def _init_among_freed_locks() -> None:
    """In a process that has yet to ask Dragon's local services anything."""
    import ctypes

    from dragon.channels import Channel, ChannelError

    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    size = 272  # of a lock, in 0.15.0
    locks = []
    for _ in range(200):
        locks.append(libc.malloc(size))
        libc.malloc(600)  # or the freed ones become one, of another size
    for lock in locks:
        ctypes.memset(lock, 1, size)  # as the mark of a lock in use is
        libc.free(lock)
    with pytest.raises(ChannelError, match="LOCK_ALREADY_INITD"):
        Channel.make_process_local()
    init_local_services()
    Channel.make_process_local().destroy_process_local()


def _exit_code_of(function: Callable[[], None]) -> int:
    from dragon.native.process import Process

    process = Process(target=function)
    process.start()
    process.join()
    return int(process.returncode)


def test_local_services_start_where_locks_were_freed(runtime: Runtime) -> None:
    assert runtime.call(_exit_code_of, _init_among_freed_locks) == 0


def _join_until_it_ends() -> None:
    """As a worker of Batch does with the ranks of a job, when their manager has time to answer."""
    from dragon.native.process import ProcessTemplate
    from dragon.native.process_group import ProcessGroup

    pickle.loads(pickle.dumps(GroupJoinPatch()))
    group = ProcessGroup(ignore_error_on_exit=True)
    group.add_process(1, ProcessTemplate("/bin/sleep", args=("3",)))
    group.init()
    group.start()
    for timeout in itertools.cycle((0.05, 0.45)):
        try:
            group.join(timeout=timeout)
            break
        except TimeoutError:
            continue
    assert [code for _, code in group.inactive_puids] == [0]
    group.close()


def test_a_job_that_has_not_ended_yet_has_not_failed(runtime: Runtime) -> None:
    assert runtime.call(_exit_code_of, _join_until_it_ends) == 0
