"""What RHAPSODY costs, next to the raw engines that it stands on and to its peers.

`python -m benchmarks --help` says how to run it; `figures` lists what is measured, and the
figures' targets; `docs/benchmarks.md` is written from a run.
"""
