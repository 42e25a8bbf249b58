"""Codecs: bytes on the wire, what arrives, and that what is lost goes with the next update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.nodes import LAYOUT, SPLIT, exchange, make, push

from worldlm_ray.errors import ConfigError, MessageError
from worldlm_ray.exchange import compression, messages
from worldlm_ray.exchange.compression import CODECS, Bytes, decode, encode, encode_update, memory, nbytes
from worldlm_ray.exchange.messages import Packed, Update, pack, read_header, unpack_update
from worldlm_ray.plan.plan import Plan
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tensors import buffers
from worldlm_ray.tensors.buffers import BLOCK, Flat

SIZES = [1, 2, 127, 128, 129, 1023, 1024, 1025, BLOCK - 1, BLOCK, BLOCK + 3, 40 * BLOCK + 7]
LARGEST_ERROR = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.5 / 127, "int4": 0.5 / 7}
"""Of the largest magnitude of a block (bf16: of the element itself)."""


def some(size: int, seed: int = 0) -> Flat:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("codec", CODECS.names())
def test_what_arrives_is_off_by_no_more_than_half_a_level(codec: str, size: int) -> None:
    values = some(size)
    packed = encode(codec, values)
    assert packed.shape == (nbytes(codec, size),)
    arrived = decode(codec, packed, size)
    assert np.abs(arrived - values).max() <= LARGEST_ERROR[codec] * np.abs(values).max() * 1.001


@pytest.mark.parametrize(("codec", "most"), [("bf16", 0.5), ("int8", 0.251), ("int4", 0.14)])
def test_bytes_on_the_wire(codec: str, most: float) -> None:
    assert nbytes(codec, 10_000_000) / 40_000_000 <= most


@pytest.mark.parametrize("codec", CODECS.names())
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(codec: str, value: float) -> None:
    values = some(5000)
    values[3] = value
    assert not np.isfinite(decode(codec, encode(codec, values), 5000)).all()


@pytest.mark.parametrize("codec", CODECS.names())
def test_zeros_arrive_as_zeros(codec: str) -> None:
    assert not decode(codec, encode(codec, np.zeros(3000, np.float32)), 3000).any()


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.sampled_from(CODECS.names()))
def test_what_is_said_to_arrive_is_what_arrives(numbers: list[float], codec: str) -> None:
    _, arrives = encode_update(codec, np.array(numbers, np.float32), None)
    np.testing.assert_allclose(decode(codec, encode(codec, arrives), len(numbers)), arrives, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_what_is_lost_goes_with_the_next_update(codec: str) -> None:
    # After any number of updates, what has arrived differs from what was sent by one update's error, not by the sum.
    lost, sent, arrived = memory(codec, 4000), np.zeros(5000), np.zeros(5000)
    assert lost is not None
    for seed in range(50):
        update = some(5000, seed)
        sent += update
        arrived += encode_update(codec, update.copy(), lost)[1]
    off = np.abs(sent - arrived)
    assert off[:4000].max() <= 2 * LARGEST_ERROR[codec] * 6
    assert off[4000:].max() > off[:4000].max(), "key layers have no such memory"


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = some(40 * BLOCK + 7)
    several = {codec: encode(codec, values).tobytes() for codec in CODECS}
    monkeypatch.setattr(buffers, "THREADS", 1)
    assert {codec: encode(codec, values).tobytes() for codec in CODECS} == several


def test_an_encoded_update_is_read_back() -> None:
    values = some(LAYOUT.size)
    update = Update(sender="a", seq=1, base_version=0, tokens=1, started_tokens=0, codec="int8", values=values)
    packed = pack(update, LAYOUT)
    assert packed.values.dtype == np.uint8
    found = unpack_update(packed, LAYOUT)
    assert found.codec == "int8"
    np.testing.assert_allclose(found.values, values, atol=0.02)
    for wrong in (packed.values[:-1], packed.values.astype(np.float32), values):
        with pytest.raises(MessageError, match=r"wrong_shape: got .*, expected uint8 \[12\]"):
            unpack_update(replace(packed, values=wrong), LAYOUT)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_an_update_is_encoded_once_and_sent_as_it_was(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encodings: list[str] = []

    def counted(name: str, values: Flat) -> Bytes:
        encodings.append(name)
        return encode(name, values)

    monkeypatch.setattr(compression, "encode", counted)
    monkeypatch.setattr(messages, "encode", counted)
    node = make(parent=True, buffer_size=1, codec=codec)
    sent = exchange(node, push(node, "a", 1, change=[0.3, 0.72, 1.0]))
    arrived = unpack_update(pack(sent, LAYOUT), LAYOUT)
    assert encodings == [codec]
    np.testing.assert_array_equal(arrived.values, sent.values)


def test_an_unknown_codec_is_refused() -> None:
    update = Update(sender="a", seq=1, base_version=0, tokens=1, started_tokens=0, values=some(LAYOUT.size))
    fields = read_header(pack(update, LAYOUT).header) | {"codec": "zip"}
    with pytest.raises(MessageError, match="codec is 'zip', expected one of fp32, bf16, int8, int4"):
        unpack_update(Packed(msgpack.packb(fields), update.values), LAYOUT)


def test_a_federation_remembers_what_its_codec_has_lost_over_a_restart() -> None:
    node, twin = (make(parent=True, buffer_size=1, codec="int4") for _ in range(2))
    sent = exchange(node, push(node, "a", 1, change=[0.3, 0.72, 1.0]))
    assert (sent.codec, node.parent.codec_error is not None and node.parent.codec_error.any()) == ("int4", True)
    twin.restore(*node.state())
    np.testing.assert_array_equal(twin.parent.codec_error, node.parent.codec_error)
    np.testing.assert_allclose(sent.values[:SPLIT] + node.parent.codec_error, [0.3, 0.72, 1.0], rtol=1e-6)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_world_that_sends_less_learns_as_much(tiny: Callable[..., Plan], tmp_path: Path, codec: str) -> None:
    losses, sent = [], []
    for settings in ({}, {"exchange": {"codec": codec}}):
        plan = tiny(**settings)
        summary = simulate(replace(plan, config=replace(plan.config, run_dir=str(tmp_path / f"{settings}")))).summary
        losses.append(summary["nodes"]["world"]["loss"])
        sent.append(sum(node["bytes_up"] for node in summary["nodes"].values()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert sent[1] < (0.51 if codec == "bf16" else 0.27) * sent[0]


def test_a_wrong_codec_says_so(tiny: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        tiny(exchange={"codec": "int3"})
