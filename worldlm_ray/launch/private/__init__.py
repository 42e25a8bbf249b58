"""Ray's private interfaces: the only place that uses them, since they change between minor versions of Ray.

session      signal handlers and daemons' output while this process is connected
state        who has died, and the state of actors
reservations placement groups of a run, and how they are removed
head         the address of a local cluster, and whether a head lives
autoscaler   the checks of `ray up`
train        Ray Train's controller: callbacks, placement groups, its cleaner
coordinator  reservations at the coordinator that sizes elastic groups of workers
"""

import ray

from worldlm_ray.errors import RunError

VERSION = "2.60"
"""The minor version of Ray that these modules were written for; pyproject.toml asks for the same."""


def check_version(found: str) -> None:
    """Refuse a Ray whose private interfaces may differ.

    Raises:
        RunError: it is another minor version.
    """
    if not found.startswith(f"{VERSION}."):
        raise RunError(f"Ray {found} is installed, worldlm_ray needs {VERSION}; pip install 'ray[train]=={VERSION}.*'")


check_version(ray.__version__)
