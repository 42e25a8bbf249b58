"""What groups of workers have reserved on the cluster, and how it is given back after a death.

Ray keeps a placement group until the job that made it has ended. Ray Train's own cleaner, a process that outlives that
job, asks the dashboard who lives. Without a dashboard it never gives anything back, and never ends. So the name of
every placement group begins with its client's, and others find what a dead client has left.

Ray's public table gives the id of a placement group as text. Only a private type makes a handle of it.
"""

from __future__ import annotations

from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group


def prefix(namespace: str, path: str = "") -> str:
    """How the names of a client's placement groups begin, or without a path those of a whole run."""
    return f"{namespace}:{path}:" if path else f"{namespace}:"


def give_back(beginning: str) -> None:
    """Remove all placement groups whose name begins so, and thereby their workers."""
    for group in placement_group_table().values():
        if group["name"].startswith(beginning) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group["placement_group_id"]))))
