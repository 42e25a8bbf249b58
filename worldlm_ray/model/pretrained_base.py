"""The weights of a pre-trained model, mapped: read once per machine, and shared by all that train beside each other.

transformers reads a folder once, whatever its form (shards, bf16, older names). Its parameters are written in fp32,
under the names that they have in the module, to

    CACHE_DIR/weights/<fingerprint>/model.safetensors

Pages of a mapped file are in the machine's page cache once, for all its processes.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_ray.errors import DataError
from worldlm_ray.storage.filesystem import replacing
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout

WEIGHTS = "model.safetensors"
FORMAT = 1
"""Part of the fingerprint: raise it when the file changes."""


def base_file(folder: Path, cache_dir: Path) -> Path:
    """The file of a model's weights in fp32, made if it is not there.

    Raises:
        DataError: the weights are missing, damaged or not finite, or the cache cannot be written.
    """
    made = cache_dir.expanduser() / "weights" / fingerprint(folder) / WEIGHTS
    if not made.is_file():
        _convert(folder, made)
    return made


@lru_cache(4)
def _mapped(file: Path, device: str) -> dict[str, Any]:
    """The tensors of a file, once per process and device: mapped on the CPU, copied to a GPU."""
    from safetensors.torch import load_file

    return load_file(file, device=device)


def mapped_weights(folder: Path, cache_dir: Path, device: str = "cpu") -> dict[str, Any]:
    """The weights of a model by name, as tensors that all clients of a process share; see `base_file`."""
    return _mapped(base_file(folder, cache_dir), device)


def read_parameters(folder: Path, cache_dir: Path, layout: Layout) -> Flat:
    """The parameters of a layout as a flat buffer [layout.size], without torch once the file is there.

    Raises:
        DataError: as `base_file`.
    """
    from safetensors import safe_open

    flat = np.empty(layout.size, np.float32)
    with safe_open(base_file(folder, cache_dir), framework="np") as opened:
        for name, view in layout.views(flat).items():
            view[...] = opened.get_tensor(name)
    return flat


def read_whole(folder: Path, layout: Layout) -> Flat:
    """The same of a folder that is read once: nothing is kept in a cache.

    Raises:
        DataError: as `whole_model`.
    """
    flat, parameters = np.empty(layout.size, np.float32), dict(whole_model(folder).named_parameters())
    for name, view in layout.views(flat).items():
        view[...] = parameters[name].detach().numpy()
    return flat


def fingerprint(folder: Path) -> str:
    """Identity of the weights: names, sizes and times of the files, and the model's config.json.

    Raises:
        DataError: the folder cannot be read.
    """
    digest = hashlib.blake2b(str(FORMAT).encode(), digest_size=16)
    try:
        digest.update((folder / "config.json").read_bytes())
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
        if not files:
            raise DataError(f"{folder} holds no weights (*.safetensors); download the model again")
        for path in files:
            state = path.stat()
            digest.update(json.dumps([path.name, state.st_size, state.st_mtime_ns]).encode())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); give the folder of a model") from error
    return digest.hexdigest()


def _convert(folder: Path, made: Path) -> None:
    """Write the parameters of a model as one file. A tied parameter is written once."""
    import torch
    from safetensors.torch import save_file

    model = whole_model(folder)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
            raise DataError(f"{folder}: {name} holds a number that is not finite; give another model")
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with replacing(made) as handle:
            save_file(tensors, handle.name, metadata={"format": "pt"})
    except OSError as error:
        raise DataError(
            f"{made}: cannot be written ({error.strerror}); set data.cache_dir to another folder"
        ) from error


def whole_model(folder: Path) -> Any:
    """transformers' module with all its weights, in fp32.

    Raises:
        DataError: the weights cannot be read, or are not those of the model that config.json declares.
    """
    import torch
    import transformers

    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise errors of many kinds
        detail = " ".join(str(error).split())[:300]
        raise DataError(f"{folder}: the weights cannot be read ({detail}); download the model again") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            first = sorted(map(str, report[kind]))[0]
            raise DataError(f"{folder}: {kind.replace('_', ' ')} such as {first}; download the model again")
    return model
