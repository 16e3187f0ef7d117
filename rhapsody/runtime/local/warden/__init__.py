"""The warden: a small process that starts a driver's child processes and outlives the driver.

Only another process can clean up after a driver that was killed with SIGKILL: when the warden's
socket closes, for whatever reason, it ends every process group that it started or guards, and
every descendant of its own. It starts as a directory, `python -I -S DIRECTORY SOCKET MARK`, and
imports nothing but the standard library and `frames`, so that it is up soon. Of its modules the
driver uses `messages` and `process_tree` too.
"""
