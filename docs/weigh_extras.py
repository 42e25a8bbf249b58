"""What each extra of the package weighs beyond a plain installation, from what is installed here.

    python docs/weigh_extras.py

A row per extra: packages that a plain installation lacks, and their files in 10^6 bytes. Packages that are not
installed are named; their weight is left out.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def closure(wanted: list[str]) -> set[str]:
    """Names of packages that requirements bring, with all that these need."""
    found, waiting = set[str](), [Requirement(text) for text in wanted]
    seen = set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        found.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            further = [Requirement(text) for text in needs]
            waiting += [one for one in further if one.marker is None or one.marker.evaluate({"extra": extra})]
    return found


def weight_bytes(name: str) -> int | None:
    """Bytes of a package's files; None if it is not installed."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    places = [Path(str(file.locate())) for file in found.files or []]
    return sum(place.stat().st_size for place in places if place.is_file())


def main() -> None:
    """Print the table."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    plain = closure(project["dependencies"])
    total = sum(weight_bytes(name) or 0 for name in plain)
    print(f"{'plain':12} {total / 1e6:7.0f} MB  {len(plain)} packages")
    for extra, wanted in project["optional-dependencies"].items():
        added = sorted(closure(wanted) - plain)
        known = {name: weight_bytes(name) for name in added}
        lacking = [name for name, weight in known.items() if weight is None]
        heaviest = sorted((name for name in added if known[name]), key=lambda name: -(known[name] or 0))[:3]
        line = f"{extra:12} {sum(weight or 0 for weight in known.values()) / 1e6:7.0f} MB  {len(added)} packages"
        line += f", such as {', '.join(heaviest)}" if heaviest else ""
        print(line + (f"; not installed here: {', '.join(lacking)}" if lacking else ""))


if __name__ == "__main__":
    main()
