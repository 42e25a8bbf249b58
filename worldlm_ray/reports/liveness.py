"""Whether anything runs a run, by its status alone: what `worldlm status` says below its table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from worldlm_ray.errors import RunError
from worldlm_ray.plan.rundir import SUMMARY, is_simulated
from worldlm_ray.run_clock import Stamp
from worldlm_ray.storage.paths import pasted
from worldlm_ray.tracking.status import FAILED, read_status

ENDED_S = 5.0
"""A run with a summary whose status is older than this has ended."""
SILENT_S = 15.0
"""A status of this machine that is older than this is called silent."""
LOOK_S = 3.0
"""How long a status of another machine is watched: its clock says nothing about the age of the file."""
LOOK_EVERY_S = 0.25


def liveness(run_dir: Path, snapshot: Mapping[str, Any], *, sleep: Callable[[float], None] = time.sleep) -> str:
    """Say in a line whether a run lives.

    Args:
        run_dir: its folder.
        snapshot: its status.
        sleep: waits for so many seconds.
    """
    has_summary = (run_dir / SUMMARY).is_file()
    again = f"continue with: worldlm train --resume {pasted(run_dir)}"
    if is_simulated(run_dir):
        again = "start the simulation again"
    advice = f"if nothing runs it, {again}"
    if snapshot.get("status") == FAILED:
        return f"failed: {snapshot.get('reason') or 'it does not say of what'}\n{again}"
    age_s = _age_s(snapshot)
    if age_s is not None:
        if has_summary and age_s > ENDED_S:
            return "ended: see summary.json"
        return f"silent for {age_s:.0f} s; {advice}" if age_s > SILENT_S else "running"
    for _ in range(round(LOOK_S / LOOK_EVERY_S)):
        sleep(LOOK_EVERY_S)
        with suppress(RunError):
            if _mark(read_status(run_dir)) != _mark(snapshot):
                return "running"
    if has_summary:
        return "ended: see summary.json"
    return f"no news within {LOOK_S:.0f} s from the machine that it runs on, or ran on; {advice}"


def _age_s(snapshot: Mapping[str, Any]) -> float | None:
    """Seconds since the status was written; None if that was on another machine, or before this one was started."""
    try:
        stamp = snapshot["updated"]
        return Stamp(str(stamp["machine"]), float(stamp["monotonic_s"])).age_s()
    except (KeyError, TypeError, ValueError):
        return None


def _mark(snapshot: Mapping[str, Any]) -> tuple[Any, Any]:
    return snapshot.get("updated"), snapshot.get("updated_at")
