"""Conversations of a client: rows of tokens of which only the answers are targets, cached on disk.

    CACHE_DIR/<key>/train.bin, validation.bin, heldout.bin, meta.json

The files are those of a text's cache, with rows of context + 1 ids, uint32 (worldlm_ray/data/packing.py). A
conversation goes to one part as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import cache, chat_records
from worldlm_ray.data.chat_template import ChatTemplate, template_files
from worldlm_ray.data.dataset import Batch, Dataset, spread
from worldlm_ray.data.packing import COUNTED, Encoded, Encoder, PartWriter
from worldlm_ray.data.sources import Found
from worldlm_ray.data.split import PARTS, Parting, Placed, Share
from worldlm_ray.data.text import describe, shard_of
from worldlm_ray.data.tokenizer import Tokenizer, Tokens, load_tokenizer
from worldlm_ray.errors import DataError
from worldlm_ray.seeds import derive
from worldlm_ray.storage import open_files
from worldlm_ray.storage.filesystem import expanded, replacing
from worldlm_ray.tensors.targets import IGNORED

FORMAT = 1
"""Part of every key: raise it when the same conversations become other rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversations(Dataset):
    """A client's conversations in rows of context + 1 tokens, and how batches are drawn from them.

    A sequence is a row. Targets that belong to no answer are `IGNORED`. Bytes are those of the answers.
    """

    context: int

    def batches(self, seed: int, round: int, *, steps: int, batch_size: int, context: int) -> Iterator[Batch]:
        """Draw random rows of the training part; the same seed, order and round give the same batches.

        Raises:
            DataError: there is no row.
        """
        rows = self._rows(self.train, "training", context)
        tokens = np.asarray(self.train)
        generator = np.random.Generator(np.random.PCG64(derive(seed, self.order, "batches", round)))
        for _ in range(steps):
            starts = generator.integers(0, rows, size=batch_size) * (context + 1)
            yield self._windows(tokens, starts, context=context)

    def heldout_bytes_per_token(self) -> float:
        """Mean bytes of a token of the held-out answers."""
        return self.heldout_bytes / self._targets(self.heldout)

    def validation_bytes_per_token(self) -> float:
        """Mean bytes of a token of the validation answers."""
        return self.validation_bytes / self._targets(self.validation)

    def _spread(self, part: Tokens, name: str, tokens: int, *, context: int, batch_size: int) -> Iterator[Batch]:
        rows = self._rows(part, name, context)
        for starts in spread(rows, tokens, step=context + 1, context=context, batch_size=batch_size):
            yield self._windows(np.asarray(part), starts, context=context)

    def _windows(self, tokens: Tokens, starts: npt.NDArray[np.int64], *, context: int) -> Batch:
        inputs, targets = super()._windows(tokens, starts, context=context)
        mark = int(COUNTED)
        return inputs & ~mark, np.where(targets & mark, targets & ~mark, IGNORED)

    def _rows(self, part: Tokens, name: str, context: int) -> int:
        if context != self.context:
            raise ValueError(f"the rows are made for sequences of {self.context} tokens, not {context}")
        if not len(part):
            raise DataError(f"{name}: no conversation; give more of them")
        return len(part) // (context + 1)

    @staticmethod
    def _targets(part: Tokens) -> int:
        return max(1, int(np.count_nonzero(np.asarray(part) & COUNTED)))


@dataclass
class Counts:
    """What became of the conversations of a client."""

    all: int = 0
    cut: int = 0
    unanswered: int = 0
    """Those whose first answer lies beyond a row."""
    spelled: int = 0
    """Those with a message that spells a special token."""

    def lines(self, size: int) -> list[str]:
        """What a user should know of them.

        Args:
            size: tokens of a row.
        """
        lines = []
        if long := self.cut + self.unanswered:
            lines.append(
                f"{long:,} of {self.all:,} conversations are longer than {size:,} tokens: {self.cut:,} cut, "
                f"{self.unanswered:,} left out, whose answers lie beyond"
            )
        if self.spelled:
            lines.append(
                f"{self.spelled:,} of {self.all:,} conversations left out: their text spells a special token of the "
                "tokenizer"
            )
        return lines


