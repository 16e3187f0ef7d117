"""The Python in the documentation runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text())


def said(code: str, folder: Path) -> str:
    """What a block prints, run by itself as a script with warnings as errors."""
    script = folder / "block.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_the_blocks_that_are_run() -> None:
    assert len(blocks("README.md")) == len(PRINTED)


PRINTED = ["500.5\n", ""]


@pytest.mark.parametrize(("number", "printed"), list(enumerate(PRINTED)))
def test_the_readme(number: int, printed: str, tmp_path: Path) -> None:
    assert said(blocks("README.md")[number], tmp_path) == printed


def test_the_first_script_for_dask(tmp_path: Path) -> None:
    assert said(blocks("docs/dask.md")[0], tmp_path) == "500500\n"
