"""YAML as it was written: where a schema expects text, `no`, `007` and `2024_11_26` stay what they are.

YAML 1.1 reads `no` as false, `007` as 7 and `12:30` as 750. A name or a label must not change like that, so the text
of a scalar is taken as it stands wherever the schema says `str`. Keys of mappings are text everywhere. Floats may be
written as `1e6`, as in YAML 1.2, and 12:30 is no number. Timestamps stay text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

Path = tuple[str | int, ...]
HintOf = Callable[[Any, str | int], Any]
LARGEST = 1_000_000
"""Nodes of a document with its aliases written out, at most: a few lines of aliases can stand for billions."""
_STR, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)

_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
"""Without base 60 and octal: 12:30 is no number, and 010 is ten."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """SafeLoader with the numbers of YAML 1.2 and without timestamps."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":float", ":int"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


class Document:
    """A YAML document, read for a schema.

    Args:
        text: the document.
        hint: type of the whole.
        hint_of: gives the type of an entry, from the type of its container and its key or index.

    Raises:
        yaml.YAMLError: the text is no YAML, a key stands twice, or aliases hold themselves.
    """

    def __init__(self, text: str, hint: Any, hint_of: HintOf) -> None:
        self.lines: dict[Path, int] = {}
        """Line of every entry, from 1."""
        self._hint_of, self._nodes, self._open = hint_of, 0, set[int]()
        self._loader = _Loader(text)
        try:
            node = self._loader.get_single_node()
            self.value = None if node is None else self._built(node, hint, ())
        finally:
            self._loader.dispose()

    def _built(self, node: Any, hint: Any, path: Path) -> Any:
        self._nodes += 1
        if id(node) in self._open:
            raise yaml.constructor.ConstructorError(None, None, "aliases that hold themselves", node.start_mark)
        if self._nodes > LARGEST:
            raise yaml.constructor.ConstructorError(None, None, f"more than {LARGEST:,} entries", node.start_mark)
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            return scalar(self._loader, node, hint)
        self._open.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            found: Any = [self._built(each, self._hint_of(hint, i), (*path, i)) for i, each in enumerate(node.value)]
        else:
            pairs = self._pairs(node)
            found = {key: self._built(value, self._hint_of(hint, key), (*path, key)) for key, value in pairs.items()}
        self._open.discard(id(node))
        return found

    def _pairs(self, node: Any) -> dict[str, Any]:
        """Keys and values of a mapping; what it merges with `<<` stands behind its own."""
        own, merged = dict[str, Any](), dict[str, Any]()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no plain text", key.start_mark)
            if key.tag == _MERGE:
                for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(each, yaml.MappingNode) or each is node:
                        raise yaml.constructor.ConstructorError(None, None, "<< needs a mapping", key.start_mark)
                    merged = self._pairs(each) | merged
                continue
            if key.value in own:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            own[key.value] = value
        return own | {key: value for key, value in merged.items() if key not in own}


def scalar(loader: yaml.SafeLoader, node: Any, hint: Any) -> Any:
    """The value of a scalar: its text where the schema expects text, but for null."""
    if hint is str and node.tag != _NULL:
        return node.value
    return loader.construct_object(node, deep=True)


def value_of(text: str, hint: Any, hint_of: HintOf) -> Any:
    """The value of the part after the `=` of an override.

    Where the schema expects text it is taken as it stands, unless it is null or in quotes.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    if hint is str and not (text.strip()[:1] in "'\"" and text.strip()):
        return None if text.strip() in ("", "~", "null", "Null", "NULL") else text.strip()
    return Document(text, hint, hint_of).value
