"""A checked run: everything that both backends need to know before the first step.

`make_plan` does every check that can be made without starting Ray or reading whole texts, so that a broken
configuration costs a second and one line.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_ray import huggingface
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.private_fold import ClientPrivacy
from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.config.values import listed
from worldlm_ray.data import check_sources, load_tokenizer
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan import initial_model, kept, tree
from worldlm_ray.plan.faults import Faults
from worldlm_ray.plan.quotas import check_max_share, quotas
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import ledger_folder, weak_delta
from worldlm_ray.privacy.contributions import Contributions
from worldlm_ray.storage import filesystem
from worldlm_ray.storage.filesystem import expanded
from worldlm_ray.tensors.params import Flat, Layout, frozen
from worldlm_ray.training import deepspeed_config


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that has passed its checks. Small, picklable, the same in every process."""

    config: RunConfig
    root: NodeSpec
    shape: ModelShape
    layout: Layout

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return filesystem.place(self.config.run_dir or f"runs/{self.config.name}")

    @cached_property
    def specs(self) -> dict[str, NodeSpec]:
        """Every node by path, parents first."""
        return {node.path: node for node in self.root.walk()}

    @property
    def warnings(self) -> list[str]:
        """What an operator should know before the run begins, and what no text needs to be read for."""
        found = []
        for node in self.root.one_of_each():
            clients = [child for child in node.children if child.kind == "client"]
            if clients and node.settings.privacy.unit == "client":
                found.append((node.path, weak_delta(node.settings.privacy, len(clients))))
        return [f"{path}: {text}" for path, text in found if text]

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of every node by path, parents first."""
        return {path: node.kind for path, node in self.specs.items()}

    def node(self, path: str) -> NodeSpec:
        """The node at a path.

        Raises:
            ConfigError: there is none; lists those there are.
        """
        if path in self.specs:
            return self.specs[path]
        raise ConfigError("node", f"there is no node {path!r}", "expected one of " + listed(list(self.specs)))

    def find(self, name: str) -> NodeSpec:
        """The node that a user names: by its path, or by the end of it that no other node has (`legal`, `eu/legal`).

        Raises:
            ConfigError: there is none, or there are several; lists them.
        """
        if name in self.specs:
            return self.specs[name]
        found = [path for path in self.specs if name and path.endswith(f"/{name}")]
        if len(found) > 1:
            raise ConfigError("node", f"{name!r} may be each of {listed(found)}", "give more of its path")
        return self.node(found[0] if found else name)

    @property
    def tokenizer(self) -> str:
        """The one tokenizer of the world: `bytes`, or where its tokenizer.json lies."""
        return self.root.clients[0].settings.data.tokenizer or "bytes"

    def step_tokens(self, spec: NodeSpec) -> int:
        """Tokens of one optimizer step of a client; of a pool's, with those of all its members."""
        return spec.settings.training.batch_size * max(len(spec.settings.data.pool), 1) * self.shape.context

    def round_tokens(self, spec: NodeSpec) -> int:
        """Tokens of one local round of a client."""
        return spec.settings.training.local_steps * self.step_tokens(spec)

    def planned_rounds(self, spec: NodeSpec) -> int | None:
        """Local rounds that the budget gives a client, if all clients are equally fast; None if it is in seconds."""
        budget = self.config.budget
        if budget.tokens is not None:
            return math.ceil(budget.tokens / (self.round_tokens(spec) * len(self.root.clients)))
        return budget.rounds

    @cached_property
    def base(self) -> huggingface.Declared | None:
        """What the model that the run begins from declares; None of a run that begins from random weights."""
        folder = self.config.model.initial_from
        return None if folder is None else initial_model.declared(self.config, folder)

    def initial(self) -> Flat:
        """The run's initial parameters: every node computes or reads the same ones.

        Raises:
            ConfigError: they are damaged, or larger than this machine's memory.
        """
        self.check_memory()
        folder = self.config.model.initial_from
        if folder is not None:
            try:
                return frozen(huggingface.read_weights(expanded(folder), self.layout))
            except DataError as error:
                raise ConfigError("model.initial_from", str(error)) from error
        return frozen(initial_parameters(self.shape, self.layout, seed=self.config.seed))

    def check_initial(self) -> None:
        """Read the weights that the run begins from, if it begins from a model on disk, without keeping them.

        Raises:
            ConfigError: they are damaged, or hold a number that is not finite.
        """
        if self.config.model.initial_from is not None and self.root.settings.simulation.train:
            initial_model.check_weights(self.config.model.initial_from, self.layout, numbers=True)

    def check_memory(self) -> None:
        """Refuse a model whose parameters alone are more than this machine's memory.

        Raises:
            ConfigError: they are.
        """
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if 4 * self.layout.size > memory:
            needed, has = f"{4 * self.layout.size / 2**30:,.1f} GiB", f"{memory / 2**30:,.1f} GiB"
            got = f"a model of {self.layout.size:,} parameters needs {needed}, this machine has {has}"
            shape = self.shape
            cure = f"lower model.hidden_size ({shape.hidden_size:,}), model.layers ({shape.layers:,})"
            raise ConfigError("model", got, f"{cure} or the vocabulary ({shape.vocab_size:,} tokens)")

    def contributions(self, spec: NodeSpec) -> Contributions | None:
        """Ledgers of the clients directly below an inner node that promises client-level privacy; None of others.

        Raises:
            PrivacyError: no noise keeps the planned updates within the budget, or a ledger is damaged.
        """
        privacy, clients = spec.settings.privacy, [child for child in spec.children if child.kind == "client"]
        if privacy.unit != "client" or not clients:
            return None
        planned = [rounds for child in clients if (rounds := self.planned_rounds(child)) is not None]
        return Contributions(
            privacy,
            ledger_folder(privacy, self.run_dir),
            node=spec.path,
            clients=tuple(child.name for child in clients),
            rounds=max(planned, default=None),
            run=self.config.name,
            key=spec.key,
        )

    def inner_node(self, spec: NodeSpec, initial: Flat, contributions: Contributions | None = None) -> Node:
        """The state machine of an inner node; with the ledgers of its clients if it promises them privacy."""
        return Node(
            path=spec.path,
            children=tuple(child.name for child in spec.children),
            aggregation=spec.settings.aggregation,
            merge=spec.settings.merge,
            has_parent=spec.kind != "world",
            layout=self.layout,
            initial=initial,
            budget=self.config.budget,
            privacy=None if contributions is None else _client_privacy(spec, contributions),
            contributions=None if contributions is None else contributions.counts(),
            save_every=self.config.checkpoint.every_updates,
            awaited=[child.name for child in spec.children if self._may_come_late(child, spec)],
            min_clients=spec.min_clients or 0,
            liveness=self.config.liveness,
            codec=spec.settings.exchange.codec if spec.kind != "world" else "fp32",
            fragments=spec.settings.exchange.fragments if spec.kind != "world" else 1,
            child_fragments=spec.children[0].settings.exchange.fragments,
            quotas=quotas(spec, self.round_tokens, self.config.budget),
        )

    def _may_come_late(self, spec: NodeSpec, parent: NodeSpec) -> bool:
        """Whether a run may begin without a node."""
        if spec.kind == "client":
            return parent.elastic or self.faults.comes_late(spec.path)
        return all(self._may_come_late(child, spec) for child in spec.children)

    @cached_property
    def faults(self) -> Faults:
        """The run's faults on purpose."""
        return Faults.parse(self.config.faults, kinds=self.kinds)

    def hparams(self) -> dict[str, str | float | int | bool]:
        """What TensorBoard shows as the run's hyper-parameters: those in force at the world."""
        settings, config = self.root.settings, self.config
        rules = settings.aggregation
        return {
            "method": config.method,
            "seed": config.seed,
            "preset": config.model.preset if self.base is None else f"from {config.model.initial_from}",
            "parameters": self.layout.size,
            "key_share": round(self.layout.key_size / self.layout.size, 4),
            "clients": len(self.root.clients),
            "lr": settings.training.lr,
            "local_steps": settings.training.local_steps,
            "batch_size": settings.training.batch_size,
            "trigger": rules.trigger,
            "buffer_size": rules.buffer_size,
            "staleness": rules.staleness.fn,
            "score": rules.attention.score,
            "temperature": rules.attention.temperature,
            "server_optimizer": rules.server_optimizer.name,
            "merge_client": settings.merge.client,
            "merge_federation": settings.merge.federation,
        }

    def to_mapping(self) -> dict[str, Any]:
        """The configuration as plain containers: what travels to other processes."""
        return to_mapping(self.config)


