"""The tree of a world: the `world:` part of a configuration, resolved.

Every node inherits its parent's settings (training, aggregation, merge, data, resources, placement, privacy,
simulation) and may override any of them: that is what autonomy of a federation means here. Privacy alone may only
become stricter on the way down. A client may hang anywhere, also directly under the world, and federations nest to any
depth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
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
    """Dotted key of the node in the configuration, for messages."""
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
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def clients(self) -> list[NodeSpec]:
        """All clients at or below this node."""
        return [node for node in self.walk() if node.kind == "client"]

    @property
    def inner(self) -> list[NodeSpec]:
        """All nodes at or below this one that aggregate."""
        return [node for node in self.walk() if node.kind != "client"]


def parent_path(path: str) -> str | None:
    """Path of a node's parent; None for the world."""
    return path.rsplit("/", 1)[0] if "/" in path else None


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
    return _node(config.world, kind="world", name="world", path="world", key="world", inherited=base)


def _node(raw: dict[str, Any], *, kind: Kind, name: str, path: str, key: str, inherited: NodeSettings) -> NodeSpec:
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
    if kind == "client":
        if children:
            raise ConfigError(f"{key}.children", f"client {name!r} has children", "make it a federation")
        return NodeSpec(kind=kind, name=name, path=path, key=key, settings=settings)
    if not isinstance(children, list) or not children:
        raise ConfigError(f"{key}.children", f"{kind} {name!r} has no children", "list federations or clients")
    return NodeSpec(
        kind=kind,
        name=name,
        path=path,
        key=key,
        settings=settings,
        children=_children(children, path, key, settings),
        **limits,
    )


def _children(raw: list[Any], path: str, key: str, settings: NodeSettings) -> tuple[NodeSpec, ...]:
    found: dict[str, NodeSpec] = {}
    for index, item in enumerate(raw):
        place = f"{key}.children[{index}]"
        kind, name = _kind_and_name(item, place)
        if name in found:
            raise ConfigError(
                f"{place}.{kind}",
                f"the name {name!r} is taken by {found[name].key}",
                "siblings need different names",
            )
        found[name] = _node(item, kind=kind, name=name, path=f"{path}/{name}", key=place, inherited=settings)
    return tuple(found.values())


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
