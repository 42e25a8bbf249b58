"""Configuration: every default stands here once, with its unit.

`load` turns a preset's name or a YAML file, plus `key=value` overrides, into a `RunConfig`. The schema is a
set of frozen dataclasses checked by OmegaConf; whatever is wrong raises one `ConfigError` that names the
dotted key. Settings of a node are inherited by everything below it and may be overridden anywhere: see
`worldlm_ray.tree`, which resolves the `world:` part.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldlm_ray import storage
from worldlm_ray.errors import ConfigError

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
    """Files, folders and globs: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet."""
    corpus: str | None = None
    """Name of a built-in corpus (see worldlm_ray/data/corpora.py); instead of `files`."""
    text_key: str = "text"
    """Field or column that holds the text in .jsonl and .parquet files."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a Hugging Face tokenizer.json. The same for the whole world."""
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
    common_fraction: float = 0.0
    """`adaptive`: share of every batch with which a client that keeps its own model trains its parent's on. At 0 such
    a client pushes what it did to its own model: see worldlm_ray/training/common.py."""

    def common_rows(self, batch_size: int) -> int:
        """Sequences of a batch that `common_fraction` gives to the parent's model: at least one, unless it is 0."""
        return max(1, round(self.common_fraction * batch_size)) if self.common_fraction else 0


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How a node's updates travel to its parent: see worldlm_ray/compression.py."""

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
    """Cores, and torch threads, of a client; of each worker where there are several."""
    gpus: float = 0.0
    """GPUs of a client; of each worker where there are several."""
    workers: Any = 1
    """Processes that train the client's model together, by DeepSpeed; [min, max] takes what the cluster has."""
    share: int = 1
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
    and nothing learned; staleness, times and bytes are those of the run with training (worldlm_ray/cost_model.py)."""


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
    """Faults on purpose, to see what a world bears: see worldlm_ray/faults.py."""
    world: Any = None
    """The tree: see worldlm_ray/tree.py."""


NAMED = 50
"""As many names are listed in a message, at most."""
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
    path = storage.place(conf) if "://" in conf else Path(conf).expanduser()
    if path.suffix in (".yaml", ".yml"):
        with storage.refusals(path):
            if path.is_file():
                return path
        raise ConfigError("CONF", f"there is no file {conf!r}", "give the path of a YAML file or a preset's name")
    known = presets()
    if conf in known:
        return known[conf]
    raise ConfigError("CONF", f"there is no preset {conf!r}", one_of(conf, list(known)))


def load(conf: str, overrides: Sequence[str] = (), *, run_dir: str | None = None) -> RunConfig:
    """Read a configuration and apply `key=value` overrides.

    Args:
        conf: a preset's name (`quickstart`) or the path of a YAML file.
        overrides: such as `training.lr=1e-3` or `world.children[0].training.local_steps=20`.
        run_dir: folder of the run, taken as it is: a path is neither YAML nor an interpolation.

    Raises:
        ConfigError: one problem, by its dotted key.
    """
    path = find(conf)
    try:
        with path.open(encoding="utf-8") as file:
            raw = OmegaConf.load(file)
    except Exception as error:
        detail = " ".join(str(error).split())
        raise ConfigError(str(path), f"is not valid YAML ({detail})", "mend the file") from error
    if not isinstance(raw, DictConfig):
        raise ConfigError(str(path), "is not a mapping of keys", "start from conf/quickstart.yaml")
    if "name" not in raw:
        raw["name"] = path.stem
    for text in overrides:
        override(raw, text)
    config = from_mapping(raw)
    return config if run_dir is None else replace(config, run_dir=run_dir)


def from_mapping(raw: DictConfig | dict[str, Any]) -> RunConfig:
    """Check a mapping against the schema and return the configuration.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value, by its dotted key.
    """
    if not isinstance(raw, DictConfig):
        raw = OmegaConf.create(raw)
    for name in raw:
        if OmegaConf.is_missing(raw, name):
            key = str(name)
            raise ConfigError(key, "has no value", f"give it one, such as {key}=... on the command line")
    try:
        resolved = OmegaConf.create(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise _config_error(error, "") from error
    assert isinstance(resolved, DictConfig)
    config = merge_into(RunConfig(), resolved, prefix="")
    check_run(config)
    return config


def merge_into(schema: T, overrides: Any, *, prefix: str) -> T:
    """Merge a mapping into a frozen dataclass, checking keys and types.

    Args:
        schema: the dataclass instance that gives keys, types and defaults.
        overrides: a mapping (or DictConfig) with some of its keys.
        prefix: dotted key of the mapping itself, for messages.

    Raises:
        ConfigError: names `prefix` and the key.
    """
    if OmegaConf.is_config(overrides):
        overrides = OmegaConf.to_container(overrides)
    base = OmegaConf.structured(schema)
    _unlock(base)
    try:
        merged = OmegaConf.merge(base, OmegaConf.create(_containers(schema, overrides, prefix)))
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _config_error(error, prefix) from error
    assert isinstance(result, type(schema))
    return result


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain containers, ready for YAML, JSON or another process."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML: the whole file or nothing."""
    storage.replace_text(path, to_yaml(config))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_mapping(config)))


