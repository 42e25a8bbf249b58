"""The models of the nodes above a client, asked for so that it can measure them: now and then, and never for long.

It is asked of the node itself, as at the end of a run. Whatever goes wrong, there is no measurement this time.
"""

from __future__ import annotations

from ray.exceptions import RayError

from actors.drivers import References
from actors.shared import Address
from worldlm_ray.tensors.buffers import Flat

PATIENCE_S = 5.0
"""How long a client waits for such a model, at most."""


def published(address: Address, path: str) -> References[tuple[int, Flat] | None]:
    """The version and the values of the published model of a node above; None if there is none to be had now.

    Args:
        address: the client's.
        path: of the node.
    """
    try:
        version, refs = yield address.node(path).published.remote()
        return (version, (yield refs[0])) if version else None  # the initial model is known
    except (RayError, ValueError):  # ValueError: no actor of that name
        return None
