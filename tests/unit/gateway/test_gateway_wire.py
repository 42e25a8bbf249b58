"""Messages of a border: exactly the fields of their dataclass, or a named refusal."""

from __future__ import annotations

import dataclasses
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from support.nodes import LAYOUT

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.limits import LARGEST_COUNT
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.gateway import wire

VERDICT = Verdict(reason="accepted", seq=3, base_version=2, version=4, tau=2, detail="", durable_seq=1)
DIGEST = bytes(range(32))
MESSAGES: list[Any] = [
    wire.Hello(layout="0123456789abcdef"),
    wire.Terms(path="world/a", now_s=1.5, leaf_bytes=4, connections=4, codecs=("fp32", "int8")),
    wire.Join(incarnation=1, seq=0),
    wire.Joined(incarnation=1, last_seq=5, durable_seq=4),
    wire.Call(incarnation=1, to=2),
    wire.Left(may_end=True),
    wire.Push(incarnation=1, to=2, seq=3, codec="int8", digest=DIGEST, header=b"\x81\xa1a\x01", signature=b"s" * 70),
    wire.Judged(verdict=wire.packed(VERDICT), signature=b"s", chain=b"c"),
    wire.Pull(incarnation=1, to=2, started_tokens=10**12),
    wire.Served(header=b"h", digest=DIGEST, size=2**40),
    wire.Enrol(request=b"r" * 700, invitation="abc", proof=b"p" * 32),
    wire.Invited(invitation="abc", proof=b"p" * 32),
    wire.Renew(request=b"r" * 700),
    wire.Enrolled(path="world/a", chain=b"c" * 1_500),
    wire.Refusal(reason="malformed", detail="a line"),
    VERDICT,
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Any) -> None:
    body = wire.packed(message)
    assert wire.parsed(type(message), body) == message
    assert all(code not in body for code in (b"\x80\x04\x95",)), "no pickle"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_with_a_field_too_many_too_few_or_of_another_type_is_malformed(message: Any) -> None:
    fields = msgpack.unpackb(wire.packed(message))
    wrong: list[Any] = [fields | {"more": 1}, {}, [], None, list(fields.values())]
    for name, value in fields.items():
        wrong.append({key: each for key, each in fields.items() if key != name})
        others: list[Any] = [None, [], {}, "text", b"bytes", -1, 1.5, True, LARGEST_COUNT + 1, float("nan")]
        kinds = (int, float) if isinstance(value, float) else (type(value),)
        wrong += [fields | {name: other} for other in others if type(other) not in kinds or other in (-1,)]
    for each in wrong:
        with pytest.raises(MessageError, match="malformed"):
            wire.parsed(type(message), msgpack.packb(each))


def test_what_is_too_long_is_not_parsed() -> None:
    long = wire.packed(wire.Refusal(reason="malformed", detail="x" * wire.MESSAGE_BYTES))
    with pytest.raises(MessageError, match="wrong_size"):
        wire.parsed(wire.Refusal, long)
    with pytest.raises(MessageError, match="malformed: detail has 5000 elements"):
        wire.parsed(wire.Refusal, wire.packed(wire.Refusal(reason="malformed", detail="x" * 5_000)))
    with pytest.raises(MessageError, match="malformed: digest has 31 bytes"):
        wire.parsed(wire.Served, wire.packed(wire.Served(header=b"", digest=DIGEST[:31], size=1)))


def test_a_deep_or_extended_message_is_malformed() -> None:
    for body in (
        b"\x91" * 5_000,
        b"\x81" * 5_000,
        msgpack.packb(msgpack.ExtType(4, b"x" * 100)),
        b"\xdf" + b"\xff" * 4,
    ):
        with pytest.raises(MessageError, match="malformed"):
            wire.parsed(wire.Join, body)


def test_a_manifest_says_who_sends_what_to_whom() -> None:
    push = MESSAGES[6]
    known = push.manifest("w", "world/a")
    assert dataclasses.replace(push, signature=b"another").manifest("w", "world/a") == known
    changes: list[dict[str, Any]] = [{"incarnation": 9}, {"to": 9}, {"seq": 9}, {"codec": "fp32"}, {"header": b""}]
    others = [dataclasses.replace(push, **change) for change in [*changes, {"digest": bytes(32)}]]
    manifests = [other.manifest("w", "world/a") for other in others]
    manifests += [push.manifest("v", "world/a"), push.manifest("w", "world/b"), known]
    assert len(set(manifests)) == len(manifests)
    assert wire.receipt(known, b"verdict") != wire.receipt(known, b"another verdict")


def test_leaves_cover_a_buffer() -> None:
    for size, leaf, count, last in ((1, 4, 1, 1), (4, 4, 1, 4), (5, 4, 2, 1), (12, 4, 3, 4)):
        leaves = wire.Leaves(size, leaf)
        assert leaves.count == count
        assert leaves.nbytes(count - 1, 1) == last
        assert leaves.nbytes(0, count) == leaves.nbytes(0, count + 7) == size
    assert wire.digest_of([DIGEST]) != DIGEST


def test_the_size_of_a_body_follows_from_the_layout_and_the_codec() -> None:
    sizes = wire.Sizes(layout=LAYOUT, codecs=("fp32", "int8"))
    assert sizes.update("fp32").size == sizes.model.size == 28
    assert sizes.update("int8").size == 12
    with pytest.raises(MessageError, match="malformed: codec is 'int4', expected one of fp32, int8"):
        sizes.update("int4")


def mutated(body: bytes, chance: random.Random) -> bytes:
    """A body with bytes changed, left out, doubled or cut off."""
    raw = bytearray(body)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(raw) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(raw):
            raw[at] = chance.randrange(256)
        elif kind == 1:
            raw[at:at] = chance.randbytes(chance.randint(1, 9))
        elif kind == 2:
            del raw[at : at + chance.randint(1, 9)]
        elif kind == 3:
            raw[at:at] = raw[at : at + chance.randint(1, 64)]
        else:
            del raw[at:]
    return bytes(raw)


@pytest.mark.usefixtures("traced")
def test_mutated_messages_are_parsed_or_refused_by_name(many: Callable[..., int]) -> None:
    """20,000 times, so that each kind of damage meets each message hundreds of times; 100,000 times in a soak."""
    number = many(20_000, 5)
    chance, refusals = random.Random(number), Counter[str]()
    bodies = [(type(message), wire.packed(message)) for message in MESSAGES]
    tracemalloc.start()
    for _ in range(number):
        kind, body = bodies[chance.randrange(len(bodies))]
        try:
            wire.parsed(kind, mutated(body, chance))
        except MessageError as error:
            refusals[error.reason if len(str(error)) < 1_000 else "a long one"] += 1
    _, peak = tracemalloc.get_traced_memory()
    assert set(refusals) <= {"malformed", "wrong_size"}
    assert refusals.total() > number / 2
    assert peak < 4 * 2**20