def check_run(config: RunConfig) -> None:
    """Checks of the run's own values that types alone cannot make."""
    chosen = [name for name in ("tokens", "rounds", "seconds") if getattr(config.budget, name) is not None]
    if len(chosen) != 1:
        got = " and ".join(chosen) if chosen else "nothing"
        raise ConfigError("budget", f"{got} set", "set exactly one of tokens, rounds, seconds")
    positive(getattr(config.budget, chosen[0]), f"budget.{chosen[0]}")
    positive(config.evaluation.tokens, "evaluation.tokens")
    positive(config.evaluation.final_tokens, "evaluation.final_tokens")
    not_negative(config.evaluation.every_rounds, "evaluation.every_rounds")
    not_negative(config.checkpoint.every_s, "checkpoint.every_s")
    positive(config.checkpoint.keep, "checkpoint.keep")
    positive(config.checkpoint.every_updates, "checkpoint.every_updates")
    not_negative(config.checkpoint.patience_s or 0.0, "checkpoint.patience_s")
    positive(config.liveness.heartbeat_s, "liveness.heartbeat_s")
    positive(config.liveness.grace_s, "liveness.grace_s")
    not_negative(config.liveness.k, "liveness.k")


def check_settings(settings: NodeSettings, key: str) -> None:
    """Checks of one node's inherited settings.

    Args:
        settings: the settings in force at the node.
        key: dotted key of the node, for messages; empty at top level.
    """
    at = f"{key}." if key else ""
    training, aggregation = settings.training, settings.aggregation
    for name in ("local_steps", "batch_size", "lr", "accumulation_steps"):
        positive(getattr(training, name), f"{at}training.{name}")
    for name in ("weight_decay", "grad_clip", "step_delay_s"):
        not_negative(getattr(training, name), f"{at}training.{name}")
    for name in ("min_lr_ratio", "warmup_fraction"):
        fraction(getattr(training, name), f"{at}training.{name}")
    _two_betas(training.betas, f"{at}training.betas")
    for name in ("buffer_size", "quorum", "push_every", "time_up_s"):
        positive(getattr(aggregation, name), f"{at}aggregation.{name}")
    if aggregation.max_staleness is not None:
        not_negative(aggregation.max_staleness, f"{at}aggregation.max_staleness")
    if aggregation.max_update_norm is not None:
        positive(aggregation.max_update_norm, f"{at}aggregation.max_update_norm")
    _robust(aggregation, f"{at}aggregation")
    positive(aggregation.attention.temperature, f"{at}aggregation.attention.temperature")
    not_negative(aggregation.attention.self_weight, f"{at}aggregation.attention.self_weight")
    not_negative(aggregation.residuals.per_round, f"{at}aggregation.residuals.per_round")
    for name in ("pool", "max_age", "offers"):
        positive(getattr(aggregation.residuals, name), f"{at}aggregation.residuals.{name}")
    if aggregation.staleness.a is not None:
        positive(aggregation.staleness.a, f"{at}aggregation.staleness.a")
    not_negative(aggregation.staleness.b, f"{at}aggregation.staleness.b")
    _two_betas(aggregation.server_optimizer.betas, f"{at}aggregation.server_optimizer.betas")
    positive(aggregation.server_optimizer.delay, f"{at}aggregation.server_optimizer.delay")
    if aggregation.server_optimizer.lr is not None:
        positive(aggregation.server_optimizer.lr, f"{at}aggregation.server_optimizer.lr")
    fraction(aggregation.server_optimizer.momentum, f"{at}aggregation.server_optimizer.momentum")
    for name in ("client", "federation"):
        m = getattr(settings.merge, name)
        if isinstance(m, str) and m != "adaptive":
            raise ConfigError(f"{at}merge.{name}", f"got {m!r}", "write a number from 0 to 1, or adaptive")
        if not isinstance(m, str):
            fraction(m, f"{at}merge.{name}")
    if not -1.0 <= settings.merge.agreement <= 1.0:
        got = f"got {settings.merge.agreement}"
        raise ConfigError(f"{at}merge.agreement", got, "give a cosine, from -1 to 1")
    _common(settings, at)
    positive(settings.exchange.fragments, f"{at}exchange.fragments")
    positive(settings.resources.cpus, f"{at}resources.cpus")
    positive(settings.resources.share, f"{at}resources.share")
    not_negative(settings.resources.gpus, f"{at}resources.gpus")
    if settings.resources.memory_gb is not None:
        positive(settings.resources.memory_gb, f"{at}resources.memory_gb")
    _workers(settings.resources.workers, f"{at}resources.workers")
    if training.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"{at}training.zero_stage", f"got {training.zero_stage}", "there are ZeRO stages 0 to 3")
    _privacy(settings.privacy, f"{at}privacy")
    positive(settings.simulation.tokens_per_s, f"{at}simulation.tokens_per_s")
    positive(settings.simulation.bandwidth_gbps, f"{at}simulation.bandwidth_gbps")
    not_negative(settings.simulation.latency_s, f"{at}simulation.latency_s")
    not_negative(settings.simulation.speed_spread, f"{at}simulation.speed_spread")
    if not 0.0 < settings.data.heldout_fraction < 1.0:
        raise ConfigError(
            f"{at}data.heldout_fraction",
            f"got {settings.data.heldout_fraction}",
            "give a number between 0 and 1",
        )


