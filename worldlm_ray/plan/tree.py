"""The tree of a world: the `world:` part of a configuration, resolved.

Every node inherits its parent's settings (training, aggregation, merge, data, resources, placement, privacy,
simulation) and may override any of them: that is what autonomy of a federation means here. Privacy alone may only
become stricter on the way down. A client may hang anywhere, also directly under the world, and federations nest to any
depth.

A world may span several clusters. `member: europe` stands for a federation or a client of another organisation: the
world knows nothing of what is below it. That organisation's configuration has `joins: FOLDER` and `federation:
world/europe` (or `client: world/europe`) as its root; the nodes above are there as `remote` ones, without actors.

Many that are alike are written once. `client: phone` with `copies: 1000` stands for phone-0001 to phone-1000; a
federation may have copies, too, each with all that is below it. Of a text that several copies are given, each client
has its part (`data.shard`), so that together they have all of it, once; where `data.shard` is set, or
`data.pool`, they all have the same. Settings are resolved once for all copies, which share their key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from worldlm_ray.config import values as schema
from worldlm_ray.config.checks import check_settings, positive
from worldlm_ray.config.schema import INHERITED, MEMBER_KEYS, NODE_KEYS, NodeSettings, RunConfig
from worldlm_ray.config.values import Problems, checked_name, one_of
from worldlm_ray.errors import ConfigError

Kind = Literal["world", "federation", "client"]
_MOST_COPIES = 10_000_000


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
    remote: bool = False
    """Whether it is in another cluster: a member of this world, or what this cluster is a member of."""
    update_tokens: int | None = None
    """Tokens that one update of a member may claim; None for as many as the budget has."""
    required: bool = False
    """Whether the world waits for a member from the beginning, as for its own children."""

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the fields, without what is made from them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

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
    def parents(self) -> list[NodeSpec]:
        """All nodes at or below this one that are no clients, here or in another cluster."""
        return [node for node in self.walk() if node.kind != "client"]

    @cached_property
    def inner(self) -> list[NodeSpec]:
        """All nodes at or below this one that aggregate here."""
        return [node for node in self.parents if not node.remote]

    @cached_property
    def members(self) -> list[NodeSpec]:
        """All members at or below this node: what is below them is in another cluster."""
        return [node for node in self.parents if node.remote and not node.children]

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

    Siblings that train alike, with the same resources and placement, share one: `resources.clients_per_process`.
    """
    return [group for inner in root.parents for group in in_processes(c for c in inner.children if c.kind == "client")]


def in_processes(siblings: Iterable[NodeSpec]) -> list[tuple[NodeSpec, ...]]:
    """The same for some clients of one parent."""
    found, open_ = list[tuple[NodeSpec, ...]](), list[NodeSpec]()
    for child in siblings:
        if open_ and (len(open_) == open_[0].settings.resources.clients_per_process or not may_share(open_[0], child)):
            found.append(tuple(open_))
            open_ = []
        open_.append(child)
    return [*found, tuple(open_)] if open_ else found


def may_share(one: NodeSpec, other: NodeSpec) -> bool:
    """Whether two siblings may live in one process."""
    a, b = one.settings, other.settings
    alike = a.training == b.training and a.privacy == b.privacy  # they take turns at one trainer
    return alike and a.resources == b.resources and a.placement == b.placement


def base_settings(config: RunConfig) -> NodeSettings:
    """What the tree inherits from the top of a configuration."""
    return NodeSettings(**{name: getattr(config, name) for name in INHERITED})


def build(config: RunConfig) -> NodeSpec:
    """Resolve the tree of a configuration.

    Raises:
        ConfigError: no tree, an unknown key, a name twice among siblings, a client with children, a federation
            without, a root that does not go with `joins`, or a setting that cannot be; by the dotted key.
        ConfigErrors: several of them.
    """
    problems = Problems()
    base = base_settings(config)
    check_settings(base, "", problems)
    if not isinstance(config.world, dict) or not config.world:
        problems.add(ConfigError("world", "the tree is missing", "write world: {children: [...]}"))
        problems.check()
    known = frozenset((error.key, error.problem) for error in problems.found)
    kind, path = _root(config)
    *above, name = path.split("/")
    root = _entry(config.world, (kind, name), "world", base, _Found(problems, known))
    problems.check()
    node = _grow(root, name, path, (0, 1))
    for depth in range(len(above), 0, -1):
        node = _remote(above[:depth], base, node)
    return node


