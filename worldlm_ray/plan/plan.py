"""A checked run: everything that both backends need to know before the first step.

`make_plan` does every check that can be made without starting Ray or reading whole texts, so that a broken
configuration costs a second and one line.
"""

from __future__ import annotations

import math
import pickle
import zlib
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from worldlm_ray import huggingface
from worldlm_ray.config.loading import to_mapping
from worldlm_ray.config.schema import NodeSettings, RunConfig
from worldlm_ray.config.values import listed
from worldlm_ray.data import load_tokenizer
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.model.pretrained_shape import Architecture
from worldlm_ray.model.smaller_rank import SmallerRank, smaller_rank
from worldlm_ray.plan import checks, initial_model, kept, tree
from worldlm_ray.plan.faults import Faults
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import weak_delta
from worldlm_ray.storage import filesystem
from worldlm_ray.tensors.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that has passed its checks. It is made once, and pickled to every process of the run."""

    config: RunConfig
    root: NodeSpec
    shape: Architecture
    layout: Layout

    def __getstate__(self) -> bytes:
        """What is pickled: the fields, without what is made from them.

        It is compressed to stay below Ray's limit of 100 kB. Larger arguments of an actor lie in the memory of the
        process that made it, and the actor could not be restarted after that process has ended.
        """
        return zlib.compress(pickle.dumps({f.name: getattr(self, f.name) for f in fields(self)}))

    def __setstate__(self, state: bytes) -> None:
        self.__dict__.update(pickle.loads(zlib.decompress(state)))

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return filesystem.place(self.config.run_dir or f"runs/{self.config.name}")

    @cached_property
    def specs(self) -> dict[str, NodeSpec]:
        """Every node by path, parents first."""
        return {node.path: node for node in self.root.walk()}

    @cached_property
    def distinct(self) -> list[NodeSpec]:
        """Every node, parents first; of those that are copies of each other, the first."""
        return self.root.one_of_each()

    @cached_property
    def distinct_inner(self) -> list[NodeSpec]:
        """The `distinct` nodes that aggregate."""
        return [node for node in self.distinct if node.kind != "client" and not node.remote]

    @cached_property
    def distinct_clients(self) -> list[tuple[NodeSpec, NodeSpec]]:
        """Parent and client, for each of the `distinct` clients."""
        return [(self.specs[node.path.rsplit("/", 1)[0]], node) for node in self.distinct if node.kind == "client"]

    @cached_property
    def settings_in_force(self) -> list[tuple[str, NodeSettings]]:
        """Settings at the top of the configuration and at every `distinct` node, each with the prefix of its keys."""
        return [("", tree.base_settings(self.config)), *((f"{node.key}.", node.settings) for node in self.distinct)]

    def parent(self, spec: NodeSpec) -> NodeSpec | None:
        """The node above; None of the world."""
        path = tree.parent_path(spec.path)
        return None if path is None else self.specs[path]

    @property
    def warnings(self) -> list[str]:
        """What an operator should know before the run begins, and what no text needs to be read for."""
        found = []
        for node in self.distinct:
            clients = [child for child in node.children if child.kind == "client"]
            if clients and node.settings.privacy.unit == "client":
                found.append((node.path, weak_delta(node.settings.privacy, len(clients))))
        return [f"{path}: {text}" for path, text in found if text]

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of every node by path, parents first; `remote` of one in another cluster."""
        return {path: "remote" if node.remote else node.kind for path, node in self.specs.items()}

    @property
    def top(self) -> NodeSpec:
        """The uppermost node of this cluster: the world, or the member of another one that this run is."""
        return next(node for node in self.root.walk() if not node.remote)

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
        return _tokenizer(self.root) or "bytes"

    def step_tokens(self, spec: NodeSpec) -> int:
        """Tokens of one optimizer step of a client; of a pool's, with those of all its members."""
        return spec.settings.training.batch_size * max(len(spec.settings.data.pool), 1) * self.shape.context

    def round_tokens(self, spec: NodeSpec) -> int:
        """Tokens of one local round of a client."""
        return spec.settings.training.local_steps * self.step_tokens(spec)

    def smaller_rank(self, spec: NodeSpec) -> SmallerRank | None:
        """What a client trains whose adapters have a smaller rank than the run's; None of other nodes."""
        rank = spec.settings.training.lora_rank if spec.kind == "client" else None
        return smaller_rank(self.shape, self.layout, rank)

    def model_of(self, spec: NodeSpec) -> tuple[Architecture, Layout]:
        """Shape and layout of a node's model: the run's, but for a client of a smaller rank."""
        rank = self.smaller_rank(spec)
        return (self.shape, self.layout) if rank is None else (rank.shape, rank.layout)

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
            "preset": config.model.preset if config.model.initial_from is None else f"from {config.model.initial_from}",
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
        """The configuration as plain containers."""
        return to_mapping(self.config)


def make_plan(config: RunConfig, *, check_data: bool = True) -> Plan:
    """Check a configuration as a whole.

    Args:
        config: the configuration.
        check_data: False where the files need not be on this machine.

    Raises:
        ConfigError: one problem, by its dotted key.
    """
    plan = assembled(config)
    checks.check(plan, checks.RULES)
    if check_data and plan.root.settings.simulation.train:
        checks.check(plan, checks.DATA_RULES)
    return plan


def assembled(config: RunConfig) -> Plan:
    """The plan of a configuration, before its rules are checked.

    Raises:
        ConfigError: the tree is none, or the tokenizer or the model's shape cannot be read.
        RunError: a copy that the run keeps has changed.
    """
    kept.check(config)
    root = tree.build(replace(config, data=replace(config.data, tokenizer=initial_model.tokenizer_of(config))))
    try:
        vocab_size = load_tokenizer(_tokenizer(root)).vocab_size
    except DataError as error:
        raise ConfigError("data.tokenizer", str(error)) from error
    shape = initial_model.shape_of(config, vocab_size)
    return Plan(config=config, root=root, shape=shape, layout=shape.layout(config.model.key_layers))


def _tokenizer(root: NodeSpec) -> str | None:
    """The tokenizer of a world; where all clients are in other clusters, the one that is set at the top."""
    return (root.clients[0] if root.clients else root).settings.data.tokenizer
