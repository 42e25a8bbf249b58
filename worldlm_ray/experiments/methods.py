"""Published methods as configurations of the same code, so that a comparison differs in the method only.

    method        tree    when                 key layers        server                        source
    worldlm       as is   as configured        as configured     as configured                 this package
    fedavg        flat    synchronous          none              sgd 1.0                       arXiv 1602.05629
    fedprox       flat    synchronous          none              sgd 1.0; clients drawn to it  arXiv 1812.06127
    ditto         flat    synchronous          none              sgd 1.0; own models beside    arXiv 2012.04221
    mr_mtl        flat    synchronous          none              sgd 1.0; own models pushed    arXiv 2206.07902
    apfl          flat    synchronous          none              sgd 1.0; own models mixed in  arXiv 2003.13461
    hierfavg      as is   synchronous          none              sgd 1.0, push_every 2         arXiv 1905.06641
    fedper        flat    synchronous          personal          sgd 1.0                       arXiv 1912.00818
    fedrep        flat    synchronous          personal, first   sgd 1.0                       arXiv 2102.07078
    fedbuff       flat    half the clients     none              sgd 1.0, 1/sqrt(1 + tau)      AISTATS 2022
    diloco        flat    synchronous          none              nesterov 0.7, 0.9             arXiv 2311.08105
    halos         as is   each update          none              delayed_nesterov, merge 0.25  HALoS, ICML 2025
    soup          flat    once, at the end     none              plain mean                    arXiv 2203.05482
    ties          flat    once, at the end     none              ties                          arXiv 2306.01708
    fedit         flat    synchronous          none              sgd 1.0 on adapters           arXiv 2305.05644
    ffa_lora      flat    synchronous          none              sgd 1.0 on B; A is frozen     arXiv 2403.12313
    fedsa_lora    flat    synchronous          B, personal       sgd 1.0 on A                  arXiv 2410.01463
    fedalt        flat    synchronous          none              sums; own and rest are mixed  arXiv 2503.11880
    kin           as is   synchronous          none              sums; own, kin, rest mixed    model/experts.py
    local         flat    synchronous          none              no client takes from another; stopped early
    pooled        one     -                    none              one client; a step takes a batch of every client's text

A name may have variants, such as `worldlm+keys+uniform`: see variants.py. A variant changes a single setting, so a
comparison shows the effect of that setting. Of `pooled`, the variant `ft` adds a second run: see stages.py.

Of `soup` and `ties` every client trains alone from the same initial weights, in one round as long as the budget, and at
the end takes the merged model. Their curve of the clients' own models has no point after that.

Flat: every client is a child of the world. Its link is as slow as the slowest on its path, with the sum of their
delays. A method's settings replace those of the configuration at every node. The clients' training, data and machines
stay. Clients draw their text in the same order in every method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.config.schema import INHERITED, USUAL_KEY_LAYERS, RunConfig
from worldlm_ray.config.values import one_of
from worldlm_ray.errors import ConfigError
from worldlm_ray.experiments.variants import VARIANTS, Scaled
from worldlm_ray.plan import initial_model, tree
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.plan.tree import NodeSpec

ALL = "world/all"
"""Path of the only client where all texts are in one place."""
_KEEP = tuple(name for name in INHERITED if name not in ("aggregation", "merge"))
"""Settings of a client that every method keeps: all but the rules, and above all its privacy."""


def configure(config: RunConfig, method: str) -> RunConfig:
    """The configuration of a method on the world of `config`.

    Args:
        config: gives the tree, the model, the data, the training and the budget.
        method: a key of `METHODS`, with variants of `VARIANTS` after plus signs.

    Raises:
        ConfigError: the method or a variant is unknown, or impossible on this world.
    """
    base, *variants = method.split("+")
    if base not in METHODS:
        raise ConfigError("--methods", f"unknown method {base!r}", one_of(base, list(METHODS)))
    for variant in variants:
        if variant not in VARIANTS:
            raise ConfigError("--methods", f"unknown variant {variant!r}", one_of(variant, list(VARIANTS)))
    config = initial_model.with_tokenizer(config)  # the methods write it at every client
    root = tree.build(config)
    mapping = to_mapping(config) | {"method": method, "name": f"{config.name}-{method}"}
    METHODS[base](mapping, root)
    for variant in variants:
        for key, value in VARIANTS[variant].items():
            set_everywhere(mapping, key.split("."), value)
    return from_mapping(mapping, resolved=True)


def set_everywhere(mapping: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a dotted key at the top, and at each node of the tree that sets the same section.

    Args:
        mapping: of a configuration whose sections are written out.
        path: the names of the key.
        value: to set; a `Scaled` changes each value that is there.
    """
    holders = [mapping, *(_nodes(mapping["world"]) if path[0] in INHERITED else [])]
    for holder in holders:
        if holder is not mapping and path[0] not in holder:
            continue
        inner = holder
        for name in path[:-1]:
            inner[name] = dict(inner.get(name) or {})
            inner = inner[name]
        inner[path[-1]] = inner[path[-1]] * value.factor if isinstance(value, Scaled) else value


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("children", []):
        yield from _nodes(child)


