"""What travels between a child and its parent: a small msgpack header beside one raw fp32 buffer.

The header carries the schema version and the layout hash; the buffer is the flat model or update itself. It is never
copied or pickled with the header, and encoded only if the sender's codec says so. Whatever arrives is checked before
anything uses it.

    Update (up)    what the child changed: its backbone since it began, its key layers against the parent's then
    Model (down)   the model of the parent, and under the rule `sums` what lies beyond the parent
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgpack
import numpy as np

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.compression import CODECS, Bytes, decode, encode, nbytes
from worldlm_ray.exchange.limits import (
    HEADER_BYTES,
    LARGEST_COUNT,
    LONGEST_PATH,
    checked,
    checked_norm,
    header_bytes,
    shown,
    unpacked,
)
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout

SCHEMA = 9
"""Version of the message schema; a receiver refuses any other."""


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A key layer that did not fit where it was sent (see worldlm_ray/aggregation/residuals.py)."""

    origin: str
    """Path of the node that made it."""
    layer: str
    """Name of the key layer."""
    tokens: float
    """Of the update that it came with: its weight."""
    age: int
    """Aggregations since then."""
    values: Flat
    """The key layer itself, read-only."""

    @property
    def name(self) -> str:
        """Unlike that of any other residual of the same age."""
        return f"{self.layer} of {self.origin}"


@dataclass(frozen=True, kw_only=True)
class Update:
    """A child's work since its last exchange, on its way to the parent."""

    sender: str
    """Name of the child among its siblings."""
    seq: int
    """Counts this child's updates from 1; the parent accepts only a higher one than before."""
    base_version: int
    """The parent's version that the work started from."""
    tokens: int
    """Tokens that this update was trained on: its weight."""
    started_tokens: int
    """Tokens of all local rounds that were begun below this child since the run began."""
    values: Flat
    """[change of the backbone | change of the key layers]."""
    residuals: tuple[Residual, ...] = ()
    """What fitted no child of the sender."""
    codec: str = "fp32"
    """How the values travel: a name of compression.CODECS."""
    base_incarnation: int = 1
    """The parent's when it gave the base version. Versions of an earlier life of the parent may never come again."""
    encoded: Bytes | None = None
    """At the sender, the values as they travel, where a codec has made other bytes of them."""
    weight: int = 0
    """What the values are multiplied by in a sum (aggregation/sums.py); 0 under every other rule."""
    low: Flat | None = None
    """What fp32 does not hold of the values [size]: both are added to the sum. None where that is nothing."""
    withdraws: bool = False
    """Whether the child has no part in the sum any more."""

    def in_shared_memory(self, shared: Any) -> Update:
        """The update with another buffer in place of the one that travels (see `buffer_of`), of the same contents."""
        return replace(self, values=shared) if self.codec == "fp32" else replace(self, encoded=shared)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A parent's model on its way to a child."""

    version: int
    """Aggregations that the parent has applied."""
    progress: float
    """Share of the run's budget that is spent, 0 to 1."""
    finished: bool
    """True when no new local round should begin."""
    tokens: float
    """Mean tokens per update of the last aggregation: the parent's weight beside the child's own."""
    last_seq: int
    """Highest seq that the parent has accepted from this child."""
    values: Flat
    """[backbone | key layers], read-only."""
    residuals: tuple[Residual, ...] = ()
    """What may fit the child."""
    incarnation: int = 1
    """The parent's."""
    durable_seq: int = 0
    """Highest seq of this child that the parent's checkpoints cover."""
    weight: int = 0
    """Of the children whose mean the model is (aggregation/sums.py); 0 under every other rule."""
    rest: Flat | None = None
    """The mean of what lies beyond the parent [layout.size]; None where nothing does."""
    rest_weight: int = 0
    """The weight of that."""


Pulled = Model | MessageError
"""What a pull brings: the parent's model, or why none could be read."""


