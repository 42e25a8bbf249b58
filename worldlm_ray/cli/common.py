"""What the commands share: terminals, arguments, and the configuration that an error may lie in."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from worldlm_ray.api.settings import configured
from worldlm_ray.config import loading
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.reports.terminal import Terminal

console = Terminal()
errors = Terminal(stderr=True, soft_wrap=True)

_spoken_of: list[tuple[str, list[str]]] = []


def _presets(begin: str) -> list[str]:
    """Completions of CONF."""
    return [name for name in loading.presets() if name.startswith(begin)]


def _runs(begin: str) -> list[str]:
    """Completions of RUN: the names under runs/."""
    return sorted(path.parent.name for path in Path("runs").glob(f"{glob.escape(begin)}*/config.yaml"))


Conf = Annotated[
    str,
    typer.Argument(help="a preset's name (see `worldlm presets`) or the path of a YAML file", autocompletion=_presets),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="changes, such as training.lr=1e-3 or world.children[0].training.local_steps=20"),
]
Run = Annotated[str, typer.Argument(help="a run's folder, or its name under runs/", autocompletion=_runs)]
RunDir = Annotated[str | None, typer.Option("--run-dir", help="folder of the run; runs/NAME unless given")]
LogLevel = Annotated[
    str | None,
    typer.Option("--log-level", help="debug, info, warning or error: sets logging.level, for every process"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def speak_of(conf: str, overrides: list[str]) -> None:
    """Remember the configuration of this command, with its overrides: where an error may lie."""
    _spoken_of[:] = [(conf, overrides)]


def spoken_of() -> tuple[str, list[str]] | None:
    """What `speak_of` was told; None before the first configuration."""
    return _spoken_of[0] if _spoken_of else None


def load(conf: str, overrides: list[str], run_dir: str | None) -> RunConfig:
    """Load the configuration of a new run.

    Raises:
        ConfigError: it is wrong.
    """
    speak_of(conf, overrides)
    filled(run_dir, "--run-dir")
    return configured(conf, overrides, run_dir=run_dir, say=_note)


def filled(folder: str | None, key: str) -> None:
    """Refuse an empty name of a folder, which would stand for the current one."""
    if folder is not None and not folder.strip():
        raise ConfigError(key, "is empty", "give a folder")


def _note(text: str) -> None:
    errors.print(text, highlight=False)


def warn(lines: list[str]) -> None:
    """Warnings go to stderr: stdout is for the result."""
    for line in lines:
        errors.print(f"WARNING {line}", style="bold red", highlight=False)


def print_json(value: Any) -> None:
    """Print the result of a reading command as JSON; numbers that are not finite are null, as in the run's files."""
    from worldlm_ray.tracking.node_state import finite

    # A pipe gets no colours, even where FORCE_COLOR asks for them: a program reads it.
    console.print_json(json.dumps(finite(value), allow_nan=False), highlight=console.file.isatty())
