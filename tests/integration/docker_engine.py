"""A Docker Engine and our images, without a registry.

Where a daemon answers, it is used and left alone. Where none does, one is started for the test run
and stopped after it; its store stays in the cache, because building an image takes a minute.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

from . import machine

#: Every container and network of the tests carries it, so that a sweep finds those, and only those.
LABEL = "org.rhapsody.integration"

ROOT = Path(__file__).resolve().parents[2]
BASE_IMAGE = "rhapsody-integration/base:bookworm"


def docker_command() -> str:
    """The client that came with the Engine: a newer one first on the PATH may lack a builder."""
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else machine.which("docker") or ""


def docker(*arguments: str, check: bool = True, **kwargs: object) -> str:
    """Run one docker command and return what it printed.

    Raises:
        RuntimeError: it failed, with its own words.
    """
    env = {**os.environ, "DOCKER_BUILDKIT": "1"}
    done = subprocess.run(
        [docker_command(), *arguments],
        env=env,
        capture_output=True,
        text=True,
        **kwargs,  # type: ignore[call-overload]
    )
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return str(done.stdout).strip()


def answers() -> bool:
    """Whether an Engine answers."""
    command = [docker_command(), "version", "--format", "{{.Server.Version}}"]
    return bool(docker_command()) and subprocess.run(command, capture_output=True).returncode == 0


def start(ledger: machine.Ledger) -> subprocess.Popen[bytes] | None:
    """Start an Engine where none answers; returns its process, or None where one was there.

    Raises:
        RuntimeError: it did not come up, with the end of its log.
    """
    if answers():
        return None
    home = machine.CACHE / "docker"
    run = Path(tempfile.gettempdir()) / "rhapsody-docker"
    home.mkdir(parents=True, exist_ok=True)
    run.mkdir(exist_ok=True)
    log = home / "dockerd.log"
    with log.open("wb") as out:
        daemon = subprocess.Popen(
            [
                machine.which("dockerd") or "dockerd",
                f"--data-root={home / 'data'}",
                f"--exec-root={run}",
                f"--pidfile={run / 'dockerd.pid'}",
                "--mtu=1400",  # room for the headers of a tunnel below us
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ledger.add_process(daemon.pid)
    try:
        machine.until(lambda: daemon.poll() is not None or answers(), 60, "dockerd")
    except TimeoutError:
        pass
    if not answers():
        tail = log.read_text(errors="replace")[-2000:]
        ledger.stop(daemon.pid)
        daemon.wait()
        raise RuntimeError(f"dockerd did not come up:\n{tail}")
    return daemon


def sweep() -> list[str]:
    """Remove every container and network with our label; returns their names."""
    swept = []
    for kind, listing in (("container", ["ps", "-a"]), ("network", ["network", "ls"])):
        names = docker(*listing, "--filter", f"label={LABEL}", "--format", "{{.ID}}").split()
        for name in names:
            docker(kind, "rm", *(["-f", "-v"] if kind == "container" else []), name, check=False)
        swept += names
    return swept


def ensure_base_image() -> str:
    """Debian with Python, made by mmdebstrap from the machine's own mirror."""
    if docker("image", "ls", "-q", BASE_IMAGE):
        return BASE_IMAGE
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    mirror = next(uri for uri in targets if "security" not in uri)
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "base.tar"
        command = [
            machine.which("mmdebstrap") or "mmdebstrap",
            "--variant=minbase",
            "--include=python3,python3-venv,ca-certificates",
            *(f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in ("man", "doc", "locale")),
            '--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/*',
            "--skip=output/dev",  # device nodes would break a later SIF build
            "bookworm",
            str(tar),
            mirror,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"mmdebstrap failed:\n{done.stderr[-2000:]}")
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        docker("import", "--change", f"ENV {path}", str(tar), BASE_IMAGE)
    return BASE_IMAGE


def _requirements() -> str:
    """The versions that this process runs, so that client and cluster speak one protocol."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    todo = ["distributed", "numpy", "cryptography", "rhapsody-py"]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found[name] = version(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name.lower())
    del found["rhapsody-py"]
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found))


def _wheels(folder: Path) -> None:
    """Fill a folder with our wheel and every wheel that the images need."""
    requirements = _requirements()
    key = hashlib.sha256(requirements.encode()).hexdigest()[:16]
    cached = machine.CACHE / "wheels" / key
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not cached.exists():
        fresh = cached.with_suffix(f".{os.getpid()}")
        fresh.mkdir(parents=True)
        (fresh / "requirements.txt").write_text(requirements)
        options = ["--dest", str(fresh), "--no-deps", "--only-binary=:all:"]
        _run([*pip, "download", *options, "-r", str(fresh / "requirements.txt")])
        fresh.rename(cached)
    shutil.copytree(cached, folder)
    _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _digest() -> str:
    """A name for what goes into the image: Dockerfile, our sources, versions beside them."""
    sources = [ROOT / "containers" / "Dockerfile", ROOT / "pyproject.toml"]
    sources += sorted((ROOT / "src").rglob("*.py"))
    digest = hashlib.sha256(_requirements().encode())
    for source in sources:
        digest.update(str(source.relative_to(ROOT)).encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def ensure_image(target: str) -> str:
    """Build a target of ``containers/Dockerfile`` unless an image of the same content is there."""
    image = f"rhapsody-integration/{target}:{_digest()}"
    if docker("image", "ls", "-q", image):
        return image
    base = ensure_base_image()
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        _wheels(context / "wheels")
        shutil.copy(ROOT / "containers" / "Dockerfile", context)
        options = ["--build-arg", f"BASE_IMAGE={base}", "--target", target, "--tag", image]
        docker("build", *options, str(context))
    for old in docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split():
        if old.startswith(f"rhapsody-integration/{target}:") and old != image:
            docker("image", "rm", old, check=False)
    return image