def _flat(mapping: dict[str, Any], root: NodeSpec) -> None:
    """Every client directly under the world."""
    mapping["world"] = {"children": [_client(spec, root, name=flat_name(spec)) for spec in root.clients]}


def flat_name(spec: NodeSpec) -> str:
    """Name of a client in a flat tree: its path below the world, with dots."""
    return spec.path.split("/", 1)[1].replace("/", ".")


def _client(spec: NodeSpec, root: NodeSpec, *, name: str) -> dict[str, Any]:
    settings = {key: asdict(getattr(spec.settings, key)) for key in _KEEP}
    settings["data"]["order"] = spec.settings.data.order or spec.path
    links = [
        node.settings.simulation
        for node in root.walk()
        if node.kind != "world" and f"{spec.path}/".startswith(f"{node.path}/")
    ]
    settings["simulation"] |= {
        "bandwidth_gbps": min(link.bandwidth_gbps for link in links),
        "latency_s": math.fsum(link.latency_s for link in links),
    }
    return {"client": name, **settings}


def _plain_tree(spec: NodeSpec, *, keep_rules: bool) -> dict[str, Any]:
    """The tree with every setting written out at every node. Aggregation rules are left out unless they are kept."""
    keys = (*_KEEP, "aggregation", "merge") if keep_rules else _KEEP
    settings = {key: asdict(getattr(spec.settings, key)) for key in keys}
    if spec.kind == "client":
        settings["data"]["order"] = spec.settings.data.order or spec.path
        return {"client": spec.name, **settings}
    named: dict[str, Any] = {} if spec.kind == "world" else {spec.kind: spec.name}
    children = [_plain_tree(child, keep_rules=keep_rules) for child in spec.children]
    return {**named, **settings, "children": children}


def _rules(mapping: dict[str, Any], **rules: Any) -> None:
    """Replace the aggregation rules, and take over the parent's model as it is."""
    mapping["aggregation"], mapping["merge"] = rules, {"client": 1.0, "federation": 1.0}
    if rules["trigger"] == "synchronous":
        set_everywhere(mapping, ["exchange", "overlap"], False)


def _no_keys(mapping: dict[str, Any]) -> None:
    mapping["model"] = mapping["model"] | {"key_layers": []}


def _fedavg(mapping: dict[str, Any], root: NodeSpec) -> None:
    _flat(mapping, root)
    _no_keys(mapping)
    _rules(mapping, trigger="synchronous", server_optimizer={"name": "sgd", "lr": 1.0})


def _fedprox(mapping: dict[str, Any], root: NodeSpec) -> None:
    _fedavg(mapping, root)
    mapping["merge"] |= {"proximal": 0.1}


def _ditto(mapping: dict[str, Any], root: NodeSpec) -> None:
    _fedavg(mapping, root)
    mapping["merge"] |= {"client": "apart", "proximal": 0.1}


def _mr_mtl(mapping: dict[str, Any], root: NodeSpec) -> None:
    _fedavg(mapping, root)
    mapping["merge"] |= {"client": 0.0, "proximal": 0.1}


def _apfl(mapping: dict[str, Any], root: NodeSpec) -> None:
    _fedavg(mapping, root)
    mapping["merge"] |= {"client": "apart", "mixture": 0.5}


def _hierfavg(mapping: dict[str, Any], root: NodeSpec) -> None:
    mapping["world"] = _plain_tree(root, keep_rules=False)
    _no_keys(mapping)
    _rules(mapping, trigger="synchronous", push_every=2, server_optimizer={"name": "sgd", "lr": 1.0})


