"""Seeds as values: every random stream is a pure function of (run seed, names).

No generator is ever shared or checkpointed: a client's batches of round 7 are the same whether it got
there in one go, after a restart, in simulation or on a cluster.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """Derive an independent 63-bit seed from the run's seed and any names (node path, purpose, round).

    Example:
        >>> derive(0, "world/europe/italy", "batches", 3) == derive(0, "world/europe/italy", "batches", 3)
        True
    """
    text = "\x1f".join([str(int(seed)), *(str(name) for name in names)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
