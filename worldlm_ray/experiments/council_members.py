"""The members of a council: models of one run, read from its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worldlm_ray.errors import CheckpointError, ConfigError
from worldlm_ray.experiments.evaluate import sound_theta
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.tensors.buffers import Flat

KEY = "--members"


@dataclass(frozen=True, kw_only=True, eq=False)
class Members:
    """Models of a run, and why others are left out."""

    thetas: dict[str, Flat]
    """Parameters [layout.size] by path of the node, parents first."""
    left_out: list[str]
    """A line for the user for each node that does not take part."""


def may_serve(spec: NodeSpec) -> bool:
    """Whether others may use a node's model.

    Where noise is added above a client (`privacy.unit: client`), no noise covers the client's own model.
    """
    privacy = spec.settings.privacy
    return spec.kind != "client" or privacy.unit != "client" or privacy.report_metrics


def chosen(plan: Plan, names: str | None) -> list[NodeSpec]:
    """The nodes that a user names, parents first; each once.

    Args:
        plan: the run.
        names: paths, or their ends, with commas between them. None: every node whose model may serve.

    Raises:
        ConfigError: there is no such node, or its model may not serve.
    """
    if names is None:
        return [spec for spec in plan.root.walk() if may_serve(spec)]
    given = [name for part in names.split(",") if (name := part.strip())]
    if not given:
        raise ConfigError(KEY, "names no node", "give paths with commas between them, such as world,world/code/python")
    wanted = {plan.find(name).path for name in given}
    found = [spec for spec in plan.root.walk() if spec.path in wanted]
    for spec in found:
        if not may_serve(spec):
            problem = f"no noise covers the model of {spec.path} (privacy.unit: client)"
            raise ConfigError(KEY, problem, "leave it out")
    return found


def members_of(plan: Plan, names: str | None = None) -> Members:
    """The models of a council.

    A node that the user has not named is left out if it has no whole checkpoint, if its model has diverged, or if it
    is that of another member to the bit, as inner nodes' models are where children hand on what they are given.

    Args:
        plan: the run.
        names: as of `chosen`.

    Raises:
        ConfigError: as of `chosen`.
        CheckpointError: a node that is named has no usable model, or no node has one.
    """
    specs = chosen(plan, names)
    thetas, left_out = dict[str, Flat](), list[str]()
    if names is None:
        others = [spec.path for spec in plan.root.walk() if not may_serve(spec)]
        left_out += [f"{path} is left out: no noise covers its model (privacy.unit: client)" for path in others]
    uncovered = len(left_out)
    for spec in specs:
        try:
            theta = sound_theta(plan, spec)
        except CheckpointError as error:
            if names is not None:
                raise
            left_out.append(f"{spec.path} is left out: {error}")
            continue
        same = next((path for path, other in thetas.items() if np.array_equal(theta, other)), None)
        if names is None and same is not None:
            left_out.append(f"{spec.path} is left out: its model is that of {same}")
        else:
            thetas[spec.path] = theta
    if not thetas:
        raise CheckpointError(f"no model of {plan.run_dir} can serve: {left_out[uncovered]}")
    return Members(thetas=thetas, left_out=left_out)
