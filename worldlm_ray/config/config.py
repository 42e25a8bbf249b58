"""Configuration: every default stands here once, with its unit.

`load` turns a preset's name or a YAML file, plus `key=value` overrides, into a `RunConfig`. The schema is a
set of frozen dataclasses checked by OmegaConf; whatever is wrong raises one `ConfigError` that names the
dotted key. Settings of a node are inherited by everything below it and may be overridden anywhere: see
`worldlm_ray.plan.tree`, which resolves the `world:` part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldlm_ray.config import values as schema
from worldlm_ray.config.values import Problems
from worldlm_ray.config.values import listed as listed
from worldlm_ray.config.values import one_of as one_of
from worldlm_ray.config.yaml_text import Document, value_of
from worldlm_ray.errors import ConfigError
from worldlm_ray.storage import filesystem
from worldlm_ray.storage.filesystem import expanded

T = TypeVar("T")

Trigger = Literal["goal_achieved", "synchronous", "time_up"]
CodecName = Literal["fp32", "bf16", "int8", "int4"]
RobustRule = Literal["none", "trimmed_mean", "median"]
StalenessName = Literal["constant", "polynomial", "hinge", "exponential", "harmonic"]
ScoreName = Literal["cosine", "dot", "fedamp", "fedatt", "uniform"]
PrivacyUnit = Literal["none", "record", "client"]
AccountantName = Literal["rdp", "prv"]
OnExhausted = Literal["stop", "pause"]
GradSampleMode = Literal["auto", "ghost", "hooks"]
ServerOptimizerName = Literal["sgd", "nesterov", "delayed_nesterov", "adam"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder. A preset gives the shape; any number set here replaces the preset's."""

    preset: str = "nano"
    key_layers: list[str] = field(
        default_factory=lambda: ["model.embed_tokens.*", "model.layers.-1.*", "model.norm.*", "lm_head.*"]
    )
    """Name patterns of the key layers; `layers.-1` is the last block. Everything else is backbone.
    An empty list makes the whole model backbone: plain federated averaging."""
    initial_from: str | None = None
    """Folder of a Llama-shaped Hugging Face model: its shape and weights, in place of a preset and random weights.
    A model that computes anything else than a plain Llama is refused, as are quantized weights."""
    hidden_size: int | None = None
    """This and the next four replace the preset's; beside `initial_from` they must be the model's own."""
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate_size: int | None = None
    context: int | None = None
    """Tokens per training sequence. With `initial_from`: 512 unless given, or what the model allows if that is less."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A client's text: files of its own, or a corpus that every installation holds."""

    files: list[str] = field(default_factory=list)
    """Files, folders and globs: .txt, .jsonl, .ndjson, .json, all also compressed (.gz, .zst, .bz2, .xz), and .parquet.
    A folder stands for FOLDER/**/*: links are followed, hidden names left out. What is left out is counted and said."""
    corpus: str | None = None
    """Name of a built-in corpus (see worldlm_ray/data/corpora.py); instead of `files`."""
    text_key: str = "text"
    """Field or column that holds the text of JSON and .parquet files; `meta.text` names a field of a field."""
    tokenizer: str | None = None
    """`bytes`, or a Hugging Face tokenizer.json or its folder. The same for the whole world. Unless given: that of the
    folder that `model.initial_from` names, or `bytes`. A run keeps a copy, which it goes by from then on."""
    order: str | None = None
    """Names the random order in which text is drawn; the client's path unless given. Clients of two runs with the
    same seed and order see the same batches, wherever they hang in the tree."""
    pool: list[Any] = field(default_factory=list)
    """Data sections to train on together, in place of files or a corpus: every step takes `batch_size` sequences of
    each. Centralized training (`worldlm compare --methods centralized`) is one client with everybody's sections."""
    shard: str | None = None
    """`2/4`: only the second of four parts of the text, dealt out block by block, so that the parts are alike."""
    train_fraction: float = 1.0
    """Share of the training part that is used, spread evenly over it; the held-out part stays whole."""
    heldout_fraction: float = 0.05
    """Share of a client's text that is never trained on."""
    max_bytes: int | None = None
    """Use only the first so many bytes of text."""
    cache_dir: str = "~/.cache/worldlm_ray"
    """Where token shards are cached, on the machine where the client runs."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Local training of a client: AdamW, warm-up, cosine decay over the budget."""

    local_steps: int = 50
    """Optimizer steps per local round (H)."""
    batch_size: int = 16
    """Sequences per step."""
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the budget, as a share of `lr`."""
    warmup_fraction: float = 0.05
    """Share of the budget over which the learning rate rises from zero."""
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    grad_clip: float = 1.0
    """Largest L2 norm of a step's gradient; 0 switches clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on CUDA and fp32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether `torch.compile` fuses the training step of a plain client without privacy. `auto` is on with CUDA: the
    first step takes up to a minute more, which a CPU's gain does not pay back (docs/results.md)."""
    step_delay_s: float = 0.0
    """Seconds to sleep in every step: makes a client slow on purpose."""
    accumulation_steps: int = 1
    """Parts that a step's batch is cut into; their gradients are accumulated, so that activations take less memory."""
    activation_checkpointing: bool = False
    """Compute a block's activations again in the backward pass instead of keeping them."""
    zero_stage: int = 0
    """What DeepSpeed shards over the client's workers: 1 the optimizer's state, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """ZeRO keeps the optimizer's state, and takes its step, in the host's memory."""
    offload_parameters: bool = False
    """ZeRO stage 3 keeps parameters in the host's memory while they are not needed."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's own configuration, such as {zero_optimization: {overlap_comm: true}}."""


@dataclass(frozen=True, kw_only=True)
class StalenessConfig:
    """How much an update that is tau versions old still counts. Names and defaults of a and b: FedAsync, FedBuff."""

    fn: StalenessName = "constant"
    """Where updates come one by one, each is as many versions old as there are siblings: a discount shortens every
    step alike, and those of slow clients, whose text is worth as much, most. Measured in docs/results.md."""
    a: float | None = None
    """Polynomial 0.5, hinge 10, exponential 0.5, harmonic 1 unless given."""
    b: float = 4.0
    """Hinge: versions of delay that cost nothing."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How key layers are blended: see worldlm_ray/aggregation/attention.py."""

    score: ScoreName = "cosine"
    temperature: float = 0.1
    personal: bool = False
    """Key layers are never taken from the parent: a client's stay its own (FedPer)."""
    self_weight: float = 0.0
    """A node's own key layer counts as this many children, besides standing for those absent."""


