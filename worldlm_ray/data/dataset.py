"""Tokens of a client -> batches: `Dataset`, and `Pool` of several.

Shapes: B sequences of a batch, T tokens of a sequence (the context).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worldlm_ray.data.tokenizer import Tokenizer, Tokens
from worldlm_ray.errors import DataError
from worldlm_ray.seeds import derive

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A client's tokens, and how batches are drawn from them."""

    train: Tokens
    """Memory-mapped, one-dimensional."""
    validation: Tokens
    """Memory-mapped, one-dimensional; never trained on: choices are made on it. Empty if there is none."""
    heldout: Tokens
    """Memory-mapped, one-dimensional; never trained on, and nothing is chosen on it."""
    train_bytes: int
    """UTF-8 bytes of the text behind `train`."""
    validation_bytes: int
    heldout_bytes: int
    vocab_size: int
    tokenizer: Tokenizer
    fingerprint: str
    """Changes whenever the text, the tokenizer or the split changes."""
    order: str = ""
    """Names the random order in which text is drawn."""
    left_out: tuple[str, ...] = ()
    """Warnings: files that were found and are not read, one line per entry of `data.files`, and characters that the
    tokenizer loses."""

    parts = 1
    """Sequences per step are `batch_size` times this."""

    def batches(self, seed: int, round: int, *, steps: int, batch_size: int, context: int) -> Iterator[Batch]:
        """Draw random training windows; the same seed, order and round give the same batches.

        Args:
            seed: of the run.
            round: of the client, from 0.
            steps: number of batches.
            batch_size: B.
            context: T.

        Yields:
            Inputs and targets, both [B, T], int64, C-contiguous; targets are one token ahead.

        Raises:
            DataError: the training part is shorter than a window.
        """
        require_window(len(self.train), "training", context)
        # A plain view: fancy indexing of np.memmap itself is several times slower.
        tokens = np.asarray(self.train)
        generator = np.random.Generator(np.random.PCG64(derive(seed, self.order, "batches", round)))
        for _ in range(steps):
            starts = generator.integers(0, len(tokens) - context, size=batch_size)
            yield self._windows(tokens, starts, context=context)

    def records(self, *, context: int) -> int:
        """Number of disjoint sequences in the training part, each of `context` tokens and the one that follows."""
        return len(self.train) // (context + 1)

    def poisson_batches(
        self, generator: np.random.Generator, *, steps: int, rate: float, context: int
    ) -> Iterator[Batch]:
        """Poisson batches: each record is in a batch with the same probability, independently. A batch may be empty.

        Args:
            generator: of the draws. Privacy amplification needs secret draws: seed it from the operating system.
            steps: number of batches.
            rate: probability that a record is in a batch.
            context: T.

        Yields:
            Inputs and targets as `batches`, [records, T].
        """
        tokens = np.asarray(self.train)
        count = self.records(context=context)
        for _ in range(steps):
            # First how many, then which: the distribution of independent draws, without a draw for each record.
            chosen = generator.choice(count, size=generator.binomial(count, rate), replace=False)
            yield self._windows(tokens, chosen.astype(np.int64) * (context + 1), context=context)

    def heldout_windows(self, tokens: int, *, context: int, batch_size: int) -> Iterator[Batch]:
        """Windows for evaluation. They do not overlap, and are spread evenly over the held-out part.

        Args:
            tokens: largest number of predicted tokens. At least one window is returned.
            context: T.
            batch_size: B; the last batch may be smaller.

        Yields:
            Inputs and targets, as `batches`. Every call yields the same.

        Raises:
            DataError: the held-out part is shorter than a window.
        """
        return self._spread(self.heldout, "held-out", tokens, context=context, batch_size=batch_size)

    def validation_windows(self, tokens: int, *, context: int, batch_size: int) -> Iterator[Batch]:
        """Windows of the validation part, as `heldout_windows`.

        Raises:
            DataError: the validation part is shorter than a window, or there is none.
        """
        return self._spread(self.validation, "validation", tokens, context=context, batch_size=batch_size)

    def validation_bytes_per_token(self) -> float:
        """Mean bytes of a validation token."""
        return self.validation_bytes / len(self.validation)

    def heldout_bytes_per_token(self) -> float:
        """Mean bytes of a held-out token. A loss per token divided by it is a loss per byte."""
        return self.heldout_bytes / len(self.heldout)

    def _spread(self, part: Tokens, name: str, tokens: int, *, context: int, batch_size: int) -> Iterator[Batch]:
        """Windows that do not overlap, spread evenly over a part."""
        require_window(len(part), name, context)
        for starts in spread((len(part) - 1) // context, tokens, step=context, context=context, batch_size=batch_size):
            yield self._windows(np.asarray(part), starts, context=context)

    def _windows(self, tokens: Tokens, starts: npt.NDArray[np.int64], *, context: int) -> Batch:
        window_BT = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
        return np.ascontiguousarray(window_BT[:, :-1]), np.ascontiguousarray(window_BT[:, 1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool(Dataset):
    """Several datasets trained on together: each step takes equally many sequences of each.

    Each member is drawn in its own order, so a client with that member alone would see the same batches of it.
    """

    members: tuple[Dataset, ...]

    @property
    def parts(self) -> int:  # type: ignore[override]
        """Sequences per step are `batch_size` times this."""
        return len(self.members)

    def batches(self, seed: int, round: int, *, steps: int, batch_size: int, context: int) -> Iterator[Batch]:
        """The batches of the members, concatenated: [parts * B, T]."""
        drawn = (m.batches(seed, round, steps=steps, batch_size=batch_size, context=context) for m in self.members)
        for step in zip(*drawn, strict=True):
            yield np.concatenate([inputs for inputs, _ in step]), np.concatenate([targets for _, targets in step])

    def heldout_windows(self, tokens: int, *, context: int, batch_size: int) -> Iterator[Batch]:
        """The windows of each member in turn, with an equal number of tokens each."""
        for member in self.members:
            yield from member.heldout_windows(tokens // self.parts, context=context, batch_size=batch_size)

    def heldout_bytes_per_token(self) -> float:
        """Mean over the members."""
        return math.fsum(member.heldout_bytes_per_token() for member in self.members) / self.parts

    def validation_windows(self, tokens: int, *, context: int, batch_size: int) -> Iterator[Batch]:
        """The windows of each member that has a validation part in turn, with an equal number of tokens each."""
        for member in self._validated:
            each = tokens // len(self._validated)
            yield from member.validation_windows(each, context=context, batch_size=batch_size)

    def validation_bytes_per_token(self) -> float:
        """Mean over the members that have a validation part."""
        means = [member.validation_bytes_per_token() for member in self._validated]
        return math.fsum(means) / len(means)

    @property
    def _validated(self) -> list[Dataset]:
        return [member for member in self.members if member.validation_bytes]


def pool_of(members: Sequence[Dataset]) -> Pool:
    """The members as one dataset, with the tokenizer and the vocabulary of the first."""
    first = members[0]
    return Pool(
        members=tuple(members),
        train=first.train,
        validation=first.validation,
        heldout=first.heldout,
        train_bytes=sum(member.train_bytes for member in members),
        validation_bytes=sum(member.validation_bytes for member in members),
        heldout_bytes=sum(member.heldout_bytes for member in members),
        vocab_size=first.vocab_size,
        tokenizer=first.tokenizer,
        fingerprint="+".join(member.fingerprint for member in members),
        left_out=tuple(line for member in members for line in member.left_out),
    )


def spread(available: int, tokens: int, *, step: int, context: int, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Where evaluated windows of a part begin, for one batch after the other.

    Args:
        available: windows of the part.
        tokens: largest number of tokens that are predicted. At least one window is given.
        step: tokens from one window of the part to the next.
        context: T.
        batch_size: B; the last batch may be smaller.
    """
    wanted = max(1, min(available, tokens // context))
    starts = np.arange(wanted, dtype=np.int64) * available // wanted * step
    for first in range(0, wanted, batch_size):
        yield starts[first : first + batch_size]


def require_window(got: int, part: str, context: int, *, cure: str = "give more text") -> None:
    """Check that a part holds at least one window.

    Args:
        got: tokens of the part.
        part: names it in the message.
        context: T.
        cure: what to do about it.

    Raises:
        DataError: the part is shorter than a window.
    """
    needed = context + 2
    if got < needed:
        problem = f"{part}: {got} tokens, but a context of {context} needs at least {needed}"
        raise DataError(f"{problem}; {cure}, or lower model.context")
