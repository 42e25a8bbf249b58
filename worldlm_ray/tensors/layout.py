"""Where each parameter lies in a model's flat buffer: backbone parameters first, key layers after them.

Both parts are one slice each, so an aggregation is a few large memory-bound passes and never a loop over small tensors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from worldlm_ray.errors import ConfigError
from worldlm_ray.tensors.buffers import Flat


@dataclass(frozen=True)
class Entry:
    """One parameter tensor inside the flat buffer."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """First element, counted in elements."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class KeyLayer:
    """A unit of attention: the key parameters of one module, such as `model.layers.2` or `lm_head`.

    `start` and `stop` count elements from the beginning of the key part, not of the whole buffer.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where every parameter lies in the flat buffer: [backbone | key layers]."""

    entries: tuple[Entry, ...]
    backbone_size: int
    """Elements of the backbone; the key part begins here."""
    key_layers: tuple[KeyLayer, ...] = field(default=())

    @cached_property
    def size(self) -> int:
        """Elements of the whole buffer."""
        return sum(entry.size for entry in self.entries)

    @property
    def key_size(self) -> int:
        """Elements of the key part."""
        return self.size - self.backbone_size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer in fp32."""
        return 4 * self.size

    @cached_property
    def hash(self) -> str:
        """Identity of the layout: two nodes may exchange buffers only when theirs are equal."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.name}{list(entry.shape)}@{entry.offset};".encode())
        digest.update(f"|{self.backbone_size}|{[layer.name for layer in self.key_layers]}".encode())
        return digest.hexdigest()[:16]

    def views(self, flat: Flat) -> dict[str, npt.NDArray[np.float32]]:
        """The buffer as named tensors, without a copy."""
        return {e.name: flat[e.offset : e.offset + e.size].reshape(e.shape) for e in self.entries}

    def resized(self, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """The layout of the same parameters, in the same order and with the same key layers, in other shapes.

        Args:
            shapes: of every parameter, by name.
        """
        entries, offset, moved = list[Entry](), 0, dict[int, int]()
        for entry in self.entries:
            entries.append(Entry(entry.name, shapes[entry.name], offset))
            moved[entry.offset] = offset
            offset += entries[-1].size
        moved[self.size] = offset
        whole, split = self.backbone_size, moved[self.backbone_size]
        layers = [
            KeyLayer(layer.name, moved[whole + layer.start] - split, moved[whole + layer.stop] - split)
            for layer in self.key_layers
        ]
        return Layout(tuple(entries), split, tuple(layers))


def make_layout(shapes: Sequence[tuple[str, tuple[int, ...]]], key_patterns: Sequence[str], *, layers: int) -> Layout:
    """Lay parameters out: backbone first, key layers after it, each in model order.

    Args:
        shapes: name and shape of every parameter, in model order.
        key_patterns: shell-style patterns of key parameters; `layers.-1` counts blocks from the end.
        layers: number of blocks of the model.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = [name for name, _ in shapes]
    keys: set[str] = set()
    for index, pattern in enumerate(key_patterns):
        wanted = _count_from_end(pattern, layers)
        matched = {name for name in names if fnmatchcase(name, wanted)}
        if not matched:
            groups = ", ".join(dict.fromkeys(f"{module_of(name)}.*" for name in names))
            raise ConfigError(
                f"model.key_layers[{index}]",
                f"the pattern {pattern!r} matches no parameter",
                f"there are {groups}",
            )
        keys |= matched
    ordered = [item for item in shapes if item[0] not in keys] + [item for item in shapes if item[0] in keys]
    entries, offset = [], 0
    for name, shape in ordered:
        entries.append(Entry(name, tuple(shape), offset))
        offset += prod(shape)
    backbone_size = sum(entry.size for entry in entries if entry.name not in keys)
    return Layout(tuple(entries), backbone_size, tuple(_key_layers(entries, backbone_size, keys)))


def _count_from_end(pattern: str, layers: int) -> str:
    return re.sub(r"layers\.-(\d+)", lambda match: f"layers.{layers - int(match.group(1))}", pattern)


def module_of(name: str) -> str:
    """The module that a parameter belongs to, as a unit of attention: `model.layers.2`, `lm_head`."""
    match = re.match(r"(.*(?:layers|h|blocks)\.\d+)\.", name)
    return match.group(1) if match else name.rsplit(".", 1)[0]


def _key_layers(entries: Iterable[Entry], backbone_size: int, keys: set[str]) -> Iterator[KeyLayer]:
    start, group, stop = 0, None, 0
    for entry in entries:
        if entry.name not in keys:
            continue
        if group is not None and module_of(entry.name) != group:
            yield KeyLayer(group, start, stop)
            start = stop
        group = module_of(entry.name)
        stop = entry.offset + entry.size - backbone_size
    if group is not None:
        yield KeyLayer(group, start, stop)
