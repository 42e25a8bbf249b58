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

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from worldlm_ray.config import names
from worldlm_ray.config.registry import Registry
from worldlm_ray.tensors.buffers import BLOCK, Flat, spread

Bytes = npt.NDArray[np.uint8]


class Codec(ABC):
    """How elements become bytes, and bytes elements. It has no state: the same object serves every sender."""

    loses = True
    """Whether what arrives differs from what was sent: a sender then keeps the difference of its backbone."""

    @abstractmethod
    def nbytes(self, size: int) -> int:
        """Bytes of so many elements: a message with any other number is refused."""

    @abstractmethod
    def encode(self, values: Flat) -> Bytes:
        """Elements [size] as bytes [nbytes(size)]; what is not a number must not become one."""

    @abstractmethod
    def decode(self, packed: Bytes, size: int) -> Flat:
        """Bytes [nbytes(size)] as elements [size]."""


CODECS: Registry[Codec] = names.CODECS


def codec(name: str) -> Callable[[type[Codec]], type[Codec]]:
    """Register a codec.

    Args:
        name: what `exchange.codec` calls it.
    """

    def register(kind: type[Codec]) -> type[Codec]:
        CODECS.add(name, kind(), kind)
        return kind

    return register


def nbytes(name: str, size: int) -> int:
    """Bytes of so many elements.

    Raises:
        ConfigError: there is no codec of that name.
    """
    return CODECS.get(name).nbytes(size)


def encode(name: str, values: Flat) -> Bytes:
    """Elements [size] as bytes [nbytes(name, size)]."""
    return CODECS.get(name).encode(values)


def decode(name: str, packed: Bytes, size: int) -> Flat:
    """Bytes [nbytes(name, size)] as elements [size]."""
    return CODECS.get(name).decode(packed, size)


def loses(name: str) -> bool:
    """Whether a codec rounds, so that its senders keep one backbone of what was lost."""
    return CODECS.get(name).loses


def memory(name: str, backbone_size: int) -> Flat | None:
    """Where a sender remembers what was lost of its backbone's changes; None for a codec that loses nothing."""
    return None if not loses(name) else np.zeros(backbone_size, np.float32)


def encode_update(name: str, values: Flat, lost: Flat | None) -> tuple[Bytes | None, Flat]:
    """Encode an update, with what did not arrive of earlier ones.

    Args:
        name: how it will travel.
        values: the update [size]; overwritten.
        lost: what was lost so far, of the first elements of the update; overwritten with what is lost now.

    Returns:
        The bytes that travel (None of fp32, whose values travel as they are), and the values that arrive.
    """
    if name == "fp32":
        return None, values
    if not loses(name):
        return encode(name, values), values
    if lost is not None:
        values[: lost.size] += lost
    encoded = encode(name, values)
    arrives = decode(name, encoded, values.size)
    if lost is not None:
        np.subtract(values[: lost.size], arrives[: lost.size], out=lost)
    return encoded, arrives


@codec("fp32")
class Fp32(Codec):
    """The elements themselves, 4 bytes each. Source: IEEE 754."""

    loses = False

    def nbytes(self, size: int) -> int:
        """See `Codec`."""
        return 4 * size

    def encode(self, values: Flat) -> Bytes:
        """See `Codec`."""
        packed = np.empty(self.nbytes(values.size), np.uint8)
        packed.view(np.float32)[:] = values
        return packed

    def decode(self, packed: Bytes, size: int) -> Flat:
        """See `Codec`."""
        values = np.empty(size, np.float32)
        values[:] = packed.view(np.float32)
        return values


@codec("bf16")
class Bf16(Codec):
    """The upper 16 bits of an fp32, rounded to nearest, ties to even. Source: the bfloat16 format."""

    def nbytes(self, size: int) -> int:
        """See `Codec`."""
        return 2 * size

    def encode(self, values: Flat) -> Bytes:
        """See `Codec`."""
        packed = np.empty(self.nbytes(values.size), np.uint8)

        def work(parts: Iterable[slice]) -> None:
            for part in parts:
                packed[2 * part.start : 2 * part.stop].view(np.uint16)[:] = _to_bf16(values[part])

        spread(values.size, work)
        return packed

    def decode(self, packed: Bytes, size: int) -> Flat:
        """See `Codec`."""
        values = np.empty(size, np.float32)

        def work(parts: Iterable[slice]) -> None:
            for part in parts:
                upper = packed[2 * part.start : 2 * part.stop].view(np.uint16)
                values[part].view(np.uint32)[:] = upper.astype(np.uint32) << 16

        spread(size, work)
        return values


def _to_bf16(values: Flat) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; what is not a number stays none."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    upper = (rounded >> np.uint32(16)).astype(np.uint16)
    if np.isnan(values).any():
        upper[np.isnan(values)] = 0x7FC0
    return upper


