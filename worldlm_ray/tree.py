"""The tree of a world: the `world:` part of a configuration, resolved.

Every node inherits its parent's settings (training, aggregation, merge, data, resources, placement, privacy,
simulation) and may override any of them: that is what autonomy of a federation means here. Privacy alone may only
become stricter on the way down. A client may hang anywhere, also directly under the world, and federations nest to any
depth.

Many that are alike are written once. `client: phone` with `copies: 1000` stands for phone-0001 to phone-1000; a
federation may have copies, too, each with all that is below it. Of a text that several copies are given, each client
has a part of its own (`data.shard`), so that together they have all of it, once; where `data.shard` is set, or
`data.pool`, they all have the same. Settings are resolved once for all copies, which share their key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from worldlm_ray.config import (
    INHERITED,
    NODE_KEYS,
    NodeSettings,
    RunConfig,
    check_settings,
    check_stricter,
    merge_into,
    one_of,
)
from worldlm_ray.errors import ConfigError

Kind = Literal["world", "federation", "client"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """One node of the tree with the settings in force there."""

    kind: Kind
    name: str
    path: str
    """Names from the root, such as `world/europe/italy`."""
    key: str
    """Dotted key of the node in the configuration, for messages. Copies share it."""
    settings: NodeSettings
    children: tuple[NodeSpec, ...] = ()
    min_clients: int | None = None
    """A run begins once so many of the clients directly below are there; None for all of them."""
    max_clients: int | None = None
    """So many of them train at a time; when one leaves, the next takes its place. None for all."""

    @property
    def elastic(self) -> bool:
        """Whether clients directly below may come later than the run begins."""
        return self.min_clients is not None or self.max_clients is not None

    def walk(self) -> Iterator[NodeSpec]:
        """This node and everything below it, parents first, in the order of the configuration."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))

    @cached_property
    def clients(self) -> list[NodeSpec]:
        """All clients at or below this node."""
        return [node for node in self.walk() if node.kind == "client"]

    @cached_property
    def inner(self) -> list[NodeSpec]:
        """All nodes at or below this one that aggregate."""
        return [node for node in self.walk() if node.kind != "client"]

    def one_of_each(self) -> list[NodeSpec]:
        """This node and everything below it; of those that are copies of each other, the first."""
        found = dict[str, NodeSpec]()
        for node in self.walk():
            found.setdefault(node.key, node)
        return list(found.values())


def parent_path(path: str) -> str | None:
    """Path of a node's parent; None for the world."""
    return path.rsplit("/", 1)[0] if "/" in path else None


def processes(root: NodeSpec) -> list[tuple[NodeSpec, ...]]:
    """The clients of a tree by the process that they live in, in the order of the tree.

    Siblings that train alike, with the same resources and placement, share one if `resources.share` says so.
    """
    found = list[tuple[NodeSpec, ...]]()
    for inner in root.inner:
        open_: list[NodeSpec] = []
        for child in (child for child in inner.children if child.kind == "client"):
            if open_ and (len(open_) == open_[0].settings.resources.share or not _may_share(open_[0], child)):
                found.append(tuple(open_))
                open_ = []
            open_.append(child)
        if open_:
            found.append(tuple(open_))
    return found


def _may_share(one: NodeSpec, other: NodeSpec) -> bool:
    a, b = one.settings, other.settings
    return a.training == b.training and a.resources == b.resources and a.placement == b.placement


