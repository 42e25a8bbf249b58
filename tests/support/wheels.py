"""Wheels and sdists of this project, built, and installed into empty environments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
_WITHOUT_A_CHECKOUT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def ran(*command: str | Path, folder: Path) -> str:
    """What a command prints that runs in a folder and knows nothing of this checkout."""
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False, env=_WITHOUT_A_CHECKOUT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def built(kind: str, source: Path, out: Path) -> Path:
    """The `wheel` or `sdist` of a source, in the folder `out`."""
    out.mkdir(exist_ok=True)
    return out / ran(sys.executable, "-c", _BUILD, kind, out, folder=source).splitlines()[-1]


def installed(wheel: Path, root: Path) -> Path:
    """The site-packages of a new environment in `root` that has this wheel.

    What the package depends on comes from the environment of the tests: it is large, and no test is about it.
    """
    root.mkdir()
    ran(sys.executable, "-m", "venv", "--without-pip", root, folder=root)
    python = root / "bin" / "python"
    ran(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=root)
    [site] = (root / "lib").glob("python*/site-packages")
    here = [place for place in sys.path if place.rstrip("/").endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    return site
