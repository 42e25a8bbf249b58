"""Values of a configuration, checked against the types of frozen dataclasses. Every problem is found, not the first.

str          text; a number or a bool that a program gives is refused, since its spelling is lost
int          whole numbers below 2^63, also spelled 1e6 or 1_000_000
float        finite numbers: infinity and nan are refused
bool         true, false, yes, no, on, off
Literal      one of its values
Annotated    text that its `choice` takes: a name of a registry
X | None     null too
list, dict   of these; a null in one is refused
"""

from __future__ import annotations

import difflib
import math
import os
import unicodedata
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from worldlm_ray.errors import ConfigError, ConfigErrors

T = TypeVar("T")
NAMED = 50
"""As many names are listed in a message, at most."""
LARGEST_INT = 2**63
_NAME_BYTES = 200
"""Longest name of a node in UTF-8: names become folders, whose names have 255 bytes at most."""
_BOOLS = {"true": True, "yes": True, "on": True, "y": True, "1": True}
_BOOLS |= {"false": False, "no": False, "off": False, "n": False, "0": False}


class Problems:
    """Gathers the problems of a configuration, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.found: list[ConfigError] = []

    def add(self, error: ConfigError) -> None:
        """Keep a problem, or each of several."""
        known = {(one.key, one.problem) for one in self.found}
        self.found += [one for one in error.each if (one.key, one.problem) not in known]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the problem that ends what is done in this context."""
        try:
            yield
        except ConfigError as error:
            self.add(error)

    def check(self) -> None:
        """Raise what was found.

        Raises:
            ConfigError: the problem.
            ConfigErrors: the problems, if there are several.
        """
        if self.found:
            raise self.found[0] if len(self.found) == 1 else ConfigErrors(self.found)