def _fedper(mapping: dict[str, Any], root: NodeSpec) -> None:
    _flat(mapping, root)
    if not mapping["model"]["key_layers"]:
        mapping["model"] = mapping["model"] | {"key_layers": list(USUAL_KEY_LAYERS)}
    _rules(
        mapping,
        trigger="synchronous",
        server_optimizer={"name": "sgd", "lr": 1.0},
        attention={"score": "uniform", "personal": True},
    )


def _fedrep(mapping: dict[str, Any], root: NodeSpec) -> None:
    # Published on FEMNIST: 10 of 15 local epochs train the head, the other 5 the body.
    _fedper(mapping, root)
    set_everywhere(mapping, ["training", "head_first"], 2 / 3)


def _fedit(mapping: dict[str, Any], root: NodeSpec) -> None:
    if mapping["model"]["trainable"] != "lora":
        got = f"{mapping['method']} trains adapters, but model.trainable is {mapping['model']['trainable']}"
        raise ConfigError("--methods", got, "leave it out, or set model.trainable to lora")
    _fedavg(mapping, root)


def _ffa_lora(mapping: dict[str, Any], root: NodeSpec) -> None:
    _fedit(mapping, root)
    mapping["model"] = mapping["model"] | {"lora": mapping["model"]["lora"] | {"freeze_a": True}}


def _fedsa_lora(mapping: dict[str, Any], root: NodeSpec) -> None:
    _fedit(mapping, root)
    mapping["model"] = mapping["model"] | {"key_layers": ["*.lora_B.*"]}
    _fedper(mapping, root)


def _mixed(mapping: dict[str, Any], experts: str, *, follows: float) -> None:
    """Own adapters, mixed with those of others, which exact sums give."""
    lora = mapping["model"]["lora"] | {"experts": experts}
    mapping["model"] = mapping["model"] | {"lora": lora}
    mapping["aggregation"] = mapping["aggregation"] | {"rule": "sums"}
    mapping["merge"] = {"client": follows, "federation": 0.0}
    set_everywhere(mapping, ["exchange", "codec"], "fp32")
    mapping["evaluation"] = mapping["evaluation"] | {"keep_best": False}


def _fedalt(mapping: dict[str, Any], root: NodeSpec) -> None:
    _fedit(mapping, root)
    _mixed(mapping, "rest", follows=0.0)


def _kin(mapping: dict[str, Any], root: NodeSpec) -> None:
    _fedit(mapping, root)
    mapping["world"] = _plain_tree(root, keep_rules=False)
    _mixed(mapping, "kin", follows=1.0)


