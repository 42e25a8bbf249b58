"""A node's model as a Hugging Face folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from worldlm_ray.errors import DataError
from worldlm_ray.huggingface.declared import CONFIG
from worldlm_ray.huggingface.side_files import NAMES, side_files
from worldlm_ray.huggingface.weights import WEIGHTS
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout

CARD = "README.md"
MARK = "<!-- model card of worldlm export -->"
"""A mark in every card. A README.md without it is not replaced."""


def export(
    theta: Flat,
    shape: ModelShape,
    layout: Layout,
    folder: Path,
    *,
    kept: Mapping[str, bytes] | None = None,
    card: str | None = None,
) -> None:
    """Write a model for Hugging Face.

    Args:
        theta: the parameters.
        shape: sizes of the decoder.
        layout: where each parameter lies in `theta`.
        folder: made if missing. Files of an earlier export are replaced.
        kept: small files by name, of the run's tokenizer (none for bytes) and of the model that it began from.
        card: text of the model card, README.md.

    Raises:
        DataError: the folder cannot be written, or one of the files cannot be read.
    """
    from safetensors.numpy import save_file

    files = side_files(shape, kept or {})
    if card is not None:
        files[CARD] = f"{card}\n{MARK}\n".encode()
    views = layout.views(theta)
    ordered = {name: np.ascontiguousarray(views[name]) for name, _ in shape.parameters}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(ordered, folder / WEIGHTS, metadata={"format": "pt"})
        for name, contents in files.items():
            if name != CARD or not has_other_card(folder):
                (folder / name).write_bytes(contents)
        for name in NAMES - set(files):
            (folder / name).unlink(missing_ok=True)
        # safetensors makes a file that only its owner may read. It must have the mode of the other files.
        os.chmod(folder / WEIGHTS, (folder / CONFIG).stat().st_mode & 0o777)
    except OSError as error:
        raise DataError(f"cannot export to {folder}: {error.strerror}; give another folder") from error


def has_other_card(folder: Path) -> bool:
    """Whether a folder has a README.md that is no card of an export. Such a file is kept."""
    card = folder / CARD
    return card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace")
