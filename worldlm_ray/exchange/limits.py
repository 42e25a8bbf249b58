"""How large what arrives may be: checked before it is used, and of a header before it is parsed.

The sender is known, but may be broken or lie. A length is limited before msgpack makes objects of the bytes; a count
stays where fp64 and JSON hold it exactly; what can only rise, rises by a bounded jump.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack

from worldlm_ray.errors import MessageError
from worldlm_ray.tensors.buffers import Flat, rough_norm
from worldlm_ray.tensors.layout import Layout

LARGEST_NORM = 1e15
"""Of an update or a model: its square, and sums of it over tokens and children, stay far inside fp32."""
LARGEST_COUNT = 2**53 - 1
"""Of a count, a version or a number of tokens."""
LONGEST_NAME = 255
"""Characters of a node's name, which names files."""
LONGEST_PATH = 4_096
"""Characters of a node's path, or of a parameter's name."""
HEADER_BYTES = 4_096
"""Of a header without residuals: its numbers, a name, and the layout's hash."""
RESIDUAL_BYTES = 4 * 2 * LONGEST_PATH
"""Of a residual in a header, beside its values: the path of its origin and its layer's name, in UTF-8."""
MOST_SKIPPED = 1_000_000
"""Updates between two that a node sees of one child. A child that is refused counts on, and a node that comes back from
a checkpoint has forgotten what came since; at ten rounds a second this many are more than a day of either."""
MOST_RESTARTS = 1_000
"""Starts of a child between two that its parent hears of. Each raises the incarnation by one and takes seconds."""
_SHOWN = 80


def unpacked(raw: bytes, what: str) -> Any:
    """The value of some msgpack, whose length has been checked.

    Args:
        raw: as it arrived.
        what: it is, for the error.

    Raises:
        MessageError: malformed.
    """
    try:
        return msgpack.unpackb(raw, max_ext_len=0)
    except Exception as error:  # msgpack raises errors of many kinds
        raise MessageError("malformed", f"{what} is not msgpack ({type(error).__name__})") from error


def header_bytes(layout: Layout, residuals: int) -> int:
    """The longest header of a message.

    Args:
        layout: the model's layout.
        residuals: how many residuals the message may carry.
    """
    largest = max((layer.stop - layer.start for layer in layout.key_layers), default=0)
    return HEADER_BYTES + residuals * (RESIDUAL_BYTES + 4 * largest)


def checked(name: str, value: Any, kind: type, *, longest: int = LONGEST_NAME, most: float = LARGEST_COUNT) -> Any:
    """One field of a message or a call; whole numbers pass as floats.

    Args:
        name: the field's, for the refusal.
        value: what came.
        kind: str, bytes, bool, int, float or list.
        longest: characters of a text, bytes of a value, elements of a list.
        most: of a number; the least is 0.

    Raises:
        MessageError: malformed.
    """
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_COUNT:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MessageError("malformed", f"{name} is {shown(value)}, expected {kind.__name__}")
    if isinstance(value, str | bytes | list) and len(value) > longest:
        raise MessageError("malformed", f"{name} has {len(value)} elements, expected at most {longest}")
    if isinstance(value, int | float) and not 0 <= value < math.inf:
        got = f"{name} is {shown(value)}, expected a finite number that is not negative"
        raise MessageError("malformed", got)
    if isinstance(value, int | float) and value > most:
        raise MessageError("malformed", f"{name} is {shown(value)}, expected at most {most:g}")
    return value


def checked_norm(values: Flat, what: str = "the values") -> float:
    """The L2 norm of what has arrived, in fp32: to some digits.

    Args:
        values: a buffer.
        what: its name, for the refusal.

    Raises:
        MessageError: not_finite: nan, infinity, or a norm above LARGEST_NORM.
    """
    norm = rough_norm(values)
    if not math.isfinite(norm):
        raise MessageError("not_finite", f"nan or infinity in {what}")
    if norm > LARGEST_NORM:
        raise MessageError("not_finite", f"norm {norm:.4g} of {what} is too large to be summed in fp32")
    return norm


def shown(value: Any) -> str:
    """A value in a refusal: its beginning, on one line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