def _fedbuff(mapping: dict[str, Any], root: NodeSpec) -> None:
    _flat(mapping, root)
    _no_keys(mapping)
    _rules(
        mapping,
        trigger="goal_achieved",
        buffer_size=max(len(root.clients) // 2, 1),
        staleness={"fn": "polynomial", "a": 0.5},
        server_optimizer={"name": "sgd", "lr": 1.0},
    )


def _diloco(mapping: dict[str, Any], root: NodeSpec) -> None:
    _flat(mapping, root)
    _no_keys(mapping)
    _rules(mapping, trigger="synchronous", server_optimizer={"name": "nesterov", "lr": 0.7, "momentum": 0.9})


def _halos(mapping: dict[str, Any], root: NodeSpec) -> None:
    # Published: local servers lr 0.2 x 16, beta 0.9, delay 16, one exchange in 32 updates; global server lr 0.15 x 2,
    # beta 0.5, delay 2; merge weight 0.25. A region here exchanges once per 8 updates of each of its workers.
    mapping["world"] = _plain_tree(root, keep_rules=False)
    _no_keys(mapping)
    local = {"name": "delayed_nesterov", "lr": 3.2, "momentum": 0.9, "delay": 16}
    _rules(
        mapping,
        trigger="goal_achieved",
        buffer_size=1,
        staleness={"fn": "constant"},
        server_optimizer={"name": "delayed_nesterov", "lr": 0.3, "momentum": 0.5, "delay": 2},
    )
    mapping["merge"] = {"client": 1.0, "federation": 0.25}
    for child in mapping["world"]["children"]:
        if "federation" in child:
            child["aggregation"] = {"server_optimizer": local, "push_every": 8 * len(child["children"])}


def _one_shot(mapping: dict[str, Any], root: NodeSpec) -> None:
    """Every client trains alone for the whole budget, in one round; at its end it takes the world's model."""
    _fedavg(mapping, root)
    rounds = _rounds(mapping)
    for client in mapping["world"]["children"]:
        steps = client["training"]["local_steps"]
        client["training"] |= {"local_steps": rounds * steps, "draw_steps": steps}
    if mapping["budget"]["rounds"]:
        mapping["budget"] = mapping["budget"] | {"rounds": 1}
    mapping["merge"] |= {"serve_parent": True}
    mapping["evaluation"] = mapping["evaluation"] | {"every_rounds": 1}


def _rounds(mapping: dict[str, Any]) -> int:
    """Rounds that the budget gives every client of a synchronous, flat configuration."""
    plan = make_plan(from_mapping(mapping, resolved=True))
    budget = plan.config.budget
    if budget.rounds is not None:
        return budget.rounds
    assert budget.tokens is not None, "a comparison has no budget in seconds"
    return math.ceil(budget.tokens / sum(map(plan.round_tokens, plan.root.clients)))


def _soup(mapping: dict[str, Any], root: NodeSpec) -> None:
    _one_shot(mapping, root)
    mapping["aggregation"] |= {"robust": {"rule": "trimmed_mean", "trim": 0.0}}  # the plain mean, whatever the tokens


def _ties(mapping: dict[str, Any], root: NodeSpec) -> None:
    _one_shot(mapping, root)
    mapping["aggregation"] |= {"rule": "ties"}


def _local(mapping: dict[str, Any], root: NodeSpec) -> None:
    _flat(mapping, root)
    _no_keys(mapping)
    _rules(mapping, trigger="synchronous", server_optimizer={"name": "sgd", "lr": 1.0})
    mapping["merge"] = {"client": 0.0, "federation": 0.0}
    # Training alone on little text is at its best long before its end.
    mapping["evaluation"] = mapping["evaluation"] | {"keep_best": True, "every_rounds": 1}


def _pooled(mapping: dict[str, Any], root: NodeSpec) -> None:
    clients = root.clients
    ranks = {spec.settings.training.lora_rank for spec in clients}
    first = replace(clients[0].settings.training, lora_rank=None)
    for spec in clients:
        if replace(spec.settings.training, lora_rank=None) != first:
            raise ConfigError(
                "--methods",
                f"pooled has one training for all, but that of {spec.path} is not that of {clients[0].path}",
                "leave pooled out, or train all clients alike",
            )
    for spec in clients:
        if spec.settings.privacy.unit != "none":
            got = f"pooled has all texts in one place, but {spec.path} trains with differential privacy"
            raise ConfigError("--methods", got, "leave pooled out")
    only = _client(clients[0], root, name=ALL.rpartition("/")[2])
    pool = [asdict(spec.settings.data) | {"order": spec.settings.data.order or spec.path} for spec in clients]
    only["data"] |= {"files": [], "corpus": None, "shard": None, "order": None, "pool": pool}
    only["data"] |= {"train_fraction": 1.0, "train_bytes": None}
    if len(ranks) > 1:  # one place has the adapters of the whole world
        only["training"] |= {"lora_rank": mapping["model"]["lora"]["r"]}
    only["simulation"] |= {"tokens_per_s": math.fsum(s.settings.simulation.tokens_per_s for s in clients)}
    mapping["world"] = {"children": [only]}
    _no_keys(mapping)
    _rules(mapping, trigger="synchronous", server_optimizer={"name": "sgd", "lr": 1.0})


def _worldlm(mapping: dict[str, Any], root: NodeSpec) -> None:
    mapping["world"] = _plain_tree(root, keep_rules=True)


METHODS: dict[str, Callable[[dict[str, Any], NodeSpec], None]] = {
    "worldlm": _worldlm,
    "fedavg": _fedavg,
    "fedprox": _fedprox,
    "ditto": _ditto,
    "mr_mtl": _mr_mtl,
    "apfl": _apfl,
    "hierfavg": _hierfavg,
    "fedper": _fedper,
    "fedrep": _fedrep,
    "fedit": _fedit,
    "ffa_lora": _ffa_lora,
    "fedsa_lora": _fedsa_lora,
    "fedalt": _fedalt,
    "kin": _kin,
    "fedbuff": _fedbuff,
    "diloco": _diloco,
    "halos": _halos,
    "soup": _soup,
    "ties": _ties,
    "local": _local,
    "pooled": _pooled,
}
"""Every method by name."""
FOR_ADAPTERS = frozenset({"fedit", "ffa_lora", "fedsa_lora", "fedalt", "kin"})
"""Methods of worlds that train adapters."""
