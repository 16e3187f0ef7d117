"""A small workflow on the backends of the image, to see that it works; `apptainer test` runs it."""

import asyncio

from rhapsody import ComputeTask, Session
from rhapsody.backends import ConcurrentExecutionBackend, DaskExecutionBackend


def total(text: str) -> int:
    """Add up the numbers in a text."""
    return sum(map(int, text.split()))


async def main() -> None:
    """Let functions on Dask work on what a program on the local backend has written."""
    async with Session(backends=[ConcurrentExecutionBackend(), DaskExecutionBackend()]) as session:
        numbers = ComputeTask(executable="seq", arguments=[1, 100], backend="concurrent")
        sums = [ComputeTask(function=total, args=(numbers,), backend="dask") for _ in range(4)]
        await session.submit_tasks([numbers, *sums])
        await asyncio.gather(*sums)
        found = [task.return_value for task in sums]
        if found != [5050] * 4:
            raise SystemExit(f"wrong: {found}")
    print("a workflow on the local backend and on Dask: right")


if __name__ == "__main__":
    asyncio.run(main())