@dataclass(frozen=True)
class Packed:
    """A message as it travels."""

    header: bytes
    values: Any
    """The raw buffer (encoded: bytes): a numpy array here, an object reference while Ray carries it."""
    counts_as: int | None = None
    """Bytes of the buffer that the values stand for, in a simulation without a model."""

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        buffer = int(getattr(self.values, "nbytes", 0)) if self.counts_as is None else self.counts_as
        return len(self.header) + buffer


_UPDATE = {
    "sender": str,
    "seq": int,
    "base_version": int,
    "tokens": int,
    "started_tokens": int,
    "codec": str,
    "base_incarnation": int,
    "weight": int,
    "withdraws": bool,
}
_MODEL = {
    "version": int,
    "progress": float,
    "finished": bool,
    "tokens": float,
    "last_seq": int,
    "incarnation": int,
    "durable_seq": int,
    "weight": int,
    "rest_weight": int,
}


def pack(message: Update | Model, layout: Layout) -> Packed:
    """Put a message into its travelling form: without copying the buffer, unless it has to be encoded."""
    return Packed(pack_header(message, layout), buffer_of(message))


def pack_header(message: Update | Model, layout: Layout) -> bytes:
    """What travels beside the buffer."""
    fields = {name: value for name, value in vars(message).items() if name not in ("values", "encoded")}
    # Few and small: they travel in the header, as bytes.
    fields["residuals"] = [vars(residual) | {"values": residual.values.tobytes()} for residual in message.residuals]
    beside, values = ("rest", message.rest) if isinstance(message, Model) else ("low", message.low)
    fields[beside] = None if values is None else values.tobytes()
    if not message.weight and values is None:  # of no sum
        fields = {name: value for name, value in fields.items() if name not in _OF_SUMS}
    kind = type(message).__name__.lower()
    header: bytes = msgpack.packb({"schema": SCHEMA, "kind": kind, "layout": layout.hash, **fields})
    return header


def buffer_of(message: Update | Model) -> Flat | Bytes:
    """The buffer that travels: the message's own, or its encoding (made anew of an update from a checkpoint)."""
    if isinstance(message, Model) or message.codec == "fp32":
        return message.values
    return encode(message.codec, message.values) if message.encoded is None else message.encoded


def unpack_update(packed: Packed, layout: Layout, *, residuals: int = 0, has_low: bool = False) -> Update:
    """Check a travelling update and give it back.

    Args:
        packed: what arrived.
        layout: the model's layout.
        residuals: how many of them the sender may pass on.
        has_low: whether it may bring what fp32 does not hold of the values.

    Raises:
        MessageError: malformed, header_too_large, wrong_schema, wrong_layout, wrong_shape or not_finite.
    """
    return Update(**_checked(packed, layout, "update", _UPDATE, residuals, has_more=has_low))


def unpack_model(packed: Packed, layout: Layout, *, residuals: int = 0, has_rest: bool = False) -> Model:
    """Check a travelling model and give it back.

    Args:
        packed: what arrived.
        layout: the model's layout.
        residuals: how many of them the parent may offer.
        has_rest: whether it may bring what lies beyond the parent.

    Raises:
        MessageError: as `unpack_update`.
    """
    return Model(**_checked(packed, layout, "model", _MODEL, residuals, has_more=has_rest))


def read_header(header: bytes, *, most_bytes: int = HEADER_BYTES) -> dict[str, Any]:
    """The header's fields.

    Args:
        header: as it arrived.
        most_bytes: a longer one is not parsed.

    Raises:
        MessageError: malformed or header_too_large.
    """
    if not isinstance(header, bytes):
        raise MessageError("malformed", f"the header is of type {type(header).__name__}, expected bytes")
    if len(header) > most_bytes:
        raise MessageError("header_too_large", f"the header has {len(header)} bytes, expected at most {most_bytes}")
    fields = unpacked(header, "the header")
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise MessageError("malformed", "the header is not a mapping of names")
    return fields


