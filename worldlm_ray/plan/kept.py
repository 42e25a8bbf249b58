"""Small files that a run keeps in its folder, so that it does not depend on what becomes of the originals.

    RUN/files/tokenizer.json             what the run's text is encoded with
    RUN/files/tokenizer_config.json ...  what lies beside it
    RUN/files/config.json ...            of the model that the run begins from
    RUN/files/my_rule.py                 a file of `rules`

They are copied when the run is made. Its configuration holds a fingerprint of each (`kept`), and every process of the
run checks the copies against them: other contents under the same name would be another model in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from worldlm_ray.config import rule_files
from worldlm_ray.config.rule_files import fingerprint
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.data.tokenizer import tokenizer_file
from worldlm_ray.errors import RunError
from worldlm_ray.storage import filesystem
from worldlm_ray.storage.filesystem import expanded

FOLDER = rule_files.FOLDER
TOKENIZER, MODEL_CONFIG, GENERATION_CONFIG = "tokenizer.json", "config.json", "generation_config.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
"""Copied from beside a tokenizer.json."""
MOST_BYTES = 4_000_000
"""Of a file beside the tokenizer or the model: a larger one is of another kind."""


def collect(config: RunConfig, tokenizer: str) -> dict[str, bytes]:
    """The files that a new run is to keep, by name.

    Args:
        config: the run's configuration.
        tokenizer: `bytes`, or where its tokenizer.json lies.

    Raises:
        OSError: one of them cannot be read.
        RunError: one of them is too large.
    """
    found = {rule_files.file_name(rule): rule_files.read(rule) for rule in config.rules if rule_files.is_file(rule)}
    if tokenizer != "bytes":
        file = tokenizer_file(tokenizer)
        with filesystem.refusals(file):
            found[TOKENIZER] = file.read_bytes()
        if file.name == TOKENIZER:  # beside a file of another name lies what belongs to others
            found |= _small(file.parent, BESIDE)
    if config.model.initial_from is not None:
        found |= _small(expanded(config.model.initial_from), (MODEL_CONFIG, GENERATION_CONFIG))
    return found


def _small(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    found = dict[str, bytes]()
    for file in (folder / name for name in names):
        with filesystem.refusals(file):
            if not file.is_file():
                continue
            found[file.name] = file.read_bytes()
        if len(found[file.name]) > MOST_BYTES:
            raise RunError(f"{file} has {len(found[file.name]):,} bytes, at most {MOST_BYTES:,} are kept; remove it")
    return found


def store(run_dir: Path, files: Mapping[str, bytes]) -> None:
    """Write the files into a run's folder.

    Raises:
        OSError: the storage refused.
    """
    folder = run_dir / FOLDER
    if files:
        filesystem.make_folder(folder)
    for name, contents in files.items():
        with filesystem.refusals(folder):
            (folder / name).write_bytes(contents)


def overwritten(config: RunConfig) -> list[str]:
    """Names of the files that lie in a run's folder already, where its copies would go."""
    return [name for name in config.kept if (file := place(config, name)) is not None and file.exists()]


def remove(config: RunConfig) -> None:
    """Remove a run's copies, and their folder if it holds nothing else; what cannot be removed stays."""
    for file in filter(None, (place(config, name) for name in config.kept)):
        with suppress(OSError), filesystem.refusals(file):
            file.unlink(missing_ok=True)
            if not filesystem.is_remote(file):
                file.parent.rmdir()


def fingerprints(files: Mapping[str, bytes]) -> dict[str, str]:
    """The fingerprint of each file, by name."""
    return {name: fingerprint(contents) for name, contents in files.items()}


def place(config: RunConfig, name: str) -> Path | None:
    """Where a run's copy of a file lies; None if it keeps none."""
    if name not in config.kept or config.run_dir is None:
        return None
    return filesystem.place(config.run_dir) / FOLDER / name


def read(config: RunConfig, name: str) -> bytes | None:
    """The run's copy of a file; None if it keeps none.

    Raises:
        RunError: the copy is missing, or is not what the run was made with.
    """
    file = place(config, name)
    if file is None:
        return None
    try:
        with filesystem.refusals(file):
            contents = file.read_bytes()
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror or error}); restore the file of this run") from error
    if fingerprint(contents) != config.kept[name]:
        raise RunError(f"{file} has changed since the run was made; restore the file of this run")
    return contents


def check(config: RunConfig) -> None:
    """Check that all copies are those that the run was made with.

    Raises:
        RunError: one is not, by name.
    """
    for name in config.kept:
        read(config, name)


def check_originals(config: RunConfig) -> None:
    """Refuse to go by the run's copy of the tokenizer where the file that its configuration names has changed.

    Figures that are measured with one tokenizer could be taken for those of the other.

    Raises:
        RunError: the file is another one now.
    """
    spec = config.data.tokenizer
    if TOKENIZER not in config.kept or spec is None:
        return
    file = tokenizer_file(spec)
    try:
        with filesystem.refusals(file):
            contents = file.read_bytes()
    except OSError:
        return  # it is gone: the copy is all there is
    if fingerprint(contents) != config.kept[TOKENIZER]:
        raise RunError(
            f"{file} (data.tokenizer) has changed since the run was made, so that its text would be other tokens; "
            f"restore the file, or move it away: the run keeps a copy in {place(config, TOKENIZER)}"
        )
