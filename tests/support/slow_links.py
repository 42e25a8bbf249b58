"""A long, lossy line between a host and the others: a bridge of two TAP devices in this process.

It does what `tc netem` does, on kernels that have no netem: a bandwidth, a delay, losses at random, a queue that ends.
Every frame passes through this process, which keeps them for a test that looks for what must not cross.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME = 2_048
"""Longer than any frame: a TAP device without offload has none beyond its MTU."""
QUEUE = 1_000
"""Frames that wait in one direction before one is dropped, as netem's default."""
DEVICE = "/dev/net/tun"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a line is, the same in both directions."""

    mbit_per_s: float
    round_trip_s: float
    loss: float
    """Fraction of frames."""


@dataclass
class _Way:
    """One direction."""

    source: int
    target: int
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    """Frames with the time at which they arrive."""
    free_s: float = 0.0
    """When the last of them will have been sent."""


class SlowLink:
    """Two network devices, and a line of some quality between them.

    Args:
        near: name of the device at the others' end.
        far: name of the device at the host's end, until it is moved there.
        quality: of the line.
        seed: of the losses.
    """

    def __init__(self, near: str, far: str, quality: Quality, *, seed: int = 0) -> None:
        self.quality, self.dropped = quality, 0
        self.captured: list[bytes] = []
        """All frames that have arrived, in order."""
        self._random, self._stops = random.Random(seed), False
        self._ends = [_tap(near), _tap(far)]
        self._ways = [_Way(self._ends[1], self._ends[0]), _Way(self._ends[0], self._ends[1])]
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Remove both devices."""
        self._stops = True
        self._thread.join(5.0)
        for end in self._ends:
            os.close(end)

    def _carry(self) -> None:
        while not self._stops:
            now_s = time.monotonic()
            due = min((way.waiting[0][0] for way in self._ways if way.waiting), default=now_s + 0.1)
            ready, _, _ = select.select(self._ends, [], [], min(max(due - now_s, 0.0), 0.1))
            for way in self._ways:
                if way.source in ready:
                    self._take(way)
                self._give(way)

    def _take(self, way: _Way) -> None:
        try:
            frame = os.read(way.source, FRAME)
        except OSError:  # the device is down
            time.sleep(0.01)
            return
        now_s, quality = time.monotonic(), self.quality
        if len(way.waiting) >= QUEUE or self._random.random() < quality.loss:
            self.dropped += 1
            return
        way.free_s = max(way.free_s, now_s) + 8e-6 * len(frame) / quality.mbit_per_s
        way.waiting.append((way.free_s + quality.round_trip_s / 2, frame))

    def _give(self, way: _Way) -> None:
        now_s = time.monotonic()
        while way.waiting and way.waiting[0][0] <= now_s:
            _, frame = way.waiting.popleft()
            self.captured.append(frame)
            try:
                os.write(way.target, frame)
            except OSError:  # the host's device is not up
                self.dropped += 1


def why_no_link() -> str:
    """Why this machine cannot have such lines; empty if it can."""
    return "" if os.access(DEVICE, os.R_OK | os.W_OK) else f"lines between hosts need {DEVICE}"


def _tap(name: str) -> int:
    end = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return end