@dataclass(frozen=True, kw_only=True)
class ResidualsConfig:
    """Key layers that fit nowhere, and where they are sent: see worldlm_ray/aggregation/residuals.py."""

    per_round: int = 0
    """Key layers that may become residuals at one aggregation; 0 switches residual routing off."""
    threshold: float = 0.0
    """A key layer whose score is below this does not fit."""
    pool: int = 8
    """Residuals that a node keeps."""
    max_age: int = 8
    """Aggregations for which it keeps them."""
    offers: int = 2
    """Residuals that a pulling child is offered."""
    discount: StalenessConfig = field(default_factory=lambda: StalenessConfig(fn="polynomial"))
    """How much a residual that is so many aggregations old still counts."""


@dataclass(frozen=True, kw_only=True)
class ServerOptimizerConfig:
    """How an inner node applies the mean update to its backbone."""

    name: ServerOptimizerName = "sgd"
    lr: float | None = None
    """Unless given: sgd 1.0 (FedAvg), nesterov 0.7 (DiLoCo), delayed_nesterov 0.2 x delay (HALoS), adam 0.01
    (FedOpt), times the share of the node's children that are in the aggregation. In synchronous mode that share is
    1; where updates come one by one, a round of all children then moves the model as far as a synchronous one, and
    not as many times as far."""
    momentum: float = 0.9
    delay: int = 16
    """Delayed_nesterov: aggregations per step of the momentum (N)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """Aggregation for nodes that do not trust their children."""

    rule: RobustRule = "none"
    """`trimmed_mean` or `median` of the updates, coordinate by coordinate; keeps one model per child in memory."""
    trim: float = 0.2
    """`trimmed_mean`: share of the children whose values are dropped at either end."""
    clip_norm: float | None = None
    """Updates (backbone change, and key layers as seen from the node's own) are shortened to this L2 norm."""


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """What an inner node accepts from its children, and when and how it aggregates."""

    trigger: Trigger = "goal_achieved"
    """`goal_achieved` (buffer_size updates), `synchronous` (all live children), `time_up` (time and quorum)."""
    buffer_size: int = 1
    """Updates per aggregation: 1 is FedAsync, more is FedBuff."""
    time_up_s: float = 30.0
    quorum: int = 1
    """`time_up`: updates that must have arrived before time counts."""
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    max_staleness: int | None = None
    """Updates older than this many versions are refused."""
    max_update_norm: float | None = None
    """Updates with a larger L2 norm are refused."""
    max_share: float = 1.0
    """Largest share of the weight of one aggregation that a child may have, for the backbone and every key layer; 1
    switches it off. Keeps the updates of an aggregation in memory: see worldlm_ray/aggregation/capped_fold.py."""
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    residuals: ResidualsConfig = field(default_factory=ResidualsConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    push_every: int = 1
    """Aggregations between two exchanges with the parent."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How far a node moves to its parent on a pull: theta = (1 - m) own + m parent, for the backbone."""

    client: float | int | str = 1.0
    """A number from 0 to 1, or `adaptive`: see worldlm_ray/aggregation/merge.py."""
    federation: float | int | str = 1.0
    """The same for federations."""
    agreement: float = 0.6
    """`adaptive`: a node follows its parent while the cosine of its own movement and the others' is at least this."""
    max_model_step: float | None = None
    """A parent's model is refused that lies further from the node's own than this: L2 distance over the L2 norm of the
    own model, of what an exchange carries. The node goes on with its own model. A newcomer takes any first model."""
    common_fraction: float = 0.0
    """`adaptive`: share of every batch with which a client that keeps its own model trains its parent's on. At 0 such
    a client pushes what it did to its own model: see worldlm_ray/training/common.py."""

    def common_rows(self, batch_size: int) -> int:
        """Sequences of a batch that `common_fraction` gives to the parent's model: at least one, unless it is 0."""
        return max(1, round(self.common_fraction * batch_size)) if self.common_fraction else 0


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How a node's updates travel to its parent: see worldlm_ray/exchange/compression.py."""

    codec: CodecName = "fp32"
    """`bf16` takes half of the bytes, `int8` a quarter, `int4` an eighth. What rounding loses goes with the next
    update."""
    fragments: int = 1
    """Parts of the backbone that travel in turn, one with each exchange, up and down; key layers travel with each.
    Children of one node have equally many. Not with `merge: adaptive`, robust rules or client-level privacy."""
    overlap: bool = False
    """A client begins its next local round right after a push, and takes the parent's model when it is there; what was
    trained meanwhile is kept. For clients under asynchronous parents; inner nodes work so anyway."""


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What a client may use."""

    cpus: int = 1
    """Cores, and torch threads, of a client; of each worker where there are several. A machine with fewer cores runs
    as many threads as it has."""
    gpus: float = 0.0
    """GPUs of a client; of each worker where there are several. 0 trains on the CPU, in a simulation too."""
    workers: Any = 1
    """Processes that train the client's model together, by DeepSpeed; [min, max] takes what the cluster has."""
    clients_per_process: int = 1
    """Clients per process: so many siblings that are alike take turns at one model, with the cores of one of them."""
    memory_gb: float | None = None
    """Memory of one worker in 10^9 bytes, of its GPU if it has one: `worldlm show` says which clients will not fit.
    Unless given, that of the machine where `show` runs. Clients that share a process keep as much of their state in
    memory as this, and the rest in mapped files; without it, all in memory."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        low, high = self.workers if isinstance(self.workers, list) else (self.workers, self.workers)
        return int(low), int(high)


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy of a federation's clients. Below the node that sets it, it may only become stricter."""

    unit: PrivacyUnit = "none"
    """`record`: DP-SGD in the client; one record is one sequence of `model.context` tokens. `client`: the aggregator
    clips the whole updates of the clients directly below it and adds noise to their sum."""
    target_epsilon: float | None = None
    """Never exceeded: a client stops before the round that would. Gives the noise, too, unless that is set."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise, in multiples of `max_grad_norm`."""
    delta: float = 1e-5
    max_grad_norm: float = 1.0
    """L2 norm to which each record's gradient, or each client's whole update, is clipped."""
    on_exhausted: OnExhausted = "stop"
    """`record`: what a client does when one more round would exceed `target_epsilon`. `stop` ends it. `pause` ends its
    training only: it takes its parent's model from time to time until the run ends, which costs no privacy."""
    max_updates: int | None = None
    """`client`: updates that are accepted of one client in the whole run, at most."""
    accountant: AccountantName = "rdp"
    """`rdp` is quick and overestimates; `prv` is tighter and takes seconds."""
    grad_sample_mode: GradSampleMode = "auto"
    """`hooks` keeps every record's gradient, `ghost` computes norms without; `auto` times both at the start."""
    report_metrics: bool = False
    """Report losses, which are computed from the private text and are not covered by epsilon."""
    ledger_dir: str | None = None
    """Where ledgers lie; `ledgers/` in the run's folder unless given. Runs on the same text must share one."""


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """Speeds that `worldlm simulate` gives a node. They have no effect on Ray."""

    tokens_per_s: float = 20_000.0
    bandwidth_gbps: float = 1.0
    """Of the link to the parent, each way, in 10^9 bits per second."""
    latency_s: float = 0.05
    speed_spread: float = 0.0
    """How unlike clients are: each is exp(s z) times as fast as `tokens_per_s`, z normal and drawn by its path."""
    train: bool = True
    """False, for the whole world: a cost model in place of the model, for worlds of 100,000 clients. No text is read
    and nothing learned; staleness, times and bytes are those of the run with training
    (worldlm_ray/simulation/cost_model.py)."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Where a node's actors may run: labels that a Ray node must carry."""

    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How much is trained. Exactly one is set."""

    tokens: int | None = None
    """Tokens of all clients together: fast clients do more of them."""
    rounds: int | None = None
    """Local rounds of every client: equal work for all."""
    seconds: float | None = None
    """Seconds of training: wall clock on Ray, virtual in simulation."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How held-out text is measured."""

    every_rounds: int = 1
    """Local rounds between two measurements of a client; 0 measures at the start and the end only."""
    tokens: int = 8_192
    """Held-out tokens per measurement during training."""
    final_tokens: int = 32_768
    """Held-out tokens per measurement at the start and the end."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When nodes write their state to the run folder."""

    every_s: float = 20.0
    """Seconds between two checkpoints of a node."""
    every_updates: int = 4
    """A node also writes one once a child keeps this many updates for the case that the node dies."""
    keep: int = 2
    patience_s: float | None = 60.0
    """A federation sends its parent only what a checkpoint of its own knows, so that nothing counts twice if it dies;
    once its storage has refused for so many seconds, it sends without. null waits as long as it takes."""


@dataclass(frozen=True, kw_only=True)
class LivenessConfig:
    """How nodes notice that another has died, or cannot be reached."""

    heartbeat_s: float = 2.0
    """Seconds between two signs of life from a child to its parent."""
    k: float = 6.0
    """A child is given up once it is silent for the median of its gaps and k median absolute deviations ..."""
    grace_s: float = 30.0
    """... and for at least so many seconds. Others then wait for it no more; when it speaks again, it is back."""


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Everything that is inherited down the tree and may be overridden at any node."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. The inherited parts stand for the world's own settings."""

    name: str = "run"
    seed: int = 0
    method: str = "worldlm"
    run_dir: str | None = None
    """Folder of the run; `runs/NAME` unless given."""
    data_dir: str | None = None
    """A folder that data files of this config refer to as ${data_dir}."""
    model: ModelConfig = field(default_factory=ModelConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    liveness: LivenessConfig = field(default_factory=LivenessConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    faults: list[str] = field(default_factory=list)
    """Faults on purpose, to see what a world bears: see worldlm_ray/plan/faults.py."""
    kept: dict[str, str] = field(default_factory=dict)
    """Files that the run's folder keeps copies of, with their fingerprints: written when the run is made."""
    world: Any = None
    """The tree: see worldlm_ray/plan/tree.py."""


SMALLEST_PRV_NOISE = 0.1
"""Below, the `prv` accountant takes minutes and gigabytes; epsilon is in the hundreds there."""
INHERITED = tuple(f.name for f in fields(NodeSettings))
NODE_KEYS = (
    "world",
    "federation",
    "client",
    "copies",
    "children",
    "min_clients",
    "max_clients",
    *INHERITED,
)


def presets() -> dict[str, Path]:
    """Name and file of every configuration that ships with the package."""
    folder = Path(str(resources.files("worldlm_ray.conf"))) if _installed_conf() else _source_conf()
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _source_conf() -> Path:
    return Path(__file__).resolve().parent.parent / "conf"


def _installed_conf() -> bool:
    # In a source checkout conf/ lies beside the package; in a wheel it is the package worldlm_ray.conf.
    return not (_source_conf() / "quickstart.yaml").is_file()


def find(conf: str) -> Path:
    """The file behind a preset's name or a path.

    Raises:
        ConfigError: there is neither a file nor a preset of that name.
    """
    path = filesystem.place(conf) if "://" in conf else expanded(conf)
    if path.suffix in (".yaml", ".yml"):
        with filesystem.refusals(path):
            if path.is_file():
                return path
        raise ConfigError("CONF", f"there is no file {conf!r}", "give the path of a YAML file or a preset's name")
    known = presets()
    if conf in known:
        return known[conf]
    raise ConfigError("CONF", f"there is no preset {conf!r}", one_of(conf, list(known)))


def load(
    conf: str, overrides: Sequence[str] = (), *, run_dir: str | None = None, say: Callable[[str], None] = lambda _: None
) -> RunConfig:
    """Read a configuration and apply `key=value` overrides.

    Args:
        conf: a preset's name (`quickstart`) or the path of a YAML file.
        overrides: such as `training.lr=1e-3` or `world.children[0].training.local_steps=20`.
        run_dir: folder of the run, taken as it is: a path is neither YAML nor an interpolation.
        say: told what an override replaces without naming it.

    Raises:
        ConfigError: one problem, by its dotted key.
    """
    document = read(conf)
    raw = OmegaConf.create(_mapping_of(document, conf))
    if "name" not in raw:
        raw["name"] = find(conf).stem
    for text in overrides:
        override(raw, text)
    for note in _one_budget(raw, overrides):
        say(note)
    config = from_mapping(raw)
    return config if run_dir is None else replace(config, run_dir=run_dir)


def read(conf: str) -> Document:
    """The YAML document behind a preset's name or a path, with the lines of its entries.

    Raises:
        ConfigError: there is none, or it is no YAML.
    """
    path = find(conf)
    try:
        with filesystem.refusals(path):
            return Document(path.read_text(encoding="utf-8"), RunConfig, hint_of)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        detail = " ".join(str(error).replace("<unicode string>", "it").split())
        raise ConfigError(str(path), f"is not valid YAML ({detail})", "mend the file") from error


def _mapping_of(document: Document, conf: str) -> dict[str, Any]:
    found = {} if document.value is None else document.value
    if not isinstance(found, dict):
        raise ConfigError(str(find(conf)), "is not a mapping of keys", "start from conf/quickstart.yaml")
    return found


def _one_budget(raw: DictConfig, overrides: Sequence[str]) -> list[str]:
    """A budget of another kind on the command line takes the place of the file's; returns what to say about it."""
    given = [text.partition("=")[0].strip() for text in overrides]
    kinds = [f.name for f in fields(BudgetConfig)]
    budget = raw.get("budget")
    chosen = [kind for kind in kinds if f"budget.{kind}" in given and budget.get(kind) is not None]
    if len(chosen) != 1:
        return []
    replaced = [kind for kind in kinds if f"budget.{kind}" not in given and budget.get(kind) is not None]
    for kind in replaced:
        budget[kind] = None
    return [f"budget.{chosen[0]} on the command line takes the place of budget.{kind}" for kind in replaced]


def from_mapping(raw: DictConfig | dict[str, Any], *, resolved: bool = False) -> RunConfig:
    """Check a mapping against the schema and return the configuration.

    Args:
        raw: the mapping.
        resolved: whether ${...} in it is text, as in what `to_mapping` returns, and no reference to another key.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value, by its dotted key.
        ConfigErrors: several of them.
    """
    mapping = raw if resolved and isinstance(raw, dict) else _resolved(raw)
    problems = Problems()
    config = schema.merged(RunConfig(), mapping, prefix="", problems=problems)
    check_run(config, problems)
    problems.check()
    return config


def _resolved(raw: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """Plain containers with every ${...} replaced by what it refers to."""
    found = raw if isinstance(raw, DictConfig) else OmegaConf.create(raw)
    for name in found:
        if OmegaConf.is_missing(found, name):
            key = str(name)
            raise ConfigError(key, "has no value", f"give it one, such as {key}=... on the command line")
    try:
        container = OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "config")
        message = str(getattr(error, "msg", None) or error).splitlines()[0].strip()
        raise ConfigError(key, message, "set that key") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def merge_into(settings: T, overrides: Any, *, prefix: str) -> T:
    """Merge a mapping into a frozen dataclass, checking keys and types.

    Args:
        settings: the dataclass instance that gives keys, types and defaults.
        overrides: a mapping with some of its keys.
        prefix: dotted key of the mapping itself, for messages.

    Raises:
        ConfigError: names `prefix` and the key.
    """
    problems = Problems()
    found = schema.merged(settings, overrides, prefix=prefix, problems=problems)
    problems.check()
    return found


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain containers, ready for YAML, JSON or another process."""
    return asdict(config)


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML: the whole file or nothing."""
    filesystem.replace_text(path, to_yaml(config))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_mapping(config))))


def _escaped(value: Any) -> Any:
    """Text with ${ in it, written so that it is read as text again."""
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def check_run(config: RunConfig, problems: Problems) -> None:
    """Checks of the run's own values that types alone cannot make."""
    with problems.kept():
        _check_name(config.name)
    chosen = [f.name for f in fields(BudgetConfig) if getattr(config.budget, f.name) is not None]
    is_wrong = not chosen and any(error.key.split(".")[0] == "budget" for error in problems.found)
    if len(chosen) != 1 and not is_wrong:  # a value that was refused is set, if not well
        got = " and ".join(chosen) if chosen else "nothing"
        cure = "set exactly one of tokens, rounds, seconds"
        if chosen:
            cure += f": the others to null, such as budget.{chosen[0]}=null"
        problems.add(ConfigError("budget", f"{got} set", cure))
    check_bounds(config, RUN_BOUNDS, "", problems)


def _check_name(name: str) -> None:
    """A run's name becomes a folder."""
    if name in ("", ".", "..") or name.startswith("-") or any(c == "/" or not c.isprintable() for c in name):
        cure = "give one without '/' and control characters that does not begin with '-', and is not '.' or '..'"
        raise ConfigError("name", f"{name!r} cannot be a folder's name", cure)


def check_bounds(of: Any, bounds: Mapping[str, Callable[[float, str], None]], at: str, problems: Problems) -> None:
    """Check numbers against their bounds. Null is no number, and within all bounds.

    Args:
        of: the dataclass that holds them, or holds their sections.
        bounds: a check of each, by its dotted key.
        at: dotted key of `of` with a dot, for messages; empty at top level.
        problems: takes what is out of bounds.
    """
    for key, check in bounds.items():
        value = of
        for name in key.split("."):
            value = getattr(value, name)
        if value is not None or key == "resources.workers":
            with problems.kept():
                check(value, f"{at}{key}")


def check_settings(settings: NodeSettings, key: str, problems: Problems, *, complete: bool = True) -> None:
    """Checks of one node's inherited settings.

    Args:
        settings: the settings in force at the node.
        key: dotted key of the node, for messages; empty at top level.
        problems: takes what is wrong.
        complete: False where a value could not be read, and its default stands here.
    """
    at = f"{key}." if key else ""
    before = len(problems.found)
    check_bounds(settings, BOUNDS, at, problems)
    if len(problems.found) > before or not complete:
        return  # what several values mean together is checked once each of them can be
    for check in (_common, _robust, _privacy):
        with problems.kept():
            check(settings, at)


def positive(value: float, key: str) -> None:
    """Raise a ConfigError unless the value is above zero."""
    if not value > 0:
        raise ConfigError(key, f"got {value}", "give a number above 0")


def not_negative(value: float, key: str) -> None:
    """Raise a ConfigError if the value is below zero."""
    if not value >= 0:
        raise ConfigError(key, f"got {value}", "give a number that is not negative")


def _seconds(value: float, key: str) -> None:
    """Raise a ConfigError unless the value is a time that ends: in [0, 1e9], some thirty years."""
    if not 0.0 <= value <= 1e9:
        raise ConfigError(key, f"got {value}", "give seconds from 0 to 1e9")


def _rate(value: float, key: str) -> None:
    """Raise a ConfigError unless something moves at this rate within a time that ends."""
    if not value >= 1e-6:
        raise ConfigError(key, f"got {value}", "give a number above 0, at least 1e-6")


def fraction(value: float, key: str) -> None:
    """Raise a ConfigError unless the value lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(key, f"got {value}", "give a number from 0 to 1")


def _cosine(value: float, key: str) -> None:
    if not -1.0 <= value <= 1.0:
        raise ConfigError(key, f"got {value}", "give a cosine, from -1 to 1")


def _between(value: float, key: str) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(key, f"got {value}", "give a number between 0 and 1")


def _probability(value: float, key: str) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(key, f"got {value}", "give a probability below 1 / records, such as 1e-5")


def _share(value: float, key: str) -> None:
    """Raise a ConfigError unless the value lies in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ConfigError(key, f"got {value}", "give a share above 0, at most 1")


def _trim(value: float, key: str) -> None:
    if not 0.0 <= value < 0.5:
        raise ConfigError(key, f"got {value}", "give a share from 0 to below 0.5")


def _follows(value: float | str, key: str) -> None:
    if isinstance(value, str) and value != "adaptive":
        raise ConfigError(key, f"got {value!r}", "write a number from 0 to 1, or adaptive")
    if not isinstance(value, str):
        fraction(value, key)


def _zero_stage(value: int, key: str) -> None:
    if value not in (0, 1, 2, 3):
        raise ConfigError(key, f"got {value}", "there are ZeRO stages 0 to 3")


def _common(settings: NodeSettings, at: str) -> None:
    """Whether a client can train its parent's model beside its own."""
    share, batch, key = settings.merge.common_fraction, settings.training.batch_size, f"{at}merge.common_fraction"
    if not share:
        return
    if settings.merge.client != "adaptive":
        got = f"got {share}, but merge.client is {settings.merge.client}"
        raise ConfigError(key, got, "set merge.client to adaptive, or this to 0: others never leave their parent")
    if settings.merge.common_rows(batch) == batch:
        got = f"{share} of {batch} sequences leaves none for the client's own model"
        raise ConfigError(key, got, "lower it, or raise training.batch_size")
    if settings.privacy.unit == "record":
        got = f"got {share}, but privacy.unit is record, whose noise is for one model"
        raise ConfigError(key, got, "set it to 0 at clients that promise privacy of records")
    if settings.training.zero_stage or settings.resources.worker_range[1] > 1:
        got = f"got {share}, but the client has DeepSpeed's workers, which hold one model"
        raise ConfigError(key, got, "set it to 0 at clients with several workers or a zero_stage")


def _robust(settings: NodeSettings, at: str) -> None:
    aggregation, key = settings.aggregation, f"{at}aggregation"
    robust = aggregation.robust
    if robust.rule == "none":
        return
    if aggregation.trigger == "goal_achieved" and aggregation.buffer_size < 3:
        got = f"{robust.rule} of {aggregation.buffer_size} updates trusts them all"
        raise ConfigError(
            f"{key}.robust.rule", got, "set aggregation.buffer_size to 3 or more, or trigger: synchronous"
        )
    if aggregation.residuals.per_round:
        got = f"{robust.rule} does not score key layers, by which residuals are found"
        raise ConfigError(f"{key}.robust.rule", got, "set aggregation.residuals.per_round to 0")


def _privacy(settings: NodeSettings, at: str) -> None:
    privacy, key = settings.privacy, f"{at}privacy"
    if privacy.ledger_dir is not None and not expanded(privacy.ledger_dir).is_absolute():
        got = f"{privacy.ledger_dir!r} would be another folder, and an empty ledger, for whoever starts elsewhere"
        raise ConfigError(f"{key}.ledger_dir", got, "give an absolute path")
    if privacy.max_updates is not None and privacy.unit != "client":
        got = f"is set, but privacy.unit is {privacy.unit}"
        raise ConfigError(f"{key}.max_updates", got, "only unit client counts updates: remove it")
    noise = privacy.noise_multiplier
    if noise is not None and noise < SMALLEST_PRV_NOISE and (privacy.unit, privacy.accountant) == ("record", "prv"):
        got = f"got {noise:g}, for which accountant prv takes minutes and gigabytes"
        raise ConfigError(f"{key}.noise_multiplier", got, f"give {SMALLEST_PRV_NOISE:g} or more, or use accountant rdp")
    if privacy.on_exhausted == "pause" and privacy.unit != "record":
        got = f"pause, but privacy.unit is {privacy.unit}: only a client that keeps its own budget can pause"
        raise ConfigError(f"{key}.on_exhausted", got, "remove it, or set privacy.unit to record")
    chosen = privacy.target_epsilon is not None or privacy.noise_multiplier is not None
    if privacy.unit != "none" and not chosen:
        raise ConfigError(key, "neither target_epsilon nor noise_multiplier is set", "set one of them, or both")
    if privacy.unit == "none" and chosen:
        name = "target_epsilon" if privacy.target_epsilon is not None else "noise_multiplier"
        raise ConfigError(f"{key}.{name}", "is set, but privacy.unit is none", "set privacy.unit to record or client")


def check_stricter(child: PrivacyConfig, parent: PrivacyConfig, key: str) -> None:
    """A node below one that promises privacy may promise more, never less.

    Args:
        child: in force at the node.
        parent: in force at its parent.
        key: dotted key of the node's privacy section, for messages.

    Raises:
        ConfigError: names the value that would weaken the parent's promise.
    """
    if parent.unit == "none":
        return
    weaker = {
        "unit": child.unit != parent.unit,
        "target_epsilon": parent.target_epsilon is not None
        and (child.target_epsilon is None or child.target_epsilon > parent.target_epsilon),
        "noise_multiplier": parent.noise_multiplier is not None
        and (child.noise_multiplier is None or child.noise_multiplier < parent.noise_multiplier),
        "delta": child.delta > parent.delta,
        "max_updates": parent.max_updates is not None
        and (child.max_updates is None or child.max_updates > parent.max_updates),
        "report_metrics": child.report_metrics and not parent.report_metrics,
        "ledger_dir": child.ledger_dir != parent.ledger_dir,
    }
    for name, is_weaker in weaker.items():
        if is_weaker:
            promised, got = getattr(parent, name), getattr(child, name)
            raise ConfigError(f"{key}.{name}", f"{got} weakens the promise of the node above, {promised}", "remove it")


def _workers(workers: Any, key: str) -> None:
    ends = workers if isinstance(workers, list) else [workers, workers]
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not whole or not 0 < ends[0] <= ends[1]:
        raise ConfigError(key, f"got {workers}", "give a whole number above 0, or [min, max]")


def _two_betas(betas: Any, key: str) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(key, f"got {betas}", "give two numbers from 0 to below 1")


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """An entry of the tree with `key=value` overrides applied.

    Raises:
        ConfigError: an override is none.
    """
    found = OmegaConf.create(_escaped(raw))
    for text in overrides:
        override(found, text, Node)
    return _resolved(found)


def override(raw: DictConfig, text: str, hint: Any = RunConfig) -> None:
    """Apply one `key=value` override in place.

    Args:
        raw: the mapping.
        text: the override.
        hint: what the mapping is: a RunConfig, or a Node of its tree.

    Raises:
        ConfigError: the text is no override, or the key is not there.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(text, "is not an override", "write key=value, such as training.lr=1e-3")
    try:
        for part in re.findall(r"[^.\[\]]+", key):
            hint = hint_of(hint, int(part) if part.isdigit() else part)
        OmegaConf.update(raw, key, value_of(value, hint, hint_of), merge=True, force_add=True)
    except Exception as error:
        detail = " ".join(str(error).split("\n    full_key")[0].split()) if str(error) else type(error).__name__
        raise ConfigError(key, f"cannot be overridden ({detail})", "check the key with `worldlm show CONF`") from error


class Node:
    """An entry of the tree as YAML has it: the types of its keys. Only they are used."""

    world: str
    federation: str
    client: str
    children: list[Node]
    copies: int
    min_clients: int
    max_clients: int


def hint_of(hint: Any, key: str | int) -> Any:
    """Type of an entry of the configuration.

    Args:
        hint: type of the container.
        key: of the entry, or its index.
    """
    if isinstance(key, int):
        return get_args(hint)[0] if get_origin(hint) is list else Any
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    if hint is RunConfig and key == "world":
        return Node
    if hint is DataConfig and key == "pool":
        return list[DataConfig]
    if hint is Node and key in INHERITED:
        return schema.hints_of(NodeSettings)[key]
    found = schema.hints_of(hint).get(key, Any) if hint is Node or is_dataclass(hint) else Any
    words = get_origin(found) is Literal or found == str | None
    return str if words else found


def unknown_name(key: str, got: str, known: Collection[str]) -> ConfigError:
    """The error for a name without a branch: a rule that falls through in silence would compute another one."""
    return ConfigError(key, f"got {got!r}", one_of(got, sorted(known)))


BOUNDS: dict[str, Callable[[Any, str], None]] = {
    "training.local_steps": positive,
    "training.batch_size": positive,
    "training.lr": positive,
    "training.accumulation_steps": positive,
    "training.weight_decay": not_negative,
    "training.grad_clip": not_negative,
    "training.step_delay_s": _seconds,
    "training.min_lr_ratio": fraction,
    "training.warmup_fraction": fraction,
    "training.betas": _two_betas,
    "training.zero_stage": _zero_stage,
    "aggregation.buffer_size": positive,
    "aggregation.quorum": positive,
    "aggregation.push_every": positive,
    "aggregation.time_up_s": positive,
    "aggregation.max_staleness": not_negative,
    "aggregation.max_update_norm": positive,
    "aggregation.max_share": _share,
    "aggregation.robust.trim": _trim,
    "aggregation.robust.clip_norm": positive,
    "aggregation.attention.temperature": positive,
    "aggregation.attention.self_weight": not_negative,
    "aggregation.residuals.per_round": not_negative,
    "aggregation.residuals.pool": positive,
    "aggregation.residuals.max_age": positive,
    "aggregation.residuals.offers": positive,
    "aggregation.residuals.discount.a": positive,
    "aggregation.residuals.discount.b": not_negative,
    "aggregation.staleness.a": positive,
    "aggregation.staleness.b": not_negative,
    "aggregation.server_optimizer.betas": _two_betas,
    "aggregation.server_optimizer.delay": positive,
    "aggregation.server_optimizer.lr": positive,
    "aggregation.server_optimizer.eps": positive,
    "aggregation.server_optimizer.momentum": fraction,
    "merge.client": _follows,
    "merge.federation": _follows,
    "merge.agreement": _cosine,
    "merge.max_model_step": positive,
    "merge.common_fraction": fraction,
    "exchange.fragments": positive,
    "resources.cpus": positive,
    "resources.clients_per_process": positive,
    "resources.gpus": not_negative,
    "resources.memory_gb": positive,
    "resources.workers": _workers,
    "privacy.target_epsilon": positive,
    "privacy.noise_multiplier": positive,
    "privacy.max_grad_norm": positive,
    "privacy.max_updates": positive,
    "privacy.delta": _probability,
    "simulation.tokens_per_s": _rate,
    "simulation.bandwidth_gbps": _rate,
    "simulation.latency_s": _seconds,
    "simulation.speed_spread": not_negative,
    "data.heldout_fraction": _between,
}
"""What a number of a node's settings may be, by its dotted key."""

RUN_BOUNDS: dict[str, Callable[[Any, str], None]] = {
    "budget.tokens": positive,
    "budget.rounds": positive,
    "budget.seconds": positive,
    "evaluation.tokens": positive,
    "evaluation.final_tokens": positive,
    "evaluation.every_rounds": not_negative,
    "checkpoint.every_s": not_negative,
    "checkpoint.keep": positive,
    "checkpoint.every_updates": positive,
    "checkpoint.patience_s": not_negative,
    "liveness.heartbeat_s": positive,
    "liveness.grace_s": positive,
    "liveness.k": not_negative,
}
"""What a number of the run itself may be."""