def prepare_conversations(config: DataConfig, found: Found, *, context: int, key: str, order: str) -> Conversations:
    """Render, tokenize, split and pack a client's conversations, or map what an earlier call cached.

    Args:
        config: the data section.
        found: its files.
        context: tokens per sequence.
        key: dotted key of the section, for messages.
        order: names the random order of the rows unless the section does.

    Raises:
        DataError: a file is damaged, a part has no conversation, or the cache cannot be written.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    files = template_files(config.tokenizer or "")
    fingerprint = _fingerprint(config, found, tokenizer, files, context=context)
    folder = expanded(config.cache_dir) / fingerprint
    parts = cache.cached(folder)
    if parts is None:
        parts = _Build(config, found.paths, tokenizer, files, size=context + 1).write(folder, key=key)
    counts = Counts(**json.loads((folder / "meta.json").read_bytes())["counts"])
    cures = {"train": "give more of them", "heldout": f"give more of them, or raise {key}.heldout_fraction"}
    if config.validation_fraction:
        cures["validation"] = f"give more of them, raise {key}.validation_fraction or set it to 0"
    for part, cure in cures.items():
        if not parts[part].bytes:
            raise DataError(f"{part} part of {key} ({describe(config)}): no conversation with an answer; {cure}")
    rows = {part: cache.mapped(folder / f"{part}.bin", np.dtype(np.uint32)) for part in PARTS}
    return Conversations(
        context=context,
        train=rows["train"],
        validation=rows["validation"],
        heldout=rows["heldout"],
        train_bytes=parts["train"].bytes,
        validation_bytes=parts["validation"].bytes,
        heldout_bytes=parts["heldout"].bytes,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        order=config.order or order,
        left_out=(*found.left_out, *counts.lines(context + 1)),
    )


def _fingerprint(
    config: DataConfig, found: Found, tokenizer: Tokenizer, files: dict[str, bytes], *, context: int
) -> str:
    """Key of the content: it changes with the conversations, the template, the tokenizer, the split and the context."""
    key = hashlib.blake2b(digest_size=16)
    key.update(cache.fingerprint_of(config, cache.source_of(config, found.paths), tokenizer).encode())
    key.update(f" conversations {FORMAT} {context}".encode())
    for name, contents in sorted(files.items()):
        key.update(f" {name} {len(contents)} ".encode() + contents)
    return key.hexdigest()


class _Build:
    """Writes the cache of a client's conversations."""

    def __init__(
        self, config: DataConfig, paths: list[Path], tokenizer: Tokenizer, files: dict[str, bytes], *, size: int
    ) -> None:
        self._config, self._paths, self._size = config, paths, size
        self._padding = tokenizer.end or 0  # no target is after it, so that any would do
        self._encoder = Encoder(files, size=size)
        control = list(self._encoder.control.values())
        self._template = ChatTemplate(files, where=str(config.tokenizer), control=control)
        self._used = Share(config.train_fraction)
        self._counts = Counts()

    def write(self, folder: Path, *, key: str) -> dict[str, cache.PartMeta]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as files:
                writers = {
                    part: PartWriter(
                        files.enter_context(replacing(folder / f"{part}.bin")), size=self._size, padding=self._padding
                    )
                    for part in PARTS
                }
                for placed in self._placed():
                    if (encoded := self._encoded(placed)) is not None:
                        writers[placed.part].add(encoded)
                parts: dict[str, cache.PartMeta] = {part: writer.end() for part, writer in writers.items()}
            meta = {part: asdict(found) for part, found in parts.items()} | {"counts": asdict(self._counts)}
            with replacing(folder / "meta.json") as meta_file:
                meta_file.write(json.dumps(meta).encode())
            return parts
        except OSError as error:
            problem = f"cannot write the token cache in {folder} ({error.strerror})"
            cure = open_files.cure(error, "set it to a folder with space that you may write")
            raise DataError(f"{key}.cache_dir: {problem}; {cure}") from error

    def _placed(self) -> Iterator[Placed[chat_records.Conversation]]:
        """The conversations of this shard, each with its part."""
        shard, shards = (1, 1) if self._config.shard is None else shard_of(self._config.shard)
        every = (found for path in self._paths for found in chat_records.read(path))
        parting = Parting[chat_records.Conversation](
            heldout=self._config.heldout_fraction, validation=self._config.validation_fraction
        )
        for conversation in islice(every, shard - 1, None, shards):
            yield from parting.add(conversation)
        yield from parting.rest()

    def _encoded(self, placed: Placed[chat_records.Conversation]) -> Encoded | None:
        """The tokens of a conversation that is used."""
        if placed.part == "train" and self._used.kept(placed) is None:
            return None
        self._counts.all += 1
        if self._template.spells_control(placed.block):
            self._counts.spelled += 1
            return None
        encoded = self._encoder.encode(self._template.render(placed.block))
        if not (encoded.ids & COUNTED).any():
            self._counts.unanswered += 1
            return None
        self._counts.cut += encoded.is_cut
        return encoded
