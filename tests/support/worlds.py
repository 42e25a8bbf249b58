"""Small worlds on text made on the spot."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from worldlm_ray.config.schema import USUAL_KEY_LAYERS
from worldlm_ray.records import VerdictRecord

WORDS = [
    "the",
    "of",
    "a",
    "river",
    "mountain",
    "law",
    "code",
    "table",
    "speaks",
    "runs",
    "under",
    "over",
    "many",
    "small",
    "great",
    "light",
    "dark",
    "water",
    "stone",
]
TINY_MODEL: dict[str, Any] = {
    "hidden_size": 16,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 32,
    "context": 16,
    "key_layers": list(USUAL_KEY_LAYERS),
}


def write_text(path: Path, *, seed: int, size: int = 16_000) -> Path:
    """A file of random sentences, in documents separated by blank lines."""
    rng = random.Random(seed)
    documents: list[str] = []
    while sum(map(len, documents)) < size:
        sentences = [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) + "." for _ in range(rng.randint(2, 6))]
        documents.append(" ".join(sentences))
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def client(name: str, folder: Path, seed: int, **settings: Any) -> dict[str, Any]:
    """A client of a configuration, with its own text."""
    file = write_text(folder / f"{name}.txt", seed=seed)
    return {"client": name, "data": {"files": [str(file)]}, **settings}


def crowd(name: str, folder: Path, *, copies: int) -> dict[str, Any]:
    """Alike clients, `name-1` and so on, of which every one has enough text."""
    one = client(name, folder, 1)
    write_text(folder / f"{name}.txt", seed=1, size=9_000 * copies)
    return one | {"copies": copies}


def two_levels(folder: Path) -> list[dict[str, Any]]:
    """Two federations of two clients."""
    return [
        {"federation": "north", "children": [client("a", folder, 1), client("b", folder, 2)]},
        {"federation": "south", "children": [client("c", folder, 3), client("d", folder, 4)]},
    ]


def run_example(name: str, *arguments: str) -> str:
    """What an example prints, run as a user runs it."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, f"examples/{name}", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tokenizer(path: Path, *, size: int = 300, text: str = "the river speaks of the mountain and the law " * 50) -> Path:
    """A byte-level tokenizer.json, trained on the spot."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    made.save(str(path))
    return path


def added_token(index: int, *, content: str, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens` in a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": special, **flags}


def a_verdict(seq: int, reason: str = "accepted", **values: Any) -> VerdictRecord:
    """What a node decided about an update; `values` are fields that differ from the usual ones."""
    usual = {"node": "world", "now_s": float(seq), "sender": "a", "base_version": 0, "version": 0, "tau": 0, "bytes": 8}
    return VerdictRecord(seq=seq, verdict=reason, **(usual | values))
