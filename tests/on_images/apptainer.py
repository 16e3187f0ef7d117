"""Apptainer on a Debian that has none: Debian's own package from unstable, in a folder of its own.

It runs beside the C library that it was built for, which comes along. Nothing is installed into
the system but what `PACKAGES` names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from integration import machine

#: Debian packages, by the command that shows that they are there.
PACKAGES = {
    "patchelf": ["patchelf"],
    "mksquashfs": ["squashfs-tools"],
    "capsh": ["libcap2-bin"],
    "setpriv": ["util-linux"],
}

#: Where ordinary users see it too.
CACHE = Path("/var/cache/rhapsody-images")

_LIBRARIES = ("libc6", "libseccomp2", "libsqlite3-0")
_APT = """\
Dir::State "{folder}/state"; Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache"; Dir::Etc "{folder}/etc";
Acquire::Languages "none"; APT::Sandbox::User "root";
Acquire::Check-Valid-Until "false"; Acquire::Check-Date "false";
"""
_WRAPPER = """\
#!/bin/sh
# The root of a virtual machine may lack capabilities, all of which a build asks for.
if [ "$1" = build ]; then exec /usr/bin/python3 {helper} {program} "$@"; fi
exec {program} "$@"
"""


def ensure() -> Path:
    """Return the path of an apptainer: the machine's, or one that is unpacked now or was before."""
    found = shutil.which("apptainer")
    if found is not None:
        return Path(found)
    machine.install(PACKAGES)
    home = CACHE / "apptainer"
    wrapper = home / "bin" / "apptainer"
    if not wrapper.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="apptainer-", dir=CACHE))
        fresh.chmod(0o755)
        _unpack(fresh)
        shutil.rmtree(home, ignore_errors=True)
        fresh.rename(home)
        _settle(home)
    return wrapper


def version(program: Path) -> str:
    """What it says of itself."""
    return _run(program, "--version")


def _run(*words: str | Path, cwd: Path | None = None, **env: str) -> str:
    line = [str(word) for word in words]
    done = subprocess.run(
        line, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _mirror() -> str:
    uris = _run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
    return next(uri for uri in uris.split() if "security" not in uri)


def _unpack(home: Path) -> None:
    """Get the packages by an apt of its own, which knows nothing but Debian's unstable."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d"):
            (folder / part).mkdir(parents=True)
        (folder / "etc/preferences.d").mkdir()
        (folder / "status").touch()
        keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (folder / "etc/sources.list").write_text(f"deb [signed-by={keys}] {_mirror()} sid main\n")
        (folder / "apt.conf").write_text(_APT.format(folder=folder))
        config = str(folder / "apt.conf")
        _run("apt-get", "-qq", "update", APT_CONFIG=config)
        _run("apt-get", "-qq", "download", "apptainer", *_LIBRARIES, cwd=folder, APT_CONFIG=config)
        for package in folder.glob("*.deb"):
            beside = home if package.name.startswith("apptainer_") else home / "rt"
            _run("dpkg", "-x", package, beside)


def _settle(home: Path) -> None:
    """Let it run from where it is, beside its own libraries."""
    libraries = next((home / "rt/usr/lib").glob("*-linux-gnu"))
    linker = next(libraries.glob("ld-linux-*.so.*"))
    starter = next((home / "usr/lib").glob("*-linux-gnu/apptainer/bin/starter"))
    program = home / "usr/bin/apptainer"
    for binary in (program, starter):
        options = ("--set-interpreter", linker, "--force-rpath", "--set-rpath", libraries)
        _run("patchelf", *options, binary)
    # It looks for these from its own place.
    (home / "etc").rename(home / "usr/etc")
    (home / "usr/var/lib/apptainer/mnt/session").mkdir(parents=True)
    for name in ("etc", "var"):
        (home / "usr/lib" / name).symlink_to(f"../{name}")
    # Give root what this machine's root has; all capabilities there are may be more.
    config = home / "usr/etc/apptainer/apptainer.conf"
    lines = config.read_text().splitlines()
    key = "root default capabilities = "
    config.write_text("\n".join(f"{key}file" if li.startswith(key) else li for li in lines) + "\n")
    bound = next(
        li for li in _run("capsh", "--print").splitlines() if li.startswith("Bounding set")
    )
    capabilities = bound.partition("=")[2].upper()
    _run(program, "-q", "capability", "add", "--user", "root", capabilities)
    wrapper = home / "bin" / "apptainer"
    wrapper.parent.mkdir()
    helper = wrapper.with_name("all_capabilities.py")
    shutil.copy(Path(__file__).with_name("all_capabilities.py"), helper)
    wrapper.write_text(_WRAPPER.format(helper=helper, program=program))
    wrapper.chmod(0o755)
