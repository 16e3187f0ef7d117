"""``python -m rhapsody``: the same command as ``rhapsody``."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main(prog_name="python -m rhapsody")
