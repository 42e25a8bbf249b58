"""The search of a captured line finds what it is to find."""

from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest
from support.sites import is_clear, payloads

VALUES = np.linspace(0.1, 0.9, 64, dtype=np.float32).tobytes()


def frame(payload: bytes, *, source: int, target: int, kind: int = 6) -> bytes:
    segment = struct.pack("!HHIIBBHHH", source, target, 0, 0, 5 << 4, 0, 0, 0, 0) + payload
    packet = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 0, 0, 64, kind, 0, b"\n\0\0\1", b"\n\0\0\2")
    return bytes(12) + b"\x08\x00" + packet + segment + b"padding"


def test_payloads_of_one_port_by_both_ends() -> None:
    frames = [
        frame(b"up", source=40_000, target=8_443),
        frame(b"down", source=8_443, target=40_000),
        frame(b"load", source=40_000, target=8_443),
        frame(b"another port", source=40_000, target=22),
        frame(b"no TCP", source=40_000, target=8_443, kind=17),
        bytes(12) + b"\x08\x06" + bytes(28),
    ]
    assert sorted(payloads(frames, port=8_443).values()) == [b"down", b"upload"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_is_found(protocol: int) -> None:
    sent = pickle.dumps({"values": list(range(9))}, protocol)
    assert is_clear(b"\x17\x03\x03" + sent, {}) == ["a pickle"]


def test_secrets_are_found_by_name_and_noise_is_not() -> None:
    noise = np.random.default_rng(0).bytes(2**20)
    secrets = {"text": b"zanzibar", "fp32": VALUES[64:96]}
    assert is_clear(noise, secrets) == []
    assert is_clear(noise + b"in zanzibar" + VALUES, secrets) == ["text", "fp32"]
