"""The same workloads on other people's runtimes, each in an environment of its own."""
