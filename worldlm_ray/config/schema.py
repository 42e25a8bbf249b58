"""Settings of a run and of a node: every default stands here once, with its unit.

The schema is a set of frozen dataclasses. Those of aggregation, merge and exchange stand in `config/federated.py`.
Settings of a node are inherited by everything below it and may be overridden anywhere: see `worldlm_ray.plan.tree`,
which resolves the `world:` part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from worldlm_ray.config import rule_files
from worldlm_ray.config.federated import AggregationConfig, ExchangeConfig, MergeConfig, PrivacyUnit
from worldlm_ray.config.gateway import GatewayConfig
from worldlm_ray.config.tracking import LoggingConfig, TrackingConfig

AccountantName = Literal["rdp", "prv"]
OnExhausted = Literal["stop", "pause"]
GradSampleMode = Literal["auto", "ghost", "hooks"]

USUAL_KEY_LAYERS = ("model.embed_tokens.*", "model.layers.-1.*", "model.norm.*", "lm_head.*")
"""Key layers of a decoder, for methods that need some."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): W + alpha / r B A, where A and B alone are trained."""

    r: int = 8
    """Rank of B A."""
    alpha: float = 16.0
    dropout: float = 0.0
    """Share of an adapter's inputs that are zero in a training step."""
    freeze_a: bool = False
    """A stays as the run's seed draws it, and B alone is trained and sent (FFA-LoRA, Sun et al., arXiv 2403.12313): the
    mean of B is then the mean of the adapters, in half of the bytes and with less noise under privacy."""
    experts: Literal["none", "rest", "kin"] = "none"
    """What a client computes with beside its own adapter: `kin` mixes its federation's and the world's in, `rest` that
    of all others (FedALT), by a router per layer that never leaves the client. See docs/pretrained.md."""
    targets: list[str] = field(default_factory=list)
    """Linear layers that get an adapter, by the last part of their names, such as q_proj. Unless given: all but the
    output head."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model. A preset gives the decoder's shape; any number set here replaces the preset's."""

    preset: str = "nano"
    key_layers: list[str] = field(default_factory=list)
    """Name patterns of the key layers, which are blended by attention; `layers.-1` is the last block. All the rest is
    backbone. Unless given there are none: averaging all layers was better in docs/results.md, but for one seed of a
    synchronous run."""
    backend: Literal["decoder", "transformers"] = "decoder"
    """What computes the model: the decoder of this package, or transformers, which takes any causal language model."""
    initial_from: str | None = None
    """Folder of a Hugging Face model: its shape and weights, in place of a preset and random weights. The backend
    `decoder` refuses a model that computes anything else than a plain Llama. Quantized weights are refused by both."""
    trainable: Any = "all"
    """Backend `transformers`: `all`, `lora`, or a list of name patterns. Nothing else is trained, and nothing else
    travels."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters of `trainable: lora`."""
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
    """A client's text: its own files, or a corpus that every installation holds."""

    files: list[str] = field(default_factory=list)
    """Files, folders and globs: .txt, .jsonl, .ndjson, .json, all also compressed (.gz, .zst, .bz2, .xz), and .parquet.
    A folder stands for FOLDER/**/*: links are followed, hidden names left out. What is left out is counted and said."""
    corpus: str | None = None
    """Name of a corpus (see worldlm_ray/data/corpora.py); instead of `files`."""
    format: Literal["text", "conversations"] = "text"
    """`conversations`: records hold `messages` ([{role, content}, ...]), or `prompt` and `completion`. The tokenizer's
    chat template writes them, and the loss is on the assistant's messages only (docs/pretrained.md)."""
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
    each. Training on pooled text (`worldlm compare --methods pooled`) is one client with the sections of all."""
    shard: str | None = None
    """`2/4`: only the second of four parts of the text, dealt out block by block, so that the parts are alike."""
    train_fraction: float = 1.0
    """Share of the training part that is used, spread evenly over it; the other two parts stay whole."""
    train_bytes: int | None = None
    """Use at most so many bytes of the training part, spread evenly over it; instead of `train_fraction`."""
    heldout_fraction: float = 0.05
    """Share of a client's text that is never trained on: the test."""
    validation_fraction: float = 0.05
    """Share of a client's text that choices are made on, such as when to stop. It is neither trained on nor held out.
    0 is none; so it is for a client with `privacy.unit: record`, since epsilon does not cover such choices."""
    max_bytes: int | None = None
    """Use only the first so many bytes of text."""
    cache_dir: str = "~/.cache/worldlm_ray"
    """Where token shards are cached, on the machine where the client runs."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Local training of a client: AdamW, warm-up, cosine decay over the budget."""

    local_steps: int = 50
    """Optimizer steps per local round (H)."""
    draw_steps: int | None = None
    """Steps whose text is drawn together; those of a round unless given. One long round then trains on the same text in
    the same order as many rounds of so many steps."""
    head_first: float = 0.0
    """Share of a round's steps, at its beginning, that train the key layers (the head) while the backbone (the body)
    is frozen. The others train the backbone while the key layers are. 0 trains both in every step."""
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
    """Whether `torch.compile` fuses the training step of a plain client without privacy. `auto` is on with CUDA, but
    off for models of `model.backend: transformers`, for which `on` is refused, and where activations are recomputed.
    On a CPU the first step took 15 s (nano) and 109 s (micro), too long for a short run (docs/results.md)."""
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
    lora_rank: int | None = None
    """Rank of the client's adapters, at most `model.lora.r`, which is what travels; that unless given. It trains the
    first rows of A and columns of B only, and its update is zero beyond them (docs/pretrained.md)."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's own configuration, such as {zero_optimization: {overlap_comm: true}}."""

    @property
    def head_steps(self) -> int:
        """Steps of a round that train the head alone: at least one, unless the share is 0."""
        return max(1, round(self.head_first * self.local_steps)) if self.head_first else 0


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
    """Local rounds between two measurements of a client, at least; 0 measures at the start and the end only."""
    share: float = 0.04
    """Held-out measurements during a run, in relation to training: `every_rounds` is raised until they cost no more. A
    trained token costs as much as three that are measured."""
    tokens: int = 4_096
    """Held-out tokens per measurement at the start and during training."""
    final_tokens: int = 32_768
    """Held-out tokens per measurement at the end."""
    validation_tokens: int = 4_096
    """Validation tokens per model that a client chooses among at the end; in its rounds it takes half of them."""
    keep_best: bool = False
    """Early stopping: a client's model is that of its round with the lowest loss on its validation text. It is measured
    before the first round and as often as `every_rounds` says. A client without such text has its last one."""

    @property
    def round_validation_tokens(self) -> int:
        """Validation tokens per model that a client chooses among in its rounds."""
        return max(1, self.validation_tokens // 2)


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
    """Seconds between two heartbeats from a child to its parent."""
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
    rules: list[str] = field(default_factory=list)
    """Python modules, or files that end in .py, that add staleness functions, aggregation rules and the like. Their
    code runs in every process of the run: see worldlm_ray/config/rule_files.py."""
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
    joins: str | None = None
    """Folder of the profile that `worldlm gateway join` has made: this run is a member of another organisation's
    world."""
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    kept: dict[str, str] = field(default_factory=dict)
    """Files that the run's folder keeps copies of, with their fingerprints: written when the run is made."""
    world: Any = None
    """The tree: see worldlm_ray/plan/tree.py."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Import the rules in the process that unpickles a configuration: its names mean nothing without them.

        Raises:
            ConfigError: one of them cannot be imported there.
        """
        vars(self).update(state)
        rule_files.load(self.rules, self.kept, self.run_dir)


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
MEMBER_KEYS: tuple[str, ...] = ("member", "required", "update_tokens")
"""Keys of the entry of a member."""