def _root(config: RunConfig) -> tuple[Kind, str]:
    """Kind and path of a configuration's root: the world, or a member of a world in another cluster.

    Raises:
        ConfigError: the root does not go with `joins`.
    """
    kinds: list[Kind] = [kind for kind in ("federation", "client") if kind in config.world]
    if config.joins is None:
        if kinds:
            cure = "give the profile of that world as joins, or begin with children"
            raise ConfigError(f"world.{kinds[0]}", "the root is a member's, but joins is not given", cure)
        return "world", "world"
    if len(kinds) != 1:
        cure = "write world: {federation: world/NAME, children: [...]}, or client: world/NAME"
        raise ConfigError("world", "joins is given, but the root does not say which member it is", cure)
    key = f"world.{kinds[0]}"
    names = schema.converted(config.world[kinds[0]], str, key).split("/")
    if len(names) < 2 or names[0] != "world":
        cure = "give the path that the invitation names, such as world/europe"
        raise ConfigError(key, f"got {'/'.join(names)!r}", cure)
    if config.world.get("copies") is not None:
        raise ConfigError("world.copies", f"got {config.world['copies']!r}", "a member joins once: set it below")
    return kinds[0], "/".join(["world", *(checked_name(name, key) for name in names[1:])])


def _remote(path: list[str], settings: NodeSettings, child: NodeSpec) -> NodeSpec:
    """A node of another cluster, above the member that this one is."""
    return NodeSpec(
        kind="federation" if len(path) > 1 else "world",
        name=path[-1],
        path="/".join(path),
        key="joins",
        settings=settings,
        children=(child,),
        remote=True,
    )


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One entry of the configuration, resolved: a node, or as many as it has copies."""

    kind: Kind
    name: str
    key: str
    settings: NodeSettings
    copies: int | None
    children: tuple[_Entry, ...]
    limits: dict[str, Any]
    is_member: bool = False

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
        data = replace(data, shard=f"{part[0] + 1}/{part[1]}")
    if settings.privacy.unit == "record":
        data = replace(data, validation_fraction=0.0)  # epsilon does not cover what is chosen on a text
    if data != settings.data:
        settings = replace(settings, data=data)
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
        remote=entry.is_member,
        **entry.limits,
    )


@dataclass(frozen=True)
class _Found:
    """Where the problems of a tree are gathered."""

    problems: Problems
    above: frozenset[tuple[str, str]]
    """Key below the node, and problem, of settings that nodes above have: those are not told again."""

    def settings(self, settings: NodeSettings, key: str) -> _Found:
        """Check a node's settings; returns what its children should not tell again."""
        own = Problems()
        check_settings(settings, key, own)
        named = {(error.key.removeprefix(f"{key}."), error.problem): error for error in own.found}
        for known, error in named.items():
            if known not in self.above:
                self.problems.add(error)
        return _Found(self.problems, self.above | named.keys())


def _entry(raw: dict[str, Any], called: tuple[Kind, str], key: str, inherited: NodeSettings, found: _Found) -> _Entry:
    """One entry with all that is below it. What is wrong is kept in `found`, and read as if it were not there."""
    (kind, name), problems = called, found.problems
    for given in raw:
        if given not in NODE_KEYS:
            problems.add(ConfigError(f"{key}.{given}", "unknown key", one_of(str(given), NODE_KEYS)))
    overrides = {name: raw[name] for name in INHERITED if raw.get(name) is not None}
    if (
        "data" in overrides
        and isinstance(overrides["data"], dict)
        and {"files", "corpus", "pool"} & set(overrides["data"])
    ):
        # A node's own source replaces an inherited one: files here must not add up with a corpus from above.
        overrides["data"] = {"files": [], "corpus": None, "pool": [], **overrides["data"]}
    settings = schema.merged(inherited, overrides, prefix=key, problems=problems)
    below = found.settings(settings, key)
    children, limits, copies = raw.get("children"), dict[str, int](), None
    with problems.kept():
        limits = _limits(raw, called, key)
    with problems.kept():
        copies = _copies(raw.get("copies"), kind, key)
    if kind == "client" and children:
        problems.add(ConfigError(f"{key}.children", f"client {name!r} has children", "make it a federation"))
    if kind != "client" and (not isinstance(children, list) or not children):
        got = f"{kind} {name!r} has no children"
        problems.add(ConfigError(f"{key}.children", got, "list federations or clients"))
    return _Entry(
        kind=kind,
        name=name,
        key=key,
        settings=settings,
        copies=copies,
        children=_children(children, key, settings, below) if isinstance(children, list) else (),
        limits=limits,
    )


