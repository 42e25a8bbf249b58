"""What travels between a child and its parent: a small msgpack header beside one raw fp32 buffer.

The header carries the schema version and the layout hash; the buffer is the flat model or update itself. It is never
copied or pickled with the header, and encoded only if the sender's codec says so. Whatever arrives is checked before
anything uses it.

    Update (up)    what the child changed: its backbone since it began, its key layers against the parent's then
    Model (down)   the model of the parent

With `exchange.fragments` above 1 either holds one fragment of the backbone and all key layers: which one follows from
the child's seq, so that whoever is restarted, and whatever is sent again, agrees. A child that knows nothing yet gets
the whole model, which is fragment 0 of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from worldlm_ray.compression import CODECS, Bytes, decode, encode, nbytes
from worldlm_ray.errors import MessageError
from worldlm_ray.params import Flat, Layout

SCHEMA = 5
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
    """[change of the backbone's fragment | change of the key layers]."""
    metrics: dict[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    residuals: tuple[Residual, ...] = ()
    """What fitted nobody below the sender."""
    codec: str = "fp32"
    """How the values travel: one of compression.CODECS."""
    fragment: int = 0
    """Which part of the backbone is here: `fragment_of(seq, fragments)` ..."""
    fragments: int = 1
    """... of so many."""
    base_incarnation: int = 1
    """The parent's when it gave the base version. Versions of an earlier life of the parent may never come again."""


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
    """[the backbone's fragment | key layers], read-only."""
    residuals: tuple[Residual, ...] = ()
    """What may fit the child."""
    share: float = 0.0
    """How much of the child's own work is in what the parent moved since the child's last pull, in multiples of one
    update of the child."""
    incarnation: int = 1
    """The parent's."""
    durable_seq: int = 0
    """Highest seq of this child that the parent's checkpoints cover."""
    fragment: int = 0
    """Which part of the backbone is here ..."""
    fragments: int = 1
    """... of so many; 1 of the whole model."""


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
    "metrics": dict,
    "codec": str,
    "fragment": int,
    "fragments": int,
    "base_incarnation": int,
}
_MODEL = {
    "version": int,
    "progress": float,
    "finished": bool,
    "tokens": float,
    "last_seq": int,
    "share": float,
    "incarnation": int,
    "durable_seq": int,
    "fragment": int,
    "fragments": int,
}


def fragment_of(seq: int, fragments: int) -> int:
    """Which fragment an exchange carries: all in turn."""
    return seq % fragments


def carried(message: Update | Model, layout: Layout) -> tuple[slice, Flat, Flat]:
    """What a message carries: where in the backbone its fragment lies, the fragment's values, and the key layers'."""
    part = layout.fragments(message.fragments)[message.fragment]
    size = part.stop - part.start
    return part, message.values[:size], message.values[size:]


def pack(message: Update | Model, layout: Layout) -> Packed:
    """Put a message into its travelling form: without copying the buffer, unless it has to be encoded."""
    return Packed(pack_header(message, layout), buffer_of(message))


def pack_header(message: Update | Model, layout: Layout) -> bytes:
    """What travels beside the buffer."""
    fields = {name: value for name, value in vars(message).items() if name != "values"}
    # Few and small: they travel in the header, as bytes.
    fields["residuals"] = [vars(residual) | {"values": residual.values.tobytes()} for residual in message.residuals]
    kind = type(message).__name__.lower()
    header: bytes = msgpack.packb({"schema": SCHEMA, "kind": kind, "layout": layout.hash, **fields})
    return header


def buffer_of(message: Update | Model) -> Flat | Bytes:
    """The buffer that travels: the message's own, or its encoding."""
    if isinstance(message, Model) or message.codec == "fp32":
        return message.values
    return encode(message.codec, message.values)


def unpack_update(packed: Packed, layout: Layout) -> Update:
    """Check a travelling update and give it back.

    Raises:
        MessageError: malformed, wrong_schema, wrong_layout, wrong_fragment, wrong_shape or not_finite.
    """
    return Update(**_checked(packed, layout, "update", _UPDATE))


def unpack_model(packed: Packed, layout: Layout) -> Model:
    """Check a travelling model and give it back.

    Raises:
        MessageError: malformed, wrong_schema, wrong_layout, wrong_fragment or wrong_shape.
    """
    return Model(**_checked(packed, layout, "model", _MODEL))


def read_header(header: bytes) -> dict[str, Any]:
    """The header's fields.

    Raises:
        MessageError: malformed.
    """
    try:
        fields = msgpack.unpackb(header)
    except Exception as error:
        raise MessageError("malformed", f"the header is not msgpack ({type(error).__name__})") from error
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise MessageError("malformed", "the header is not a mapping of names")
    return fields


def _checked(packed: Packed, layout: Layout, kind: str, schema: dict[str, type]) -> dict[str, Any]:
    fields = read_header(packed.header)
    if fields.pop("schema", None) != SCHEMA:
        raise MessageError("wrong_schema", f"expected message schema {SCHEMA}: run one version everywhere")
    if fields.pop("kind", None) != kind:
        raise MessageError("malformed", f"expected a message of kind {kind}")
    got = fields.pop("layout", None)
    if got != layout.hash:
        raise MessageError("wrong_layout", f"got layout {got}, expected {layout.hash}: use one model config everywhere")
    codec = _field("codec", fields.get("codec", "fp32"), str)
    size = _elements(fields, layout)
    _check_shape(packed.values, codec, size)
    fields["residuals"] = tuple(_residual(each, layout) for each in _field("residuals", fields.get("residuals"), list))
    for name, kind_ in schema.items():
        fields[name] = _field(name, fields.get(name), kind_)
    if fields.get("epsilon") is not None:
        fields["epsilon"] = _field("epsilon", fields["epsilon"], float)
    unknown = set(fields) - set(schema) - {"residuals"} - ({"epsilon"} if kind == "update" else set())
    if unknown:
        raise MessageError("malformed", f"unknown fields {sorted(unknown)}")
    return fields | {"values": packed.values if codec == "fp32" else decode(codec, packed.values, size)}


def _elements(fields: dict[str, Any], layout: Layout) -> int:
    """Elements of a message's buffer, after a look at which fragment it says that it carries."""
    fragment, fragments = (_field(name, fields.get(name), int) for name in ("fragment", "fragments"))
    try:
        part = layout.fragments(fragments)[fragment]
    except (ValueError, IndexError) as error:
        raise MessageError("wrong_fragment", f"there is no fragment {fragment} of {fragments}") from error
    if "seq" in fields:
        seq = _field("seq", fields["seq"], int)
        if fragment != fragment_of(seq, fragments):
            expected = fragment_of(seq, fragments)
            raise MessageError("wrong_fragment", f"got fragment {fragment} with seq {seq}, expected {expected}")
    return int(part.stop - part.start) + layout.key_size


def _check_shape(values: Any, codec: str, size: int) -> None:
    if codec not in CODECS:
        raise MessageError("malformed", f"codec is {codec!r}, expected one of {', '.join(CODECS)}")
    kind, shape = (np.float32, (size,)) if codec == "fp32" else (np.uint8, (nbytes(codec, size),))
    if not isinstance(values, np.ndarray) or values.dtype != kind or values.shape != shape:
        got = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
        raise MessageError("wrong_shape", f"got {got}, expected {np.dtype(kind)} {list(shape)}")


def _residual(raw: Any, layout: Layout) -> Residual:
    sizes = {layer.name: layer.stop - layer.start for layer in layout.key_layers}
    if not isinstance(raw, dict) or set(raw) != {"origin", "layer", "tokens", "age", "values"}:
        raise MessageError("malformed", "a residual is not a mapping of its five fields")
    kinds = {"origin": str, "layer": str, "tokens": float, "age": int, "values": bytes}
    fields = {name: _field(f"residual.{name}", raw[name], kind) for name, kind in kinds.items()}
    if len(fields["values"]) != 4 * sizes.get(fields["layer"], -1):
        raise MessageError("wrong_shape", f"a residual of {fields['layer']!r} has {len(fields['values'])} bytes")
    values = np.frombuffer(fields["values"], np.float32)
    if not np.isfinite(values).all():
        raise MessageError("not_finite", f"nan or infinity in a residual of {fields['layer']!r}")
    return Residual(**(fields | {"values": values}))


def _field(name: str, value: Any, kind: type) -> Any:
    """One header field, checked; whole numbers pass as floats."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MessageError("malformed", f"{name} is {value!r}, expected {kind.__name__}")
    if isinstance(value, int | float) and not 0 <= value < math.inf:
        raise MessageError("malformed", f"{name} is {value!r}, expected a finite number that is not negative")
    return value
