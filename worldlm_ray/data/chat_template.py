"""The chat template of a tokenizer: conversation -> text, and where the answers lie in it.

A template lies beside the tokenizer.json, in chat_template.jinja or under `chat_template` of tokenizer_config.json.
transformers renders it, as for every user of the model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

from worldlm_ray.data import special_tokens
from worldlm_ray.data.chat_records import ASSISTANT, Conversation
from worldlm_ray.data.tokenizer import files_beside, read_file, tokenizer_file
from worldlm_ray.errors import ConfigError, DataError

TEMPLATE = "chat_template.jinja"
_BESIDE = (special_tokens.SETTINGS, special_tokens.MAP, TEMPLATE)
EXTRA = "pip install 'worldlm_ray[huggingface]'"


@dataclass(frozen=True)
class Rendered:
    """A conversation as a template writes it."""

    text: str
    answers: list[tuple[int, int]]
    """Begin and end of every answer in it, in characters, with the marker that ends the turn."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        files: tokenizer.json and what lies beside it, by name.
        where: their folder, for messages.
        control: the special tokens, which no message may spell.
    """

    def __init__(self, files: Mapping[str, bytes], *, where: str, control: Sequence[str]) -> None:
        self._where, self._control = where, tuple(control)
        self._renderer = _renderer(tuple(sorted(files.items())))

    def spells_control(self, conversation: Conversation) -> bool:
        """Whether a message spells a special token. The model would take it for the template's."""
        return any(token in message["content"] for message in conversation.messages for token in self._control)

    def render(self, conversation: Conversation) -> Rendered:
        """Write a conversation.

        An answer is a message of the assistant that follows another message.

        Raises:
            DataError: the template refuses the conversation, or writes an answer otherwise once more follows it.
        """
        messages, where = conversation.messages, conversation.where
        text, answers = self._written(messages, where), list[tuple[int, int]]()
        for index in range(1, len(messages)):
            if messages[index]["role"] != ASSISTANT:
                continue
            before = self._written(messages[:index], where, asks=True)
            until = self._written(messages[: index + 1], where)
            if not (until.startswith(before) and text.startswith(until)):
                problem = f"{where}: the chat template of {self._where} writes message {index} otherwise alone"
                raise DataError(f"{problem} than among others; give conversations of one answer, or another template")
            answers.append((len(before), self._end(until, len(before))))
        return Rendered(text, answers)

    def _end(self, until: str, begin: int) -> int:
        """End of the answer that begins here: with the marker that ends the turn, without white space after it."""
        bare = until.rstrip()
        return len(bare) if len(bare) > begin and bare.endswith(self._control or "\0") else len(until)

    def _written(self, messages: Sequence[Mapping[str, str]], where: str, *, asks: bool = False) -> str:
        try:
            return str(
                self._renderer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=asks
                )
            )
        except Exception as error:  # a template is a program, and raises what it likes
            detail = " ".join(str(error).split())
            problem = f"{where}: the chat template of {self._where} refuses it ({detail})"
            raise DataError(f"{problem}; mend or remove the conversation, or give another template") from error


def template_files(spec: str) -> dict[str, bytes]:
    """tokenizer.json and the files beside it that a chat template needs, by name.

    Args:
        spec: `data.tokenizer`.

    Raises:
        DataError: one of them cannot be read.
    """
    path = tokenizer_file(spec)
    return {special_tokens.TOKENIZER: read_file(path)} | files_beside(path, _BESIDE)


def check_template(spec: str | None, key: str) -> None:
    """Check that a tokenizer has a chat template, and that it can be rendered here, without loading either.

    Args:
        spec: `data.tokenizer`.
        key: dotted key of the data section, for messages.

    Raises:
        ConfigError: it has none, or transformers is not installed.
    """
    cure = f"give the folder of a tokenizer with a chat template, or put a {TEMPLATE} beside its tokenizer.json"
    if spec is None or spec == "bytes":
        raise ConfigError(f"{key}.tokenizer", "bytes have no chat template, which format: conversations needs", cure)
    try:
        files = files_beside(tokenizer_file(spec), _BESIDE)
        settings = json.loads(files.get(special_tokens.SETTINGS, b"{}"))
    except DataError as error:
        raise ConfigError(f"{key}.tokenizer", str(error)) from error
    except ValueError as error:
        raise ConfigError(f"{key}.tokenizer", f"{spec}: {special_tokens.SETTINGS} is not JSON", "mend it") from error
    if TEMPLATE not in files and not (isinstance(settings, dict) and settings.get("chat_template")):
        raise ConfigError(f"{key}.tokenizer", f"there is no chat template beside {spec}", cure)
    if util.find_spec("transformers") is None:
        raise ConfigError(f"{key}.format", "conversations, but transformers is not installed", EXTRA)


@lru_cache(4)
def _renderer(files: tuple[tuple[str, bytes], ...]) -> Any:
    """transformers' tokenizer of these files. They may lie in an object store, so that it is given copies."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        for name, contents in files:
            Path(folder, name).write_bytes(contents)
        # Not the class that tokenizer_config.json names: text and special tokens are the same, and no model is needed.
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