def make_plan(config: RunConfig, *, check_data: bool = True) -> Plan:
    """Check a configuration as a whole.

    Args:
        config: the configuration.
        check_data: False where the files need not be on this machine.

    Raises:
        ConfigError: one problem, by its dotted key.
    """
    kept.check(config)
    root = tree.build(replace(config, data=replace(config.data, tokenizer=initial_model.tokenizer_of(config))))
    nodes = root.one_of_each()
    clients = [node for node in nodes if node.kind == "client"]
    tokenizers = {client.settings.data.tokenizer: client.key for client in clients}
    if len(tokenizers) != 1:
        first, second = list(tokenizers)[:2]
        raise ConfigError(
            f"{tokenizers[second]}.data.tokenizer",
            f"{second!r} differs from {first!r} of {tokenizers[first]}",
            "one world has one vocabulary: set data.tokenizer once, at the top",
        )
    try:
        vocab_size = load_tokenizer(next(iter(tokenizers))).vocab_size
    except DataError as error:
        raise ConfigError("data.tokenizer", str(error)) from error
    shape = initial_model.shape_of(config, vocab_size)
    layout = shape.layout(config.model.key_layers)
    for node in nodes:
        if layout.backbone_size == 0 and "adaptive" in (node.settings.merge.client, node.settings.merge.federation):
            got = "adaptive, but every layer is a key layer: there is no backbone to judge by"
            raise ConfigError(f"{node.key}.merge", got, "leave some out of model.key_layers, or give a number")
    _check_fragments(root, layout)
    for node in nodes:
        if node.kind != "client" and node.settings.privacy.unit == "client":
            _check_client_level(node, config)
    for node in nodes:
        for child in {child.key: child for child in reversed(node.children)}.values():
            if child.kind == "client":
                _check_whose_promise(child, node)
                _check_share(child, node)
                _check_overlap(child, node)
    for client in clients:
        deepspeed_config.check(client.settings, parameters=layout.size, key=client.key)
        if client.settings.privacy.unit == "record":
            _check_private(client, config)
    for node in nodes:
        privacy = node.settings.privacy
        if privacy.unit != "none" and privacy.ledger_dir is None and "://" in (config.run_dir or ""):
            raise ConfigError(
                f"{node.key}.privacy.ledger_dir",
                "an object store cannot lock a ledger against a second writer",
                "give a folder on a file system",
            )
    for node in nodes:
        _check_cost_model(node, root)
        if node.kind != "client":
            check_max_share(node)
    if check_data and root.settings.simulation.train:
        for client in clients:
            check_sources(client.settings.data, f"{client.key}.data")
        if config.model.initial_from is not None:
            initial_model.check_side_files(config.model.initial_from)
            initial_model.check_weights(config.model.initial_from, layout)
    plan = Plan(config=config, root=root, shape=shape, layout=layout)
    for fault in Faults.parse(config.faults, kinds=plan.kinds).all:
        if fault.kind in ("join", "leave") and plan.node(fault.node).settings.resources.clients_per_process > 1:
            got = f"{fault.kind} {fault.node}, but that client shares a process (resources.clients_per_process)"
            raise ConfigError("faults", got, "let clients with a process of their own come and go")
    return plan


