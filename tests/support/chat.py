"""A small tokenizer with a ChatML template, and conversations for it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from support.worlds import WORDS, tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(folder: Path, *, template: str | None = CHATML) -> Path:
    """The folder of a byte-level tokenizer.json of 302 tokens with the markers of ChatML, and its chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer.from_file(str(tokenizer(folder / "tokenizer.json")))
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def say(role: str, content: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": content}


def questions(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Records of one question and its answer, which begins with the words of the question."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = rng.choices(WORDS, k=2)
        found.append({"messages": [say("user", " ".join(words)), say("assistant", " ".join([*words, "river"]))]})
    return found


def write_records(path: Path, records: Sequence[Any]) -> Path:
    """A .jsonl file of records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
