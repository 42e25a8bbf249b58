"""status.json of a run folder: how it is read, and how it tells that a run has failed or ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from worldlm_ray.errors import RunError
from worldlm_ray.plan.rundir import STATUS, SUMMARY
from worldlm_ray.storage import filesystem
from worldlm_ray.tracking.status_fields import wrong_field

FAILED = "failed"
"""`status` of a run that has ended with an error; `reason` stands beside it."""
INDENTED_NODES = 512
"""A file about more nodes has no indentation: writing is ten times as fast, and no person reads so many nodes."""


def read_status(run_dir: Path) -> dict[str, Any]:
    """The newest snapshot of a run, running or not.

    Raises:
        RunError: there is no run in this folder, or its status cannot be read.
    """
    path = run_dir / STATUS
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"there is no run in {str(run_dir)!r}: it has no {STATUS}; give a run's folder") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{str(path)!r} is not valid JSON ({error}); resume the run to write it again") from error
    if not isinstance(status, dict):
        raise RunError(f"{str(path)!r} holds a {type(status).__name__}, not a mapping; resume the run to mend it")
    if wrong := wrong_field(status):
        raise RunError(f"{str(path)!r} is no status of a run: {wrong}; resume the run to write it again")
    return status


def record_failure(run_dir: Path, reason: str) -> None:
    """Write into status.json that the run has failed, and why. Without a status.json the run has not begun.

    Call it when no tracker has the folder open any more. A tracker that opens the folder again removes the entry.
    """
    # A refusal of the storage must not replace the reason, which the caller raises.
    with suppress(OSError, RunError), filesystem.refusals(run_dir):
        status = read_status(run_dir)
        filesystem.replace_text(
            run_dir / STATUS, json.dumps({**status, "status": FAILED, "reason": reason}, indent=1) + "\n"
        )


def has_ended(run_dir: Path, status: Mapping[str, Any]) -> bool:
    """Whether the files of a run say that it is over: finished, stopped or failed."""
    return status.get("status") == FAILED or (run_dir / SUMMARY).is_file()


def replace_json(path: Path, value: Mapping[str, Any], *, durable: bool = False) -> None:
    """Write status.json or summary.json, all of it or nothing.

    Args:
        path: of the file.
        value: ready for JSON, with `nodes`.
        durable: whether to return only when it is on disk.

    Raises:
        OSError: the storage refused.
    """
    indent = 1 if len(value["nodes"]) <= INDENTED_NODES else None
    filesystem.replace_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n", durable=durable)