def _check_cost_model(node: NodeSpec, root: NodeSpec) -> None:
    train, privacy = node.settings.simulation.train, node.settings.privacy
    if train != root.settings.simulation.train:
        got = f"{str(train).lower()}, and {str(not train).lower()} at the world"
        raise ConfigError(f"{node.key}.simulation.train", got, "a world trains or does not: set it once, at the top")
    if not train and privacy.unit != "none":
        got = f"{privacy.unit}, but simulation.train is false: without text and updates nothing is spent"
        raise ConfigError(f"{node.key}.privacy.unit", got, "leave privacy out of a simulation without training")


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


def _check_fragments(root: NodeSpec, layout: Layout) -> None:
    """What an exchange of one fragment at a time cannot be combined with."""
    in_parts = [node for node in root.walk() if node.kind != "world" and node.settings.exchange.fragments > 1]
    for node in in_parts:
        try:
            layout.fragments(node.settings.exchange.fragments)
        except ValueError as error:
            got = f"got {node.settings.exchange.fragments}, but {error}"
            raise ConfigError(f"{node.key}.exchange.fragments", got, "give a smaller number") from error
        if not node.settings.simulation.train:
            got = "more than one, but simulation.train is false, whose clients count whole models"
            raise ConfigError(f"{node.key}.exchange.fragments", got, "set it to 1")
        for below in node.walk():
            kind = "client" if below.kind == "client" else "federation"
            if getattr(below.settings.merge, kind) == "adaptive":
                got = f"adaptive judges by the whole backbone, of which {node.path} exchanges a fragment at a time"
                cure = f"give a number, or set exchange.fragments of {node.path} to 1"
                raise ConfigError(f"{below.key}.merge.{kind}", got, cure)
    for parent in root.inner:
        numbers = {child.settings.exchange.fragments: child for child in parent.children}
        if len(numbers) > 1:
            first, second = list(numbers.items())[:2]
            got = f"{second[0]} differs from the {first[0]} of {first[1].path}"
            raise ConfigError(f"{second[1].key}.exchange.fragments", got, "give all children of a node the same")
        [(number, child)] = numbers.items()
        if number > 1 and parent.settings.privacy.unit == "client":
            got = f"{number} fragments, but client-level noise of {parent.path} is made for whole updates"
            raise ConfigError(f"{child.key}.exchange.fragments", got, "set it to 1")
        if number > 1 and parent.settings.aggregation.robust.rule != "none":
            rule = parent.settings.aggregation.robust.rule
            got = f"{number} fragments, of which {rule} would find the agreement of those few that came"
            cure = f"set it to 1, or aggregation.robust.rule of {parent.path} to none"
            raise ConfigError(f"{child.key}.exchange.fragments", got, cure)