def positive(value: float, key: str) -> None:
    """Raise a ConfigError unless the value is above zero."""
    if not value > 0:
        raise ConfigError(key, f"got {value}", "give a number above 0")


def not_negative(value: float, key: str) -> None:
    """Raise a ConfigError if the value is below zero."""
    if not value >= 0:
        raise ConfigError(key, f"got {value}", "give a number that is not negative")


def fraction(value: float, key: str) -> None:
    """Raise a ConfigError unless the value lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(key, f"got {value}", "give a number from 0 to 1")


def _common(settings: NodeSettings, at: str) -> None:
    """Whether a client can train its parent's model beside its own."""
    share, batch, key = settings.merge.common_fraction, settings.training.batch_size, f"{at}merge.common_fraction"
    fraction(share, key)
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


def _robust(aggregation: AggregationConfig, key: str) -> None:
    robust = aggregation.robust
    if not 0.0 <= robust.trim < 0.5:
        raise ConfigError(f"{key}.robust.trim", f"got {robust.trim}", "give a share from 0 to below 0.5")
    if robust.clip_norm is not None:
        positive(robust.clip_norm, f"{key}.robust.clip_norm")
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


def _privacy(privacy: PrivacyConfig, key: str) -> None:
    for name in ("target_epsilon", "max_grad_norm"):
        value = getattr(privacy, name)
        if value is not None:
            positive(value, f"{key}.{name}")
    if privacy.noise_multiplier is not None:
        positive(privacy.noise_multiplier, f"{key}.noise_multiplier")
    if privacy.ledger_dir is not None and not Path(privacy.ledger_dir).expanduser().is_absolute():
        got = f"{privacy.ledger_dir!r} would be another folder, and an empty ledger, for whoever starts elsewhere"
        raise ConfigError(f"{key}.ledger_dir", got, "give an absolute path")
    if not 0.0 < privacy.delta < 1.0:
        raise ConfigError(f"{key}.delta", f"got {privacy.delta}", "give a probability, such as 1e-5")
    if privacy.max_updates is not None:
        positive(privacy.max_updates, f"{key}.max_updates")
        if privacy.unit != "client":
            got = f"is set, but privacy.unit is {privacy.unit}"
            raise ConfigError(f"{key}.max_updates", got, "only unit client counts updates: remove it")
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


def _two_betas(betas: list[float], key: str) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(key, f"got {betas}", "give two numbers from 0 to below 1")