class Quantized(Codec):
    """Whole numbers, and an fp32 scale for each block of elements, behind them."""

    block: int
    """Elements that share a scale. It divides buffers.BLOCK, so that a thread's part begins with a block."""
    levels: int
    """The largest whole number; it stands for the largest magnitude of its block."""

    @abstractmethod
    def payload(self, size: int) -> int:
        """Bytes of the whole numbers."""

    @abstractmethod
    def put(self, whole: npt.NDArray[np.int8], payload: Bytes, start: int) -> None:
        """Write whole numbers into the payload; `start` is the place of their first element."""

    @abstractmethod
    def take(self, payload: Bytes, part: slice) -> npt.NDArray[Any]:
        """The whole numbers of the elements `part`, as any type."""

    def nbytes(self, size: int) -> int:
        """See `Codec`."""
        return self._padded(size) + 4 * self._blocks(size)

    def encode(self, values: Flat) -> Bytes:
        """See `Codec`."""
        packed, split = np.empty(self.nbytes(values.size), np.uint8), self._padded(values.size)
        packed[max(split - 4, 0) : split] = 0  # where padding may be

        def work(parts: Iterable[slice]) -> None:
            for part in parts:
                self._quantize(values[part], packed[:split], packed[split:].view(np.float32), part)

        spread(values.size, work)
        return packed

    def decode(self, packed: Bytes, size: int) -> Flat:
        """See `Codec`."""
        values, split = np.empty(size, np.float32), self._padded(size)

        def work(parts: Iterable[slice]) -> None:
            for part in parts:
                self._restore(packed[:split], packed[split:].view(np.float32), part, out=values[part])

        spread(size, work)
        return values

    def _padded(self, size: int) -> int:
        """Bytes of the whole numbers, padded so that the scales behind them are aligned."""
        return -(-self.payload(size) // 4) * 4

    def _blocks(self, size: int) -> int:
        return -(-size // self.block)

    def _quantize(self, values: Flat, payload: Bytes, scales: Flat, part: slice) -> None:
        """One part of the elements, which begins with a block."""
        rows = np.zeros((self._blocks(values.size), self.block), np.float32)
        rows.reshape(-1)[: values.size] = values
        scale = np.abs(rows).max(axis=1) / np.float32(self.levels)
        first = part.start // self.block
        scales[first : first + len(scale)] = scale
        with np.errstate(invalid="ignore"):  # of a block with nan or infinity the scale says so
            rows /= np.where(scale > 0.0, scale, np.float32(1.0))[:, None]
            whole = np.rint(rows).reshape(-1)[: values.size].astype(np.int8)
        self.put(whole, payload, part.start)

    def _restore(self, payload: Bytes, scales: Flat, part: slice, *, out: Flat) -> None:
        count, first = self._blocks(out.size), part.start // self.block
        is_whole = out.size == count * self.block  # all parts but the last: they need no buffer beside
        flat = out if is_whole else np.zeros(count * self.block, np.float32)
        flat[: out.size] = self.take(payload, part)
        rows = flat.reshape(count, self.block)
        with np.errstate(invalid="ignore"):
            rows *= scales[first : first + count, None]
        if not is_whole:
            out[:] = flat[: out.size]


@codec("int8")
class Int8(Quantized):
    """round(x / s), s = max |x| of its block of 1024 / 127. Source: blockwise, Dettmers et al., arXiv 2110.02861."""

    block, levels = 1024, 127

    def payload(self, size: int) -> int:
        """See `Quantized`."""
        return size

    def put(self, whole: npt.NDArray[np.int8], payload: Bytes, start: int) -> None:
        """See `Quantized`."""
        payload[start : start + whole.size] = whole.view(np.uint8)

    def take(self, payload: Bytes, part: slice) -> npt.NDArray[Any]:
        """See `Quantized`."""
        return payload[part.start : part.stop].view(np.int8)


@codec("int4")
class Int4(Quantized):
    """round(x / s), s = max |x| of its block of 128 / 7; two to a byte. Source: as int8, with fewer levels."""

    block, levels = 128, 7

    def payload(self, size: int) -> int:
        """See `Quantized`."""
        return -(-size // 2)

    def put(self, whole: npt.NDArray[np.int8], payload: Bytes, start: int) -> None:
        """See `Quantized`."""
        nibbles = np.zeros(-(-whole.size // 2) * 2, np.uint8)
        nibbles[: whole.size] = (whole + np.int8(8)).view(np.uint8)
        payload[start // 2 : start // 2 + nibbles.size // 2] = nibbles[0::2] | (nibbles[1::2] << 4)

    def take(self, payload: Bytes, part: slice) -> npt.NDArray[Any]:
        """See `Quantized`."""
        size = part.stop - part.start
        pairs = payload[part.start // 2 : part.start // 2 + -(-size // 2)]
        both = np.empty(2 * pairs.size, np.uint8)
        both[0::2], both[1::2] = pairs & 15, pairs >> 4
        return both[:size].astype(np.float32) - np.float32(8.0)


assert all(BLOCK % kind.block == 0 for kind in (Int8, Int4))