def _check_share(client: NodeSpec, parent: NodeSpec) -> None:
    """Who cannot share a process with others."""
    settings, key = client.settings, f"{client.key}.resources.clients_per_process"
    got = ""
    if deepspeed_config.is_zero(settings):
        got = "a client that DeepSpeed trains has workers of its own"
    elif settings.privacy.unit == "record":
        got = "a client that trains with differential privacy has a trainer with noise of its own"
    elif settings.merge.common_fraction:
        got = "a client that trains its parent's model beside its own (merge.common_fraction) holds two"
    elif settings.exchange.fragments > 1:
        got = "a client whose backbone travels in fragments keeps what has not had its turn"
    elif parent.elastic:
        got = f"clients of {parent.path} come and go one by one (min_clients, max_clients)"
    if settings.resources.clients_per_process > 1 and got:
        raise ConfigError(key, f"{settings.resources.clients_per_process}, but {got}", "set it to 1 there")


def _check_whose_promise(client: NodeSpec, parent: NodeSpec) -> None:
    """Privacy of whole clients is kept by the aggregator above them: a client cannot promise it to itself."""
    own, above = client.settings.privacy, parent.settings.privacy
    if own.unit != "client":
        return
    if above.unit != "client":
        got = f"client, but nothing above keeps it: {parent.path} promises {above.unit}"
        raise ConfigError(f"{client.key}.privacy.unit", got, f"set the privacy section at {parent.key}")
    if own != above:
        got = f"differs from that of {parent.path}, which clips and counts for all of its clients alike"
        raise ConfigError(f"{client.key}.privacy", got, f"set it at {parent.key}, or give the client a federation")