def hints_of(schema: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass, which must not be changed."""
    return _hints(schema)


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def merged(schema: T, overrides: Any, *, prefix: str, problems: Problems) -> T:
    """A frozen dataclass with some fields replaced. An empty section is as good as none.

    Args:
        schema: the instance that gives keys, types and defaults.
        overrides: a mapping with some of its keys.
        prefix: dotted key of the mapping itself, for messages.
        problems: takes unknown keys and wrong values; such a field keeps its default.
    """
    assert is_dataclass(schema)
    if not isinstance(overrides, dict):
        problems.add(ConfigError(prefix or "config", f"got {shown(overrides)}", "expected a mapping of keys"))
        return schema
    hints, values = hints_of(type(schema)), dict[str, Any]()
    for key, value in overrides.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            problems.add(ConfigError(dotted, "unknown key", one_of(str(key), [f.name for f in fields(schema)])))
            continue
        known = getattr(schema, key)
        with problems.kept():
            if not is_dataclass(known):
                values[key] = converted(value, hints[key], dotted)
            elif value is not None:
                values[key] = merged(known, value, prefix=dotted, problems=problems)
    return replace(schema, **values)  # type: ignore[type-var]


def converted(value: Any, hint: Any, key: str) -> Any:
    """A value as the type that a field has.

    Raises:
        ConfigError: it cannot be that, by the key; several in one list or mapping at once.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in options:
        return None
    options = tuple(option for option in options if option is not NoneType)
    optional = len(options) < len(get_args(hint))
    if len(options) > 1:  # a number or a word
        return _finite(value, key, optional=False) if isinstance(value, float) else _plain(value, options, key)
    [kind] = options
    if get_origin(kind) is list:
        return _listed(value, get_args(kind)[0], key)
    if get_origin(kind) is dict:
        return _mapped(value, get_args(kind)[1], key)
    if get_origin(kind) is Literal:
        if value not in get_args(kind) or not isinstance(value, str):
            raise ConfigError(key, f"got {shown(value)}", "expected one of " + ", ".join(get_args(kind)))
        return value
    if get_origin(kind) is Annotated:
        return get_args(kind)[1].choice(value, key)
    if kind is float:
        return _number(value, key, optional=optional)
    simple = {str: _text, int: _whole, bool: _bool}
    if kind in simple:
        return simple[kind](value, key)
    return _any(value, key)


def _text(value: Any, key: str) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        cure = "expected text" if isinstance(value, list | dict) else "expected text: put it in quotes"
        raise ConfigError(key, f"got {shown(value)}", cure)
    if "\0" in value:
        raise ConfigError(key, f"got {shown(value)}", "expected text without a NUL character")
    return value


def _whole(value: Any, key: str) -> int:
    number = value
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            number = _parsed(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ConfigError(key, f"got {shown(value)}", "expected a whole number")
    if abs(number) >= LARGEST_INT:
        raise ConfigError(key, f"got {shown(value)}", "expected a whole number below 2^63")
    return number


def _number(value: Any, key: str, *, optional: bool) -> float:
    number = _parsed(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ConfigError(key, f"got {shown(value)}", "expected a number")
    try:
        return _finite(float(number), key, optional=optional)
    except OverflowError:
        raise ConfigError(key, f"got {shown(value)}", "expected a number below 1e308") from None


def _finite(value: float, key: str, *, optional: bool) -> float:
    if not math.isfinite(value):
        if key.endswith("target_epsilon"):
            cure = "remove the privacy section where no privacy is wanted"
        else:
            cure = "give a finite number" + (", or null for no limit" if optional else "")
        raise ConfigError(key, f"got {value}", cure)
    return value


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bool(value: Any, key: str) -> bool:
    found = value if isinstance(value, bool) else _BOOLS.get(str(value).lower())
    if found is None or isinstance(value, list | dict | float):
        raise ConfigError(key, f"got {shown(value)}", "expected true or false")
    return found


def _plain(value: Any, options: tuple[Any, ...], key: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, options):
        raise ConfigError(key, f"got {shown(value)}", "expected a number or a word")
    if isinstance(value, int) and abs(value) >= LARGEST_INT:
        raise ConfigError(key, f"got {shown(value)}", "expected a number below 2^63")
    return value


def _listed(value: Any, kind: Any, key: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(key, f"got {shown(value)}", "expected a list, such as [a, b]")
    problems, found = Problems(), []
    for place, element in enumerate(value):
        with problems.kept():
            found.append(_element(element, kind, f"{key}[{place}]"))
    problems.check()
    return found


def _mapped(value: Any, kind: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(key, f"got {shown(value)}", "expected a mapping of keys")
    problems, found = Problems(), {}
    for name, element in value.items():
        with problems.kept():
            found[_text(name, f"{key}.{name}")] = _element(element, kind, f"{key}[{name}]")
    problems.check()
    return found


def _element(value: Any, kind: Any, key: str) -> Any:
    if kind is not Any and (value is None or isinstance(value, list | dict)):
        raise ConfigError(key, f"got {shown(value)}", "expected one plain value, such as a name or a number")
    return converted(value, kind, key)


def _any(value: Any, key: str) -> Any:
    """A value whose type the schema leaves open: copied, with finite numbers only."""
    waiting = [(key, value)]
    while waiting:
        place, each = waiting.pop()
        if isinstance(each, float):
            _finite(each, place, optional=False)
        elif isinstance(each, dict):
            waiting += [(f"{place}.{name}", below) for name, below in each.items()]
        elif isinstance(each, list):
            waiting += [(f"{place}[{index}]", below) for index, below in enumerate(each)]
    return deepcopy(value)


def checked_name(given: Any, key: str) -> str:
    """A node's name, in Unicode's normal form C, so that names that look alike are alike.

    Raises:
        ConfigError: it cannot be one, by the key.
    """
    name = unicodedata.normalize("NFC", converted(given, str, key))
    # Letters of every script, with the marks that some write above or below a letter.
    fit = all(c in "_.-:" or c.isalnum() or unicodedata.category(c)[0] == "M" for c in name)
    if not fit or not name[:1].isalnum():
        cure = "use letters, digits, '_', '-', '.' and ':', and begin with a letter or digit"
        raise ConfigError(key, f"{name!r} is no name", cure)
    if len(name.encode()) > _NAME_BYTES:
        raise ConfigError(key, f"{name[:20]!r}... is too long", f"give a name of {_NAME_BYTES} bytes at most")
    return name


def shown(value: Any) -> str:
    """A value in a message: short, on one line, with null for None."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_of(got: str, known: Collection[str]) -> str:
    """A cure for a wrong name: the closest known one, or all of them."""
    if not known:
        return "remove it"
    close = difflib.get_close_matches(got, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "expected one of " + listed(sorted(known))


def nearest(got: str, known: Collection[str]) -> str:
    """The beginning of a cure for a wrong name: a question about the closest known one; empty if none is close."""
    close = difflib.get_close_matches(got, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def listed(names: Collection[str]) -> str:
    """Names with commas; of very many the first ones."""
    more = len(names) - NAMED
    return ", ".join(names) if more <= 0 else ", ".join(list(names)[:NAMED]) + f" and {more:,} more"


def unknown_name(key: str, got: str, known: Collection[str]) -> ConfigError:
    """The error for a name without a branch: a rule that falls through in silence would compute another one."""
    return ConfigError(key, f"got {got!r}", one_of(got, sorted(known)))
