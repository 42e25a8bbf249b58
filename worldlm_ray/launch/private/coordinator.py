"""Ray's autoscaling coordinator, which Ray Train asks how many workers an elastic group may have.

It knows what runs of Ray Train have reserved, and nothing of actors. No public interface tells it of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    ResourceRequestPriority,
    get_or_create_autoscaling_coordinator,
)


class Coordinator:
    """The cluster's coordinator, started if there is none."""

    def __init__(self) -> None:
        self._actor = get_or_create_autoscaling_coordinator()

    def reserve(
        self, requester: str, wanted: Sequence[tuple[dict[str, float], dict[str, str]]], *, expire_after_s: float
    ) -> Any:
        """Reserve resources, in place of what the same requester had reserved; returns the reference of the answer.

        Args:
            requester: name of the reservation.
            wanted: resources and labels of every process.
            expire_after_s: seconds after which the reservation ends unless it is made again.
        """
        return self._actor.request_resources.remote(
            requester_id=requester,
            resources=[resources for resources, _ in wanted],
            label_selectors=[labels for _, labels in wanted],
            expire_after_s=expire_after_s,
            priority=ResourceRequestPriority.HIGH,  # as Ray Train's own: first come, first served
        )