def _check_overlap(client: NodeSpec, parent: NodeSpec) -> None:
    """Who can train while it exchanges."""
    if not client.settings.exchange.overlap:
        return
    if parent.settings.aggregation.trigger == "synchronous":
        got = f"true, but {parent.path} is synchronous: its clients wait for each other's updates"
        raise ConfigError(f"{client.key}.exchange.overlap", got, "set it to false there, or another trigger")
    if deepspeed_config.is_zero(client.settings):
        got = "true, but a client that DeepSpeed trains gets its model a layer at a time, between two rounds"
        raise ConfigError(f"{client.key}.exchange.overlap", got, "set it to false at this client")
    others = {
        "exchange.fragments": client.settings.exchange.fragments > 1,
        "merge.common_fraction": bool(client.settings.merge.common_fraction),
        "resources.clients_per_process": client.settings.resources.clients_per_process > 1,
        "simulation.train: false": not client.settings.simulation.train,
    }
    for name, is_set in others.items():
        if is_set:
            got = f"true, but the client has {name}, whose rounds begin from what the parent has sent"
            raise ConfigError(f"{client.key}.exchange.overlap", got, f"set it to false, or do without {name}")


def _check_client_level(node: NodeSpec, config: RunConfig) -> None:
    """What noise on whole updates cannot be combined with."""
    if node.settings.aggregation.max_update_norm is not None:
        got = "whether an update is refused would tell its norm, which no noise covers"
        raise ConfigError(f"{node.key}.aggregation.max_update_norm", got, "remove it: updates are clipped anyway")
    if node.settings.aggregation.residuals.per_round:
        got = "residuals are single clients' key layers, which no noise covers"
        raise ConfigError(f"{node.key}.aggregation.residuals.per_round", got, "set it to 0 under client-level privacy")
    if node.settings.aggregation.robust.rule != "none":
        got = f"{node.settings.aggregation.robust.rule} is no sum, for which the noise is made"
        raise ConfigError(f"{node.key}.aggregation.robust.rule", got, "set it to none under client-level privacy")
    privacy = node.settings.privacy
    if privacy.noise_multiplier is None and privacy.max_updates is None and config.budget.seconds is not None:
        got = "is not set, and a budget of seconds does not say how many updates there will be"
        raise ConfigError(f"{node.key}.privacy.noise_multiplier", got, "set it, or privacy.max_updates")


def _check_private(client: NodeSpec, config: RunConfig) -> None:
    """What DP-SGD cannot be combined with."""
    training, key = client.settings.training, client.key
    if client.settings.privacy.noise_multiplier is None and config.budget.seconds is not None:
        got = "is not set, and a budget of seconds does not say how many steps there will be"
        raise ConfigError(f"{key}.privacy.noise_multiplier", got, "set it, or give the budget in rounds or tokens")
    if client.settings.data.pool:
        got = "a pool draws from several texts in every step, whose ledgers differ"
        raise ConfigError(f"{key}.data.pool", got, "give a private client one text")
    if training.activation_checkpointing:
        got = "true: layers that are computed twice hide their per-record gradients"
        raise ConfigError(f"{key}.training.activation_checkpointing", got, "switch it off for private clients")


def plan_from_mapping(mapping: dict[str, Any]) -> Plan:
    """The plan that `Plan.to_mapping` describes, in another process; data is checked where it is read."""
    return make_plan(from_mapping(mapping, resolved=True), check_data=False)
