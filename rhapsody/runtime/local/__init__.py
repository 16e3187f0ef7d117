"""Running functions and programs on this machine: threads, processes, children, the warden."""
