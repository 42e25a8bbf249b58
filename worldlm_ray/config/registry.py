"""Registries: what a configuration chooses by name, and where a package or a user's file adds to it.

A registry maps names to values of one kind, such as staleness functions. A module adds a name when it is imported:

    @staleness("polynomial", a=0.5)
    def polynomial(tau: int, a: float, b: float) -> float:
        \"""(tau + 1)^-a. Source: Xie, Koyejo, Gupta, arXiv 1903.03934, section 5.2.\"""

Names come from three places, in this order: our own modules, imported at the first use of a registry; modules that an
installed package names as entry points of the group `worldlm_ray.rules`, imported once in each process, and only for a
name that is not ours or for the list of all names; and modules and files that a configuration names (`rules`, see
config/rule_files.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar

from worldlm_ray.config.values import listed, nearest, shown, unknown_name
from worldlm_ray.errors import ConfigError

T = TypeVar("T")
GROUP = "worldlm_ray.rules"
"""Entry points of this group name modules that register."""
_LOADED = set[str]()
"""Groups whose entry points this process has imported."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One name of a registry."""

    value: T
    source: Any
    """The function or class that was registered; its docstring is what documentation lists."""


class Registry(Generic[T]):
    """Names of one kind of rule.

    Args:
        what: the kind, in the singular, for messages.
        key: dotted key of the configuration that chooses, for messages.
        modules: our modules that register, in the order in which names are listed.
        off: the configuration's word for no rule, if there is one.
    """

    def __init__(self, what: str, key: str, *modules: str, off: str | None = None) -> None:
        self.what, self.key, self.modules, self.off = what, key, modules, off
        self._entries: dict[str, Entry[T]] = {}

    def add(self, name: str, value: T, source: Any) -> None:
        """Register a value.

        Args:
            name: what a configuration writes.
            value: what `get` returns.
            source: the function or class behind it.

        Raises:
            ValueError: the name is taken, or the source has no docstring.
        """
        old = self._entries.get(name)
        if name == self.off or (old is not None and _identity(old.source) != _identity(source)):
            raise ValueError(f"{self.what} {name!r} is registered twice")
        if not inspect.getdoc(source):
            raise ValueError(f"{self.what} {name!r} has no docstring: say what it computes, and its source")
        self._entries[name] = Entry(value, source)

    def remove(self, name: str) -> None:
        """Take a name out, as a test does with its own."""
        del self._entries[name]

    def get(self, name: str) -> T:
        """The value of a name.

        Raises:
            ConfigError: there is none of that name; names the nearest known one, or lists them all.
        """
        if name not in self:
            raise unknown_name(self.key, name, self.names())
        return self._entries[name].value

    def __contains__(self, name: object) -> bool:
        if name in self._entries:
            return True
        self._import_ours()
        if name not in self._entries:
            import_entry_points()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> tuple[str, ...]:
        """Every name, ours first, whatever was imported first."""
        self._import_ours()
        import_entry_points()
        rank = {module: place for place, module in enumerate(self.modules)}
        return tuple(sorted(self._entries, key=lambda name: rank.get(self._entries[name].source.__module__, len(rank))))

    def documented(self) -> dict[str, str]:
        """The docstring of each name."""
        return {name: inspect.getdoc(self._entries[name].source) or "" for name in self.names()}

    def choice(self, got: Any, key: str) -> str:
        """A value of the configuration, checked.

        Args:
            got: the value.
            key: its dotted key.

        Raises:
            ConfigError: it is no name of this registry.
        """
        if isinstance(got, str) and (got == self.off or got in self):
            return got
        known = (*([] if self.off is None else [self.off]), *self.names())
        close = nearest(got, known) if isinstance(got, str) else ""
        raise ConfigError(key, f"got {shown(got)}", f"{close}expected one of {listed(known)}")

    def _import_ours(self) -> None:
        for module in self.modules:
            import_module(module)


def import_entry_points() -> None:
    """Import the modules that installed packages name, once in each process.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    if GROUP in _LOADED:
        return
    for point in metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            of = f" of the package {point.dist.name}" if point.dist is not None else ""
            got = f"the entry point {point.name}{of} cannot be imported ({type(error).__name__}: {error})"
            raise ConfigError("rules", got, "mend or uninstall that package") from error
    _LOADED.add(GROUP)


def _identity(source: Any) -> tuple[str, str]:
    """Module and name in it: a module that is imported again replaces what it registered before."""
    return source.__module__, source.__qualname__
