"""HyperQueue on this machine: its server and one worker with all cores, through its Python API."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig

from benchmarks import side


def _executables(tasks: int) -> dict[str, Any]:
    # What it says while it waits is not what is measured.
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        LocalCluster() as cluster,
    ):
        cluster.start_worker(WorkerConfig(cores=side.cores()))
        client = cluster.client()

        def run(number: int) -> int:
            job = Job()
            for _ in range(number):
                job.program([side.TRUE])
            client.wait_for_jobs([client.submit(job)], raise_on_error=True)
            return number  # an error would have been raised

        run(side.WARM_UP)
        gauge = side.Gauge()
        gauge.start()
        result = run(tasks)
        gauge.stop()
        return gauge.reading(tasks, result)


if __name__ == "__main__":
    side.main({"executables": _executables})