def _checked(
    packed: Packed,
    layout: Layout,
    kind: str,
    schema: dict[str, type],
    most_residuals: int,
    *,
    has_more: bool = False,
) -> dict[str, Any]:
    most_bytes = header_bytes(layout, most_residuals) + (layout.nbytes if has_more else 0)
    fields = read_header(packed.header, most_bytes=most_bytes)
    if (got := fields.pop("schema", None)) != SCHEMA:
        text = f"got message schema {shown(got)}, expected {SCHEMA}: run one version everywhere"
        raise MessageError("wrong_schema", text)
    if fields.pop("kind", None) != kind:
        raise MessageError("malformed", f"expected a message of kind {kind}")
    if (got := fields.pop("layout", None)) != layout.hash:
        text = f"got layout {shown(got)}, expected {layout.hash}: use one model config everywhere"
        raise MessageError("wrong_layout", text)
    codec = checked("codec", fields.get("codec", "fp32"), str)
    _check_shape(packed.values, codec, layout.size)
    residuals = checked("residuals", fields.get("residuals"), list, longest=most_residuals)
    fields["residuals"] = tuple(_residual(each, layout) for each in residuals)
    fields = {name: schema[name]() for name in _OF_SUMS if name in schema} | fields
    for name, kind_ in schema.items():
        fields[name] = checked(name, fields.get(name), kind_, most=_MOST.get(name, LARGEST_COUNT))
    beside = "rest" if kind == "model" else "low"
    fields[beside] = _beside(beside, fields.get(beside), layout)
    if unknown := set(fields) - set(schema) - {"residuals", beside}:
        raise MessageError("malformed", f"unknown fields {shown(sorted(unknown))}")
    return fields | {"values": packed.values if codec == "fp32" else decode(codec, packed.values, layout.size)}


_OF_SUMS = ("weight", "withdraws", "low", "rest", "rest_weight")
"""Fields that travel under the rule `sums` alone."""
_MOST = {"progress": 1.0}
"""Fields whose largest value is another one than that of all counts."""


def _check_shape(values: Any, codec: str, size: int) -> None:
    if codec not in CODECS:
        raise MessageError("malformed", f"codec is {shown(codec)}, expected one of {', '.join(CODECS)}")
    kind, shape = (np.float32, (size,)) if codec == "fp32" else (np.uint8, (nbytes(codec, size),))
    if not isinstance(values, np.ndarray) or values.dtype != kind or values.shape != shape:
        got = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
        raise MessageError("wrong_shape", f"got {got}, expected {np.dtype(kind)} {list(shape)}")


def _beside(name: str, raw: Any, layout: Layout) -> Flat | None:
    """A second buffer, which travels in the header as bytes: adapters are small."""
    if raw is None:
        return None
    checked(name, raw, bytes, longest=layout.nbytes)
    if len(raw) != layout.nbytes:
        raise MessageError("wrong_shape", f"{name} has {len(raw)} bytes, expected {layout.nbytes}")
    values = np.frombuffer(raw, np.float32)
    checked_norm(values, name)
    return values


def _residual(raw: Any, layout: Layout) -> Residual:
    sizes = {layer.name: layer.stop - layer.start for layer in layout.key_layers}
    if not isinstance(raw, dict) or set(raw) != {"origin", "layer", "tokens", "age", "values"}:
        raise MessageError("malformed", "a residual is not a mapping of its five fields")
    origin, layer = (checked(f"residual.{name}", raw[name], str, longest=LONGEST_PATH) for name in ("origin", "layer"))
    kinds = {"tokens": float, "age": int, "values": bytes}
    longest = 4 * max(sizes.values(), default=0)
    fields = {name: checked(f"residual.{name}", raw[name], kind, longest=longest) for name, kind in kinds.items()}
    if len(fields["values"]) != 4 * sizes.get(layer, -1):
        raise MessageError("wrong_shape", f"a residual of {shown(layer)} has {len(fields['values'])} bytes")
    values = np.frombuffer(fields["values"], np.float32)
    checked_norm(values, f"a residual of {layer!r}")
    return Residual(**(fields | {"origin": origin, "layer": layer, "values": values}))
