"""A layout in parts of one layer, which the workers of a sharded model gather and send one by one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from worldlm_ray.tensors.layout import Entry, Layout, module_of


@dataclass(frozen=True)
class Span:
    """The parameters of one module, which lie next to each other in the flat buffer."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def where(self) -> slice:
        """Their part of the flat buffer."""
        last = self.entries[-1]
        return slice(self.entries[0].offset, last.offset + last.size)


def spans(layout: Layout) -> list[Span]:
    """The layout in parts of one module: embeddings, every block, the norm, the head."""
    grouped = groupby(layout.entries, key=lambda entry: module_of(entry.name))
    return [Span(name, tuple(entries)) for name, entries in grouped]
