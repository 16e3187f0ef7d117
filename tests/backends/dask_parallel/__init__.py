"""Tests of the Dask backend: real schedulers, workers and children, all of this machine."""