def build(config: RunConfig) -> NodeSpec:
    """Resolve the tree of a configuration.

    Raises:
        ConfigError: no tree, an unknown key, a name twice among siblings, a client with children, a federation
            without, or a setting that cannot be; by the dotted key.
    """
    if not isinstance(config.world, dict) or not config.world:
        raise ConfigError("world", "the tree is missing", "write world: {children: [...]}")
    base = NodeSettings(**{name: getattr(config, name) for name in INHERITED})
    check_settings(base, "")
    world = _entry(config.world, kind="world", name="world", key="world", inherited=base)
    return _grow(world, "world", "world", (0, 1))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One entry of the configuration, resolved: a node, or as many as it has copies."""

    kind: Kind
    name: str
    key: str
    settings: NodeSettings
    copies: int | None
    children: tuple[_Entry, ...]
    limits: dict[str, int]

    @property
    def names(self) -> list[str]:
        """What the node is called, or each of its copies."""
        if self.copies is None:
            return [self.name]
        width = len(str(self.copies))
        return [f"{self.name}-{number:0{width}}" for number in range(1, self.copies + 1)]


def _grow(entry: _Entry, name: str, path: str, part: tuple[int, int]) -> NodeSpec:
    """The node of an entry, with all that is below it.

    Args:
        entry: the entry.
        name: of the node: the entry's, or that of one of its copies.
        path: of the node.
        part: which of how many copies it is, from 0, those of the nodes above it counted.
    """
    settings, children = entry.settings, list[NodeSpec]()
    data = settings.data
    if entry.kind == "client" and part[1] > 1 and data.shard is None and not data.pool:
        settings = replace(settings, data=replace(data, shard=f"{part[0] + 1}/{part[1]}"))
    for child in entry.children:
        copies = child.copies or 1
        for index, child_name in enumerate(child.names):
            place = (part[0] * copies + index, part[1] * copies)
            children.append(_grow(child, child_name, f"{path}/{child_name}", place))
    return NodeSpec(
        kind=entry.kind,
        name=name,
        path=path,
        key=entry.key,
        settings=settings,
        children=tuple(children),
        **entry.limits,
    )


def _entry(raw: dict[str, Any], *, kind: Kind, name: str, key: str, inherited: NodeSettings) -> _Entry:
    for given in raw:
        if given not in NODE_KEYS:
            raise ConfigError(f"{key}.{given}", "unknown key", one_of(str(given), NODE_KEYS))
    overrides = {name: raw[name] for name in INHERITED if raw.get(name) is not None}
    if (
        "data" in overrides
        and isinstance(overrides["data"], dict)
        and {"files", "corpus", "pool"} & set(overrides["data"])
    ):
        # A node's own source replaces an inherited one: files here must not add up with a corpus from above.
        overrides["data"] = {"files": [], "corpus": None, "pool": [], **overrides["data"]}
    settings = merge_into(inherited, overrides, prefix=key)
    check_settings(settings, key)
    check_stricter(settings.privacy, inherited.privacy, f"{key}.privacy")
    children = raw.get("children")
    limits = {name: raw[name] for name in ("min_clients", "max_clients") if raw.get(name) is not None}
    for name_, value in limits.items():
        if kind == "client":
            raise ConfigError(
                f"{key}.{name_}",
                f"{name!r} is a client",
                "set it at a federation, or at the world",
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < (name_ == "max_clients"):
            raise ConfigError(f"{key}.{name_}", f"got {value!r}", "give a whole number of clients")
    if limits.get("min_clients", 0) > limits.get("max_clients", math.inf):
        raise ConfigError(
            f"{key}.min_clients",
            f"{limits['min_clients']} is above max_clients",
            "swap them",
        )
    copies = raw.get("copies")
    is_number = isinstance(copies, int) and not isinstance(copies, bool) and copies > 0
    if copies is not None and (kind == "world" or not is_number):
        cure = "there is one world: set it at a federation or a client" if kind == "world" else "give a number above 0"
        raise ConfigError(f"{key}.copies", f"got {copies!r}", cure)
    if kind == "client" and children:
        raise ConfigError(f"{key}.children", f"client {name!r} has children", "make it a federation")
    if kind != "client" and (not isinstance(children, list) or not children):
        raise ConfigError(f"{key}.children", f"{kind} {name!r} has no children", "list federations or clients")
    return _Entry(
        kind=kind,
        name=name,
        key=key,
        settings=settings,
        copies=copies,
        children=_children(children or [], key, settings),
        limits=limits,
    )


def _children(raw: list[Any], key: str, settings: NodeSettings) -> tuple[_Entry, ...]:
    entries, taken = [], dict[str, str]()
    for index, item in enumerate(raw):
        place = f"{key}.children[{index}]"
        kind, name = _kind_and_name(item, place)
        entry = _entry(item, kind=kind, name=name, key=place, inherited=settings)
        for found in entry.names:
            if found in taken:
                got = f"the name {found!r} is taken by {taken[found]}"
                raise ConfigError(f"{place}.{kind}", got, "siblings need different names")
            taken[found] = place
        entries.append(entry)
    return tuple(entries)


def _kind_and_name(item: Any, place: str) -> tuple[Kind, str]:
    if not isinstance(item, dict):
        raise ConfigError(place, f"got {item!r}", "write federation: NAME or client: NAME with its settings")
    kinds: list[Kind] = [kind for kind in ("federation", "client") if item.get(kind) is not None]
    if len(kinds) != 1:
        raise ConfigError(place, "is neither a federation nor a client", "name it by one key, federation or client")
    name = str(item[kinds[0]])
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{place}.{kinds[0]}", f"{name!r} is no name", "use letters, digits, '_', '-' and '.'")
    return kinds[0], name
