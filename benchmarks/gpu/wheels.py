"""Wheels for a machine without a network, in parts that each fit one transfer.

    here    python -m benchmarks.gpu.wheels collect FOLDER [--python 3.12] [--have FILE] [--with-ray]
    there   python benchmarks/gpu/wheels.py install FOLDER

`collect` makes FOLDER/part-01, part-02, ... A wheel that is larger than a part is cut into pieces, and `install` joins
them. What the machine has already is not brought: FILE names further packages that it has, with commas or spaces
between them. The versions are those installed here. The project comes as a wheel, too. `install` needs nothing but
Python and pip.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PART_BYTES = 60 * 2**20
THERE = frozenset({"torch", "numpy", "transformers", "peft", "safetensors", "tokenizers", "msgpack", "worldlm-ray"})
"""Packages that such a machine has."""
ROOT = Path(__file__).parents[2]
RAY = "ray"
PIECE = ".piece-"


def needed(*, with_ray: bool, have: Iterable[str] = ()) -> dict[str, str]:
    """Version of every package that worldlm_ray needs and such a machine lacks, by name."""
    there = _closure({"torch"}, skip=frozenset())
    skip = THERE | there.keys() | set(map(_canonical, have)) | (frozenset() if with_ray else {RAY})
    return {name: version for name, version in _closure({"worldlm-ray"}, skip=skip).items() if name not in skip}


def _closure(names: set[str] | frozenset[str], *, skip: set[str] | frozenset[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform or Python
        found[name] = package.version
        for line in package.requires or []:
            other = _canonical(re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0])
            if "extra ==" not in line and other not in skip:
                waiting.append(other)
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def collect(folder: Path, *, python: str, with_ray: bool, have: Iterable[str] = ()) -> list[Path]:
    """Download the wheels and lay them into parts; returns the parts' folders."""
    with tempfile.TemporaryDirectory() as place:
        wheels = Path(place)
        for name, version in sorted(needed(with_ray=with_ray, have=have).items()):
            print(f"{name} {version}", flush=True)
            _bring(f"{name}=={version}", wheels, python)
        subprocess.run([*_pip(), "wheel", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
        return split(sorted(wheels.iterdir()), folder)


def _bring(requirement: str, wheels: Path, python: str) -> None:
    """A wheel for the other Python; where there is none, one that is built here from pure Python."""
    pip = _pip()
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("2014", "_2_17", "_2_28", "_2_34")]
    binary = ["download", "--only-binary=:all:", f"--python-version={python}", *platforms, "--no-deps"]
    if subprocess.run([*pip, *binary, "-d", str(wheels), requirement], check=False, capture_output=True).returncode:
        subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), requirement], check=True)


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def split(files: list[Path], folder: Path, *, part_bytes: int = PART_BYTES) -> list[Path]:
    """Lay files into part-01, part-02, ... of at most so many bytes each, the large ones in pieces."""
    parts: list[Path] = []
    left = 0
    for file in files:
        content = file.read_bytes()
        pieces = [content[at : at + part_bytes] for at in range(0, len(content), part_bytes)]
        for number, piece in enumerate(pieces):
            if len(piece) > left:
                parts.append(folder / f"part-{len(parts) + 1:02d}")
                parts[-1].mkdir(parents=True)
                left = part_bytes
            name = file.name if len(pieces) == 1 else f"{file.name}{PIECE}{number:03d}"
            (parts[-1] / name).write_bytes(piece)
            left -= len(piece)
    return parts


def join(folder: Path, wheels: Path) -> list[Path]:
    """The files that `split` laid into parts, whole again."""
    wheels.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("part-*/*"), key=lambda path: path.name):
        found.setdefault(path.name.split(PIECE)[0], []).append(path)
    for name, pieces in found.items():
        (wheels / name).write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    return sorted(wheels / name for name in found)


def install(folder: Path) -> None:
    """Join the parts and install the wheels, without a network and without what they depend on."""
    with tempfile.TemporaryDirectory() as place:
        wheels = [str(path) for path in join(folder, Path(place))]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels], check=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["collect", "install"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version there")
    parser.add_argument("--have", type=Path, help="file with names of further packages that the machine has")
    parser.add_argument("--with-ray", action="store_true", help="bring Ray too")
    options = parser.parse_args()
    if options.what == "install":
        install(options.folder)
        return
    have = re.split(r"[\s,]+", options.have.read_text(encoding="utf-8")) if options.have else []
    for part in collect(options.folder, python=options.python, with_ray=options.with_ray, have=filter(None, have)):
        print(f"{part}: {sum(file.stat().st_size for file in part.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
