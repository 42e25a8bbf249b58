"""Whether processes of a run are alive, judged by its status: the line below the table of `worldlm status`."""

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
"""Seconds. A run with a summary and an older status has ended."""
SILENT_S = 15.0
"""Seconds. A run of this machine with an older status is called silent."""
LOOK_S = 3.0
"""Seconds for which a status of another machine is watched, since that machine's clock may differ."""
LOOK_EVERY_S = 0.25


def liveness(run_dir: Path, snapshot: Mapping[str, Any], *, sleep: Callable[[float], None] = time.sleep) -> str:
    """Say in a line whether a run is alive.

    Args:
        run_dir: its folder.
        snapshot: its status.
        sleep: waits for a number of seconds.
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
    return f"no new status within {LOOK_S:.0f} s from the machine that it runs on, or ran on; {advice}"


def _age_s(snapshot: Mapping[str, Any]) -> float | None:
    """Seconds since the status was written; None if another machine wrote it, or if this one was restarted since."""
    try:
        stamp = snapshot["updated"]
        return Stamp(str(stamp["machine"]), float(stamp["monotonic_s"])).age_s()
    except (KeyError, TypeError, ValueError):
        return None


def _mark(snapshot: Mapping[str, Any]) -> tuple[Any, Any]:
    return snapshot.get("updated"), snapshot.get("updated_at")