def _limits(raw: dict[str, Any], called: tuple[Kind, str], key: str) -> dict[str, int]:
    """Fewest and most clients of a node."""
    (kind, name), limits = called, dict[str, int]()
    for limit in ("min_clients", "max_clients"):
        if raw.get(limit) is None:
            continue
        if kind == "client":
            raise ConfigError(f"{key}.{limit}", f"{name!r} is a client", "set it at a federation, or at the world")
        limits[limit] = schema.converted(raw[limit], int, f"{key}.{limit}")
        if limits[limit] < (limit == "max_clients"):
            raise ConfigError(f"{key}.{limit}", f"got {raw[limit]!r}", "give a whole number of clients")
    if limits.get("min_clients", 0) > limits.get("max_clients", math.inf):
        raise ConfigError(f"{key}.min_clients", f"{limits['min_clients']} is above max_clients", "swap them")
    return limits


def _copies(copies: Any, kind: Kind, key: str) -> int | None:
    if copies is None:
        return None
    if kind == "world":
        cure = "there is one world: set it at a federation or a client"
        raise ConfigError(f"{key}.copies", f"got {copies!r}", cure)
    number: int = schema.converted(copies, int, f"{key}.copies")
    if number < 1 or number > _MOST_COPIES:
        cure = "give a number above 0" if number < 1 else f"give at most {_MOST_COPIES:,}"
        raise ConfigError(f"{key}.copies", f"got {copies!r}", cure)
    return number


def _children(raw: list[Any], key: str, settings: NodeSettings, found: _Found) -> tuple[_Entry, ...]:
    entries, taken = [], dict[str, str]()
    for index, item in enumerate(raw):
        place = f"{key}.children[{index}]"
        try:
            kind, name = _kind_and_name(item, place)
            is_member = "member" in item
            entry = _member(item, name, place, settings) if is_member else None
        except ConfigError as error:
            found.problems.add(error)
            continue
        entry = entry or _entry(item, (kind, name), place, settings, found)
        twice = next((each for each in entry.names if each in taken), None)
        if twice is not None:
            got = f"the name {twice!r} is taken by {taken[twice]}"
            found.problems.add(ConfigError(f"{place}.{kind}", got, "siblings need different names"))
        taken |= dict.fromkeys(entry.names, place)
        entries.append(entry)
    return tuple(entries)


def _member(raw: dict[str, Any], name: str, key: str, settings: NodeSettings) -> _Entry:
    """The entry of a member: it has no settings here, since its own organisation decides."""
    for given in raw:
        if given not in MEMBER_KEYS:
            got = "a member is configured in its own cluster" if given in NODE_KEYS else "unknown key"
            raise ConfigError(f"{key}.{given}", got, f"give {' or '.join(MEMBER_KEYS)} alone")
    limits = dict[str, Any]()
    if raw.get("update_tokens") is not None:
        limits["update_tokens"] = schema.converted(raw["update_tokens"], int, f"{key}.update_tokens")
        positive(limits["update_tokens"], f"{key}.update_tokens")
    if raw.get("required") is not None:
        limits["required"] = schema.converted(raw["required"], bool, f"{key}.required")
    return _Entry(
        kind="federation",
        name=name,
        key=key,
        settings=settings,
        copies=None,
        children=(),
        limits=limits,
        is_member=True,
    )


def _kind_and_name(item: Any, place: str) -> tuple[Kind, str]:
    if not isinstance(item, dict):
        raise ConfigError(place, f"got {item!r}", "write federation: NAME or client: NAME with its settings")
    kinds = [kind for kind in ("federation", "client", "member") if kind in item]
    if len(kinds) != 1:
        cure = "name it by one key: federation, client or member"
        raise ConfigError(place, "is neither a federation nor a client", cure)
    kind: Kind = "client" if kinds[0] == "client" else "federation"
    return kind, checked_name(item[kinds[0]], f"{place}.{kinds[0]}")
