"""The worlds of a map: clients with so much text each, a share of which is of a source common to all.

A cell of the map is a plain configuration. Every client's text is a pool of equal parts, of which a batch takes equally
many sequences each, and so do measurements. The first parts are of the common source, each a separate shard of it, so
that no two clients have the same bytes. The others are shards of the client's own source.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from worldlm_ray.config.schema import RunConfig
from worldlm_ray.config.values import one_of
from worldlm_ray.errors import ConfigError

COMMON_CORPUS = "python_stdlib"
OWN_CORPORA = ("cpp_headers", "docstrings", "package_descriptions", "python_reference", "licenses")
"""Built-in corpora for the clients' own text, the largest first."""
REPLACED = {
    "seed": "--corner-seeds",
    "method": "`worldlm compare` for other methods",
    "run_dir": "--out",
    "world": "--clients, --common and data_dir=FOLDER",
    "data.pool": "--common and data_dir=FOLDER",
    "data.files": "--common and data_dir=FOLDER",
    "data.corpus": "--common",
    "data.shard": "--clients",
    "data.train_bytes": "--text",
    "data.train_fraction": "--text",
}
"""Keys that a map sets itself, each with its option."""
TWO_FEDERATIONS = 4
"""With so many clients there are two federations. Fewer are children of the world."""
UNITS = {"": 1, "k": 10**3, "M": 10**6}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A text that clients have shards of."""

    name: str
    data: dict[str, Any]
    """`corpus` or `files` of a data section."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A world of a map."""

    text: int
    """Bytes of every client to train on."""
    kinship: Fraction
    """Share of them that is of the common source."""
    seeds: tuple[int, ...] = field(default=(0,), compare=False)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.text}-{str(self.kinship).replace('/', '_')}"

    def __str__(self) -> str:
        return f"{size(self.text)}, kinship {self.kinship}"


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """What the worlds of a map share."""

    base: RunConfig
    common: Source
    own: tuple[Source, ...]
    """One for each client."""
    parts: int
    """Equal parts of every client's text: the fewest that express all kinships of the map."""

    def facts(self) -> dict[str, Any]:
        """Everything that the results depend on, except the cells and the seeds."""
        return {
            "common": self.common.data,
            "own": {source.name: source.data for source in self.own},
            "parts": self.parts,
        }

    def config(self, cell: Cell) -> RunConfig:
        """The configuration of a cell."""
        clients = [self._client(index, cell) for index in range(len(self.own))]
        children = clients
        if len(clients) >= TWO_FEDERATIONS:
            halves = clients[: len(clients) // 2], clients[len(clients) // 2 :]
            children = [{"federation": f"federation{index}", "children": half} for index, half in enumerate(halves)]
        training = replace(self.base.training, batch_size=self.base.training.batch_size // self.parts)
        data = replace(self.base.data, train_bytes=None)
        return replace(self.base, training=training, data=data, world={"children": children})

    def _client(self, index: int, cell: Cell) -> dict[str, Any]:
        number = int(cell.kinship * self.parts)
        common = [
            self.common.data | {"shard": f"{index * number + part + 1}/{len(self.own) * number}"}
            for part in range(number)
        ]
        own = [
            self.own[index].data | {"shard": f"{part + 1}/{self.parts - number}"} for part in range(self.parts - number)
        ]
        pool = [entry | {"train_bytes": cell.text // self.parts} for entry in [*common, *own]]
        return {"client": self.own[index].name, "data": {"pool": pool}}


def worlds(base: RunConfig, common: Source, own: Sequence[Source], kinships: Sequence[Fraction]) -> Worlds:
    """The worlds of a map.

    Args:
        base: gives everything but the tree and the text.
        common: the source of the common text.
        own: the source of each client.
        kinships: of the map.

    Raises:
        ConfigError: a number does not fit another.
    """
    if len(own) < 2:
        raise ConfigError("--clients", f"got {len(own)}", "a federation has two clients at least")
    parts = math.lcm(*(kinship.denominator for kinship in kinships))
    batch = base.training.batch_size
    if batch % parts:
        problem = f"got {batch}, but a batch takes equally many sequences of {parts} parts of a client's text"
        raise ConfigError("training.batch_size", problem, f"give a multiple of {parts}, or other values of --kinship")
    return Worlds(base=base, common=common, own=tuple(own), parts=parts)


def grid(texts: Sequence[int], kinships: Sequence[Fraction], *, corner_seeds: int) -> list[Cell]:
    """The cells of a map. Those at its corners have several seeds, the others one."""
    corners = {(text, kinship) for text in (texts[0], texts[-1]) for kinship in (kinships[0], kinships[-1])}
    return [
        Cell(text=text, kinship=kinship, seeds=tuple(range(corner_seeds if (text, kinship) in corners else 1)))
        for kinship in kinships
        for text in texts
    ]


# ---- what the user types -----------------------------------------------------------------------------------------


def texts_of(given: str) -> list[int]:
    """`12kB, 48000, 1MB` in bytes, sorted.

    Raises:
        ConfigError: one of them is no amount of text.
    """
    found = set()
    for word in given.split(","):
        match = re.fullmatch(r"([0-9_]+(?:\.[0-9]+)?)\s*([kM]?)B?", word.strip())
        amount = float(match[1].replace("_", "") or 0) * UNITS[match[2]] if match else 0
        if amount < 1:
            raise ConfigError("--text", f"{word.strip()!r} is no amount of text", "write 12kB,48kB,1MB")
        found.add(round(amount))
    return sorted(found)


def kinships_of(given: str) -> list[Fraction]:
    """`0, 1/4, 0.5, 1`, sorted.

    Raises:
        ConfigError: one of them is no share.
    """
    found = set()
    for word in given.split(","):
        try:
            share = Fraction(word.strip())
        except (ValueError, ZeroDivisionError):
            share = Fraction(-1)
        if not 0 <= share <= 1:
            raise ConfigError("--kinship", f"{word.strip()!r} is no share", "write fractions from 0 to 1: 0,1/4,1/2,1")
        found.add(share)
    return sorted(found)


def size(number: int) -> str:
    """`12 kB`, `1.5 MB`."""
    for unit, factor in (("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.4g} {unit}"
    return f"{number} B"


# ---- sources -----------------------------------------------------------------------------------------------------


def sources(folder: str | None, *, common: str | None, clients: int) -> tuple[Source, list[Source]]:
    """The common source and one source for each client.

    Args:
        folder: with FEDERATION/CLIENT.txt. None stands for the built-in corpora.
        common: which source is common; in a folder also one of its folders. The largest unless given.
        clients: number of them. They get the first of the other sources: the largest corpora, or files by name.

    Raises:
        ConfigError: the common source is unknown, or there are too few others.
    """
    known = _corpora() if folder is None else _files(folder)
    name = next(iter(known)) if common is None else common
    first, taken = _common(known, name)
    rest = [each for each in known if each not in taken]
    if len(rest) < clients:
        cure = "give fewer" + ("" if folder else ", or data_dir=FOLDER with a .txt file of each")
        raise ConfigError("--clients", f"got {clients}, but there are {len(rest)} sources beside {name}", cure)
    wanted = (rest if folder is None else sorted(rest))[:clients]
    return first, [replace(known[each], name=each.replace("/", "-")) for each in wanted]


def _common(known: dict[str, Source], name: str) -> tuple[Source, list[str]]:
    """The common source, and the names of the sources that it takes."""
    taken = [each for each in known if each == name or each.startswith(f"{name.rstrip('/')}/")]
    if not taken:
        raise ConfigError("--common", f"{name!r} is no source", one_of(name, list(known)))
    if taken == [name]:
        return known[name], taken
    return Source(name=name, data={"files": [file for each in taken for file in known[each].data["files"]]}), taken


def _corpora() -> dict[str, Source]:
    return {name: Source(name=name, data={"corpus": name}) for name in (COMMON_CORPUS, *OWN_CORPORA)}


def _files(folder: str) -> dict[str, Source]:
    """The .txt files of a folder, the largest first."""
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    paths = sorted(
        (path for path in root.rglob("*.txt") if path.is_file()), key=lambda path: (-path.stat().st_size, path)
    )
    if not paths:
        raise ConfigError("data_dir", f"{folder!r} holds no .txt file", "give a folder with FEDERATION/CLIENT.txt")
    names = [str(path.relative_to(root).with_suffix("")) for path in paths]
    return {name: Source(name=name, data={"files": [str(path)]}) for name, path in zip(names, paths, strict=True)}
