"""The workflow that the tests run in the images, under Dragon or on Dask."""

import asyncio
import os
import sys

from rhapsody import ComputeTask, Session
from rhapsody.backends import DaskExecutionBackend, DragonExecutionBackend


def square(number: int) -> int:
    return number * number


async def main(engine: str, *address: str) -> None:
    backend = (
        DragonExecutionBackend() if engine == "dragon" else DaskExecutionBackend(cluster=address[0])
    )
    async with Session(backends=[backend]) as session:
        squares = [ComputeTask(function=square, args=(number,)) for number in range(8)]
        hostname = ComputeTask(executable="hostname")
        await session.submit_tasks([*squares, hostname])
        await session.wait_tasks([*squares, hostname])
        print([task.return_value for task in squares], (hostname.stdout or "").strip())
        print("user", os.getuid())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
