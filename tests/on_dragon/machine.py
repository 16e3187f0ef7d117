"""What the Dragon tests need of the machine: ``python -m tests.on_dragon.machine`` installs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

#: Debian packages, by a command or a file that shows that they are there.
PACKAGES = {
    "cc": ["gcc"],
    "/usr/include/stdlib.h": ["libc6-dev"],
    "ip": ["iproute2"],
    "unshare": ["util-linux"],
    "nsenter": ["util-linux"],
    "mount": ["mount"],
}

#: Survives a checkout; holds what was compiled.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rhapsody-dragon"

_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def which(command: str) -> str | None:
    """The path of a command, the administrator's folders included."""
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:{_SBIN}")


def missing() -> list[str]:
    """The Debian packages that are not installed."""
    packages = []
    for sign, needed in PACKAGES.items():
        if not (os.path.exists(sign) if sign.startswith("/") else which(sign)):
            packages += [package for package in needed if package not in packages]
    return packages


def require() -> None:
    """Raise where the tests cannot run here.

    Raises:
        RuntimeError: not root, or no Linux, or a package is missing; says which.
    """
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise RuntimeError("nodes are made of Linux namespaces, which needs root: run this as root")
    if packages := missing():
        raise RuntimeError(
            f"missing: apt-get install -y --no-install-recommends {' '.join(packages)}"
        )


def install() -> None:
    """Install what is missing with apt; a no-op where everything is there.

    Raises:
        RuntimeError: something is missing and this is no root account on a Debian, with the line
            that an administrator has to run.
    """
    packages = missing()
    if not packages:
        return
    line = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or which("apt-get") is None:
        raise RuntimeError(f"the Dragon tests need: {' '.join(line)} (as root, on Debian)")
    sys.stdout.write(f"installing what is missing: {' '.join(line)}\n")
    sys.stdout.flush()
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], line):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    install()
    require()
    sys.stdout.write("system packages for the Dragon tests: complete\n")
