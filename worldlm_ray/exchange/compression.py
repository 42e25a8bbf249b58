"""How an update's numbers travel: as they are, or in fewer bytes.

    codec   what an element becomes                              bytes, of fp32's
    fp32    itself                                               100 %
    bf16    its upper 16 bits, rounded to nearest                 50 %
    int8    round(x / s), s = max |x| of its block / 127          25.1 %   (blocks of 1024, and an fp32 s for each)
    int4    round(x / s), s = max |x| / 7; two to a byte          13.3 %   (blocks of 128)

What rounding loses of the backbone's change is not lost: the sender adds it to its next update (error feedback; Seide
et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847). Key layers need no such memory: their change is
measured from the parent's model, so that what did not arrive is in the next one anyway.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from worldlm_ray.config.values import unknown_name
from worldlm_ray.tensors.buffers import BLOCK, Flat, spread

CODECS: tuple[str, ...] = ("fp32", "bf16", "int8", "int4")
Bytes = npt.NDArray[np.uint8]

_BLOCKS = {"int8": 1024, "int4": 128}
"""Elements that share a scale. Both divide buffers.BLOCK, so that a thread's part begins with a block."""
_LEVELS = {"int8": 127, "int4": 7}


def nbytes(codec: str, size: int) -> int:
    """Bytes of so many elements.

    Raises:
        ConfigError: there is no codec of that name.
    """
    if codec == "fp32":
        return 4 * size
    if codec == "bf16":
        return 2 * size
    return _payload(codec, size) + 4 * _blocks(codec, size)


def encode(codec: str, values: Flat) -> Bytes:
    """Elements [size] as bytes [nbytes(codec, size)]."""
    packed = np.empty(nbytes(codec, values.size), np.uint8)
    split = _payload(codec, values.size)
    packed[max(split - 4, 0) : split] = 0  # where padding may be

    def work(parts: Iterable[slice]) -> None:
        for part in parts:
            if codec == "bf16":
                packed[2 * part.start : 2 * part.stop].view(np.uint16)[:] = _to_bf16(values[part])
            else:
                _quantize(codec, values[part], packed[:split], packed[split:].view(np.float32), part)

    if codec == "fp32":
        packed.view(np.float32)[:] = values
    else:
        spread(values.size, work)
    return packed


def decode(codec: str, packed: Bytes, size: int) -> Flat:
    """Bytes [nbytes(codec, size)] as elements [size]."""
    values = np.empty(size, np.float32)
    split = _payload(codec, size)

    def work(parts: Iterable[slice]) -> None:
        for part in parts:
            if codec == "bf16":
                upper = packed[2 * part.start : 2 * part.stop].view(np.uint16)
                values[part].view(np.uint32)[:] = upper.astype(np.uint32) << 16
            else:
                _restore(codec, packed[:split], packed[split:].view(np.float32), part, out=values[part])

    if codec == "fp32":
        values[:] = packed.view(np.float32)
    else:
        spread(size, work)
    return values


def memory(codec: str, backbone_size: int) -> Flat | None:
    """Where a sender remembers what was lost of its backbone's changes; None for a codec that loses nothing."""
    return None if codec == "fp32" else np.zeros(backbone_size, np.float32)


def lossy(codec: str, values: Flat, lost: Flat | None) -> Flat:
    """What arrives of an update, with what did not arrive of earlier ones.

    Args:
        codec: how it will travel.
        values: the update [size]; overwritten.
        lost: what was lost so far, of the first elements of the update; overwritten with what is lost now.

    Returns:
        The values that `encode` then carries without a further loss.
    """
    if codec == "fp32":
        return values
    if lost is not None:
        values[: lost.size] += lost
    arrives = decode(codec, encode(codec, values), values.size)
    if lost is not None:
        np.subtract(values[: lost.size], arrives[: lost.size], out=lost)
    return arrives


def _payload(codec: str, size: int) -> int:
    """Bytes of the elements themselves, padded so that the scales behind them are aligned."""
    if codec == "bf16":
        return 2 * size
    if codec == "fp32":
        return 4 * size
    if codec not in _BLOCKS:
        raise unknown_name("exchange.codec", codec, CODECS)
    whole = size if codec == "int8" else -(-size // 2)
    return -(-whole // 4) * 4


def _blocks(codec: str, size: int) -> int:
    return -(-size // _BLOCKS[codec])


def _to_bf16(values: Flat) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; what is not a number stays none."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    upper = (rounded >> np.uint32(16)).astype(np.uint16)
    if np.isnan(values).any():
        upper[np.isnan(values)] = 0x7FC0
    return upper


def _quantize(codec: str, values: Flat, payload: Bytes, scales: Flat, part: slice) -> None:
    """One part of the elements, which begins with a block."""
    block, levels = _BLOCKS[codec], np.float32(_LEVELS[codec])
    rows = np.zeros((_blocks(codec, values.size), block), np.float32)
    rows.reshape(-1)[: values.size] = values
    scale = np.abs(rows).max(axis=1) / levels
    first = part.start // block
    scales[first : first + len(scale)] = scale
    with np.errstate(invalid="ignore"):  # of a block with nan or infinity the scale says so
        rows /= np.where(scale > 0.0, scale, np.float32(1.0))[:, None]
        levels_of = np.rint(rows).reshape(-1)[: values.size].astype(np.int8)
    if codec == "int8":
        payload[part.start : part.stop] = levels_of.view(np.uint8)
        return
    nibbles = np.zeros(-(-values.size // 2) * 2, np.uint8)
    nibbles[: values.size] = (levels_of + np.int8(8)).view(np.uint8)
    payload[part.start // 2 : part.start // 2 + nibbles.size // 2] = nibbles[0::2] | (nibbles[1::2] << 4)


def _restore(codec: str, payload: Bytes, scales: Flat, part: slice, *, out: Flat) -> None:
    block = _BLOCKS[codec]
    count = _blocks(codec, out.size)
    rows = np.zeros((count, block), np.float32)
    flat = rows.reshape(-1)
    if codec == "int8":
        flat[: out.size] = payload[part.start : part.stop].view(np.int8)
    else:
        pairs = payload[part.start // 2 : part.start // 2 + -(-out.size // 2)]
        both = np.empty(2 * pairs.size, np.uint8)
        both[0::2], both[1::2] = pairs & 15, pairs >> 4
        flat[: out.size] = both[: out.size].astype(np.float32) - np.float32(8.0)
    first = part.start // block
    with np.errstate(invalid="ignore"):
        rows *= scales[first : first + count, None]
    out[:] = flat[: out.size]


assert all(BLOCK % block == 0 for block in _BLOCKS.values())
