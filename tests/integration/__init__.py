"""Tests against real engines: Docker, Slurm, Dask over both."""