def _containers(schema: Any, overrides: Any, prefix: str) -> dict[str, Any]:
    """Check that mappings and lists stand where the schema has them; an empty section is as good as none.

    OmegaConf would say so too, but without the key.
    """
    if not isinstance(overrides, dict):
        raise ConfigError(prefix or "config", f"got {overrides!r}", "expected a mapping of keys")
    result: dict[str, Any] = {}
    hints = get_type_hints(type(schema))
    for name, value in overrides.items():
        key = str(name)
        dotted = f"{prefix}.{key}" if prefix else key
        known = getattr(schema, key, None)
        if is_dataclass(known):
            if value is None:
                continue
            value = _containers(known, value, dotted)
        elif isinstance(known, dict) and not isinstance(value, dict):
            raise ConfigError(dotted, f"got {value!r}", "expected a mapping of keys")
        elif isinstance(known, list) and not isinstance(value, list):
            raise ConfigError(dotted, f"got {value!r}", "expected a list, such as [a, b]")
        hint = hints.get(key)
        if isinstance(value, list | dict) and get_origin(hint) in (list, dict) and get_args(hint)[-1] is not Any:
            _check_elements(value, dotted)
        result[key] = value
    return result


def _check_elements(value: list[Any] | dict[Any, Any], key: str) -> None:
    """Lists and mappings of plain values hold plain values. OmegaConf lets others pass."""
    for place, element in enumerate(value) if isinstance(value, list) else value.items():
        if element is None or isinstance(element, list | dict):
            raise ConfigError(
                f"{key}[{place}]", f"got {element!r}", "expected one plain value, such as a name or a number"
            )


def _unlock(node: Any) -> None:
    """Frozen dataclasses make read-only nodes; merging needs them writable."""
    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, False)
        for key in node:
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                _unlock(child)


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A mapping with `key=value` overrides applied.

    Raises:
        ConfigError: an override is none.
    """
    found = OmegaConf.create(raw)
    for text in overrides:
        override(found, text)
    container = OmegaConf.to_container(found)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def override(raw: DictConfig, text: str) -> None:
    """Apply one `key=value` override in place."""
    key, equals, _ = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(text, "is not an override", "write key=value, such as training.lr=1e-3")
    try:
        parsed = OmegaConf.from_dotlist([f"x={text.partition('=')[2]}"])
        value = OmegaConf.to_container(parsed)
        assert isinstance(value, dict)
        OmegaConf.update(raw, key, value["x"], merge=True, force_add=True)
    except Exception as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(key, f"cannot be overridden ({detail})", "check the key with `worldlm show CONF`") from error


def _config_error(error: OmegaConfBaseException, prefix: str) -> ConfigError:
    """OmegaConf's error as one of ours: the dotted key, what was got, what to write instead."""
    key = str(getattr(error, "full_key", None) or getattr(error, "key", None) or "")
    message = str(getattr(error, "msg", None) or error).splitlines()[0].strip()
    dotted = ".".join(part for part in (prefix, key) if part) or "config"
    if type(error).__name__ in ("ConfigKeyError", "ConfigAttributeError"):
        known = getattr(error, "object_type", None)
        names = [f.name for f in fields(known)] if isinstance(known, type) and is_dataclass(known) else []
        return ConfigError(dotted, "unknown key", one_of(key.rsplit(".", 1)[-1], names))
    if converted := re.search(r"[Vv]alue '(.*)' of type '.*' could not be converted to (\w+)", message):
        expected = _EXPECTED.get(converted.group(2), f"a value of type {converted.group(2)}")
        return ConfigError(dotted, f"got {converted.group(1)!r}", f"expected {expected}")
    if choice := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", message):
        return ConfigError(dotted, f"got {choice.group(1)!r}", "expected one of " + choice.group(2).replace("'", ""))
    if "Interpolation key" in message:
        return ConfigError(dotted, message, "set that key")
    return ConfigError(dotted, message, "see worldlm_ray/config.py")


_EXPECTED = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false", "String": "text"}


def unknown_name(key: str, got: str, known: Collection[str]) -> ConfigError:
    """The error for a name without a branch: a rule that falls through in silence would compute another one."""
    return ConfigError(key, f"got {got!r}", one_of(got, sorted(known)))


def one_of(got: str, known: Sequence[str]) -> str:
    """A cure for a wrong name: the closest known one, or all of them."""
    if not known:
        return "remove it"
    close = difflib.get_close_matches(got, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "expected one of " + listed(sorted(known))


def listed(names: Sequence[str]) -> str:
    """Names with commas; of very many the first ones."""
    more = len(names) - NAMED
    return ", ".join(names) if more <= 0 else ", ".join(names[:NAMED]) + f" and {more:,} more"
