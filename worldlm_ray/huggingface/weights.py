"""The tensors of a Hugging Face model on disk.

Names, shapes and number formats are read from the files' headers and compared with the model before any number is
read. A tensor that the model does not have, or has in another shape, means another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_ray.errors import DataError
from worldlm_ray.huggingface.declared import CONFIG, read_object, refuse_pointer
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of adapters, which change the weights beside them."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PLAIN = {"F32", "F16", "BF16"}
_NEITHER = {"F64", "C64", "I64", "U64", "BOOL"}
"""Formats that are not read and are no quantization."""
_RECOMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Tensors in older files that every reader computes from config.json."""


def check_weights(folder: Path, layout: Layout, *, numbers: bool = False) -> None:
    """Check the weights of a Hugging Face model without keeping them.

    Args:
        folder: of the model.
        layout: of the wanted parameters.
        numbers: whether to read every tensor, too, and to find numbers that are not finite. Otherwise only headers.

    Raises:
        DataError: as `read_weights`.
    """
    for file, names in _tensors(folder, layout).items():
        if numbers:
            with _opened(file) as opened:
                for name in names:
                    _finite(_numbers(opened, name, file), name, file)


def read_weights(folder: Path, layout: Layout) -> Flat:
    """The weights of a Hugging Face model on disk as a flat buffer. A tied head becomes a copy of the embedding.

    Raises:
        DataError: a file is missing or damaged; an adapter lies beside them; a tensor is missing, unknown, of another
            shape than the layout's, of a number format other than fp32, fp16 and bf16, or holds a number that is not
            finite.
    """
    found = _tensors(folder, layout)
    flat = np.empty(layout.size, np.float32)
    views = layout.views(flat)
    for file, names in found.items():
        with _opened(file) as opened:
            for name in names:
                views[name][...] = _finite(_numbers(opened, name, file), name, file)
    if HEAD in views and not any(HEAD in names for names in found.values()):
        views[HEAD][...] = views[EMBEDDING]
    return flat


def _tensors(folder: Path, layout: Layout) -> dict[Path, list[str]]:
    """Names of the tensors to read, by file, checked against the layout."""
    shapes = {entry.name: tuple(entry.shape) for entry in layout.entries}
    found = dict[Path, list[str]]()
    taken = dict[str, Path]()
    for file in _files(folder):
        found[file] = []
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                if _RECOMPUTED.fullmatch(name):
                    continue
                _check(opened.get_slice(name), name, file, shapes)
                if name in taken:
                    raise DataError(f"{file}: {name} is in {taken[name].name}, too; remove the file that is not needed")
                taken[name] = file
                found[file].append(name)
    missing = set(shapes) - set(taken)
    if missing == {HEAD} and EMBEDDING in taken and read_object(folder / CONFIG).get("tie_word_embeddings") is True:
        missing = set()
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} tensors, such as {sorted(missing)[0]}; download it again")
    return found


def _check(tensor: Any, name: str, file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    shape, kind = tuple(tensor.get_shape()), str(tensor.get_dtype())
    if kind not in _PLAIN:
        why = "" if kind in _NEITHER else ": weights are quantized"
        raise DataError(f"{file}: {name} is {kind}{why}; give the model in fp32, fp16 or bf16")
    if name not in shapes:
        raise DataError(f"{file}: {name} is no tensor of a plain Llama model; give a model of that kind")
    if shape != shapes[name]:
        raise DataError(f"{file}: {name} is {list(shape)}, the model wants {list(shapes[name])}")


def _numbers(opened: Any, name: str, file: Path) -> np.ndarray[Any, Any]:
    try:
        numbers: np.ndarray[Any, Any] = opened.get_tensor(name).float().numpy()  # numpy has no bfloat16
    except Exception as error:  # safetensors raises bare exceptions from Rust
        raise _damaged(file, error) from error
    return numbers


def _finite(numbers: np.ndarray[Any, Any], name: str, file: Path) -> np.ndarray[Any, Any]:
    # A sum needs no memory. It is not finite if a number is not, and fp32 numbers cannot overflow fp64.
    if not np.isfinite(np.sum(numbers, dtype=np.float64)):
        raise DataError(f"{file}: {name} holds a number that is not finite; download it again, or give another model")
    return numbers


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, open for reading. Every failure is a DataError."""
    from safetensors import safe_open

    try:
        with file.open("rb") as raw:
            refuse_pointer(raw.read(64), file)
        context: Any = safe_open(file, framework="pt")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); download it again") from error
    except DataError:
        raise
    except Exception as error:  # safetensors raises bare exceptions from Rust
        raise _damaged(file, error) from error
    with context as opened:
        yield opened


def _damaged(file: Path, error: Exception) -> DataError:
    detail = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{file}: is damaged or was cut short ({detail}); download it again")


def _files(folder: Path) -> list[Path]:
    """The files of the weights, each once."""
    for name in ADAPTER:
        if (folder / name).exists():
            raise DataError(f"{folder} holds an adapter ({name}), which is not applied; merge it into the model first")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise DataError(f"{folder} holds no {WEIGHTS}; other formats are not read, save the model as safetensors")
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise DataError(f"{index}: holds no weight_map of tensors and files; download it again")
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{index}: names {name!r}, which is no file of this folder; download it again")
        if not (folder / name).is_file():
            raise DataError(f"{folder} lacks {name}, which {INDEX} names; download it again")
    return [folder / name for name in names]
