"""Messages: what is packed comes back, and damage of any kind is a named refusal."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import msgpack
import numpy as np
import pytest

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import SCHEMA, Model, Packed, Update, pack, read_header, unpack_model, unpack_update
from worldlm_ray.tensors.layout import Layout, make_layout

REASONS = {"malformed", "wrong_schema", "wrong_layout", "wrong_shape"}


def update(layout: Layout, **changes: Any) -> Update:
    fields: dict[str, Any] = {
        "sender": "italy",
        "seq": 3,
        "base_version": 7,
        "tokens": 4_096,
        "started_tokens": 12_288,
        "values": np.arange(layout.size, dtype=np.float32),
    }
    return Update(**fields | changes)


def model(layout: Layout, **changes: Any) -> Model:
    fields: dict[str, Any] = {
        "version": 9,
        "progress": 0.5,
        "finished": False,
        "tokens": 1_024.0,
        "last_seq": 3,
        "values": np.arange(layout.size, dtype=np.float32),
    }
    return Model(**fields | changes)


def same(one: Update | Model, other: Update | Model) -> bool:
    left, right = vars(one).copy(), vars(other).copy()
    return np.array_equal(left.pop("values"), right.pop("values")) and left == right


def with_header(packed: Packed, **changes: Any) -> Packed:
    """The message with header fields set, or removed where the value is `...`."""
    fields = msgpack.unpackb(packed.header) | changes
    return Packed(msgpack.packb({k: v for k, v in fields.items() if v is not ...}), packed.values)


def refusal(packed: Packed, layout: Layout) -> str:
    with pytest.raises(MessageError) as caught:
        unpack_update(packed, layout)
    assert "\n" not in str(caught.value)
    return caught.value.reason


# ---- what is packed comes back -----------------------------------------------------------------------------


def test_an_update_comes_back_equal(layout: Layout) -> None:
    sent = update(layout)
    assert same(unpack_update(pack(sent, layout), layout), sent)


def test_a_model_comes_back_equal(layout: Layout) -> None:
    sent = model(layout, finished=True)
    assert same(unpack_model(pack(sent, layout), layout), sent)


def test_a_whole_number_stands_for_a_float(layout: Layout) -> None:
    received = unpack_model(pack(model(layout, progress=1, tokens=5), layout), layout)
    assert (received.progress, received.tokens) == (1.0, 5.0)
    assert isinstance(received.progress, float)


def test_the_buffer_is_passed_on_and_never_copied(layout: Layout) -> None:
    sent = update(layout)
    packed = pack(sent, layout)
    assert packed.values is sent.values
    assert unpack_update(packed, layout).values is sent.values


def test_the_header_never_contains_the_buffer() -> None:
    small, large = (make_layout([("w", (size,))], [], layers=0) for size in (8, 100_000))
    headers = [pack(update(one), one).header for one in (small, large)]
    assert len(headers[0]) == len(headers[1]) < 300
    assert "values" not in read_header(headers[1])


def test_bytes_on_the_wire_are_header_and_buffer(layout: Layout) -> None:
    packed = pack(update(layout), layout)
    assert packed.nbytes == len(packed.header) + layout.nbytes


def test_the_header_names_its_schema_kind_and_layout(layout: Layout) -> None:
    fields = read_header(pack(update(layout), layout).header)
    assert (fields["schema"], fields["kind"], fields["layout"]) == (SCHEMA, "update", layout.hash)


# ---- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [b"", b"\xc1", b"hello", b"\xff" * 40, msgpack.packb([1, 2]), msgpack.packb(5), msgpack.packb({1: 2}), b"\x81\xa1"],
)
def test_a_header_that_is_no_mapping_of_names_is_malformed(layout: Layout, header: bytes) -> None:
    assert refusal(Packed(header, update(layout).values), layout) == "malformed"


def test_a_header_with_bytes_after_it_is_malformed(layout: Layout) -> None:
    packed = pack(update(layout), layout)
    assert refusal(Packed(packed.header + b"\x00", packed.values), layout) == "malformed"


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, "1", None, ...])
def test_another_schema_is_refused(layout: Layout, schema: Any) -> None:
    assert refusal(with_header(pack(update(layout), layout), schema=schema), layout) == "wrong_schema"


def test_a_model_is_no_update(layout: Layout) -> None:
    assert refusal(pack(model(layout), layout), layout) == "malformed"
    with pytest.raises(MessageError, match=r"^malformed: expected a message of kind model"):
        unpack_model(pack(update(layout), layout), layout)


@pytest.mark.parametrize("claimed", ["0123456789abcdef", "", 5, None, ...])
def test_another_layout_is_refused(layout: Layout, claimed: Any) -> None:
    assert refusal(with_header(pack(update(layout), layout), layout=claimed), layout) == "wrong_layout"


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(6, np.float32),
        np.zeros(8, np.float32),
        np.zeros((7, 1), np.float32),
        np.zeros(7, np.float64),
        np.zeros(7, ">f4"),
        np.zeros(7, np.int32),
        np.zeros((), np.float32),
        [0.0] * 7,
        b"\x00" * 28,
        None,
    ],
    ids=["short", "long", "matrix", "fp64", "big endian", "int", "scalar", "list", "bytes", "None"],
)
def test_another_shape_is_refused(layout: Layout, values: Any) -> None:
    assert layout.size == 7
    assert refusal(Packed(pack(update(layout), layout).header, values), layout) == "wrong_shape"


@pytest.mark.parametrize("field", ["sender", "seq", "base_version", "tokens", "started_tokens"])
@pytest.mark.parametrize("value", [..., None, b"raw", [1], True])
def test_a_field_that_is_missing_or_of_another_type_is_malformed(layout: Layout, field: str, value: Any) -> None:
    assert refusal(with_header(pack(update(layout), layout), **{field: value}), layout) == "malformed"


@pytest.mark.parametrize("field", ["seq", "base_version", "tokens", "started_tokens"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", math.nan])
def test_a_count_that_is_none_is_malformed(layout: Layout, field: str, value: Any) -> None:
    assert refusal(with_header(pack(update(layout), layout), **{field: value}), layout) == "malformed"


@pytest.mark.parametrize("field", ["progress", "tokens"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, "1"])
def test_a_models_number_that_is_none_is_malformed(layout: Layout, field: str, value: Any) -> None:
    with pytest.raises(MessageError, match=r"^malformed: "):
        unpack_model(with_header(pack(model(layout), layout), **{field: value}), layout)


@pytest.mark.parametrize("changes", [{"extra": 1}, {"values": [1.0]}, {"": None}])
def test_an_unknown_field_is_malformed(layout: Layout, changes: dict[str, Any]) -> None:
    assert refusal(with_header(pack(update(layout), layout), **changes), layout) == "malformed"


def test_random_damage_is_refused_or_harmless(layout: Layout) -> None:
    """2,000 mutations: each is a named refusal or a whole, well-typed update with the buffer untouched.

    A header carries no checksum (links do), so a changed digit of a count is another valid message.
    """
    rng, packed = random.Random(1), pack(update(layout), layout)
    reasons = []
    for _ in range(2_000):
        damaged = bytearray(packed.header)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(damaged))
            action = rng.randrange(4)
            if action == 0:
                damaged[place] = rng.randrange(256)
            elif action == 1:
                damaged[place] ^= 1 << rng.randrange(8)
            elif action == 2:
                del damaged[place : place + rng.randint(1, 8)]
            else:
                damaged[place:place] = rng.randbytes(rng.randint(1, 8))
        try:
            received = unpack_update(Packed(bytes(damaged), packed.values), layout)
        except MessageError as error:
            reasons.append(error.reason)
            continue
        assert received.values is packed.values
        assert isinstance(received.sender, str)
        for count in (received.seq, received.base_version, received.tokens, received.started_tokens):
            assert isinstance(count, int)
            assert count >= 0
    assert set(reasons) <= REASONS
    assert len(reasons) > 1_000


def test_every_cut_of_a_header_is_malformed(layout: Layout) -> None:
    packed = pack(update(layout), layout)
    for length in range(len(packed.header)):
        assert refusal(Packed(packed.header[:length], packed.values), layout) == "malformed"


def test_a_refusal_survives_pickling() -> None:
    error = MessageError("malformed", "the header is not msgpack")
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, again.detail, str(again)) == (error.reason, error.detail, str(error))
