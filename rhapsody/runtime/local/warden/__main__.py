"""Starts the warden: makes it immune to a terminal's signals, and the parent of orphans below it.

Its arguments are the numbers of two descriptors: of the socket to the driver, and of a file to
which it writes the key of the last child that it began to start.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

if not __package__:  # started as a directory: let the package's relative imports find it (PEP 366)
    # At the end, behind the standard library, none of whose names ours can take so.
    sys.path[:1] = []
    sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
    __package__ = "local.warden"
    __spec__ = None  # it says that there is no package, and Python 3.12 warns where the two differ

from .process_tree import become_subreaper
from .server import Server


def main() -> None:
    """Serve until the driver has gone, then end all that is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the driver decides, and its end ends us
    become_subreaper()  # descendants that leave their group come to us when their parents die
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setblocking(False)
    sock.set_inheritable(False)
    mark = int(sys.argv[2])
    os.set_inheritable(mark, False)
    server = Server(sock, mark)
    server.run()
    server.end_all()


if __name__ == "__main__":
    main()
