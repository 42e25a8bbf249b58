"""What is made from a plan: the initial parameters, the state machines of inner nodes, and their clients' ledgers."""

from __future__ import annotations

import os

import numpy as np

from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.node_setup import NodePlace, NodeRules
from worldlm_ray.aggregation.private_fold import ClientPrivacy
from worldlm_ray.errors import ConfigError
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan import initial_model
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.quotas import quotas
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import ledger_folder
from worldlm_ray.privacy.contributions import Contributions
from worldlm_ray.tensors.buffers import Flat, frozen


def initial(plan: Plan) -> Flat:
    """The run's initial parameters: every node computes or reads the same ones.

    Raises:
        ConfigError: they are damaged, or larger than this machine's memory.
    """
    check_memory(plan)
    model, seed = plan.config.model, plan.config.seed
    if model.initial_from is not None:
        return frozen(initial_model.read_parameters(model, plan.shape, plan.layout, seed=seed))
    assert isinstance(plan.shape, ModelShape), "a model of transformers begins from one on disk"
    return frozen(initial_parameters(plan.shape, plan.layout, seed=seed))


def check_initial(plan: Plan) -> None:
    """Read the weights that the run begins from, if it begins from a model on disk, without keeping them.

    Raises:
        ConfigError: they are damaged, or hold a number that is not finite.
    """
    if plan.config.model.initial_from is not None and plan.root.settings.simulation.train:
        initial_model.check_weights(plan.config.model.initial_from, plan.shape, plan.layout, numbers=True)


def check_memory(plan: Plan) -> None:
    """Refuse a model whose parameters alone are more than this machine's memory.

    Raises:
        ConfigError: they are.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * plan.layout.size > memory:
        needed, has = f"{4 * plan.layout.size / 2**30:,.1f} GiB", f"{memory / 2**30:,.1f} GiB"
        got = f"a model of {plan.layout.size:,} parameters needs {needed}, this machine has {has}"
        shape = plan.shape
        cure = f"lower model.hidden_size ({shape.hidden_size:,}), model.layers ({shape.layers:,})"
        raise ConfigError("model", got, f"{cure} or the vocabulary ({shape.vocab_size:,} tokens)")


def contributions(plan: Plan, spec: NodeSpec) -> Contributions | None:
    """Ledgers of the clients directly below an inner node that promises client-level privacy; None of others.

    Raises:
        PrivacyError: no noise keeps the planned updates within the budget, or a ledger is damaged.
    """
    privacy, clients = spec.settings.privacy, [child for child in spec.children if child.kind == "client"]
    if privacy.unit != "client" or not clients:
        return None
    planned = [rounds for child in clients if (rounds := plan.planned_rounds(child)) is not None]
    return Contributions(
        privacy,
        ledger_folder(privacy, plan.run_dir),
        node=spec.path,
        clients=tuple(child.name for child in clients),
        rounds=max(planned, default=None),
        run=plan.config.name,
        key=spec.key,
    )


def inner_node(
    plan: Plan, spec: NodeSpec, initial: Flat, contributions: Contributions | None = None, *, watch: bool = True
) -> Node:
    """The state machine of an inner node.

    Args:
        plan: the run.
        spec: the node.
        initial: the run's initial parameters.
        contributions: the ledgers of its clients, if it promises them privacy.
        watch: whether it gives up silent children.
    """
    place = NodePlace(
        path=spec.path,
        children=tuple(child.name for child in spec.children),
        has_parent=spec.kind != "world",
        optional=frozenset(child.name for child in spec.children if _may_come_late(plan, child, spec)),
        min_clients=spec.min_clients or 0,
    )
    rules = NodeRules(
        aggregation=spec.settings.aggregation,
        merge=spec.settings.merge,
        budget=plan.config.budget,
        save_every=plan.config.checkpoint.every_updates,
        liveness=plan.config.liveness if watch else None,
        codec=spec.settings.exchange.codec,
    )
    return Node(
        place,
        rules,
        plan.layout,
        initial,
        privacy=None if contributions is None else _client_privacy(spec, contributions),
        contributions=None if contributions is None else contributions.counts(),
        quotas=quotas(spec, plan.round_tokens, plan.config.budget),
    )


def _may_come_late(plan: Plan, spec: NodeSpec, parent: NodeSpec) -> bool:
    """Whether a run may begin without a node."""
    if spec.kind == "client":
        return parent.elastic or plan.faults.comes_late(spec.path)
    if spec.remote:
        return not spec.required
    return all(_may_come_late(plan, child, spec) for child in spec.children)


def _client_privacy(spec: NodeSpec, contributions: Contributions) -> ClientPrivacy:
    rules, privacy = spec.settings.aggregation, spec.settings.privacy
    return ClientPrivacy(
        federations=frozenset(child.name for child in spec.children if child.kind != "client"),
        bound=privacy.max_grad_norm,
        noise=contributions.noise,
        delta=privacy.delta,
        limits=contributions.limits(),
        before=contributions.noises(),
        expected=rules.buffer_size if rules.trigger == "goal_achieved" else len(spec.children),
        # From the operating system and never saved: noise that a restart draws again cancels out.
        generator=np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(16), "little"))),
    )
