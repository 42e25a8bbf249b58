"""Adapters of a pre-trained model: a client's speed against a bare loop with peft, its memory, and a 7B inner node.

The clients' model is SmolLM2-135M where `python examples/get_smollm2.py` has put it, else a random model of its shape.
The inner node has the true shapes of a Llama of 7B and rank 16; no weight of the base exists anywhere.
"""

from __future__ import annotations

import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldlm_ray.config.schema import LoraConfig, ModelConfig, TrainingConfig
from worldlm_ray.exchange.compression import nbytes
from worldlm_ray.model.pretrained import read_shape
from worldlm_ray.model.pretrained_shape import PretrainedShape, initial_adapters
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.trainer import Batch

SMOLLM2 = Path("~/.cache/worldlm_ray/models/smollm2-135m").expanduser()
SHAPE_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
SHAPE_7B = SHAPE_135M | {
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
}
RANK, RANK_7B = 8, 16
CODECS = ("fp32", "bf16", "int8")
"""Of a push; the target is that of the codec of conf/hospitals.yaml."""
PAIRS, STEPS, BATCH, CONTEXT, RATE = 5, 2, 2, 128, 1e-4
INNER_NODE = """
import pickle, sys, time
began = time.perf_counter()
layout, seed = pickle.load(open(sys.argv[1], "rb"))
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.node_setup import NodePlace, NodeRules
from worldlm_ray.config.federated import AggregationConfig, MergeConfig
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.model.pretrained_shape import initial_adapters
from worldlm_ray.tensors.buffers import frozen
place = NodePlace(path="world/f", children=("a", "b", "c", "d"), has_parent=True)
rules = NodeRules(aggregation=AggregationConfig(), merge=MergeConfig(client=1.0), budget=BudgetConfig(rounds=10))
node = Node(place, rules, layout, frozen(initial_adapters(layout, seed=seed)))
assert "torch" not in sys.modules and "transformers" not in sys.modules
anonymous = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
print(time.perf_counter() - began, anonymous)
"""


def run() -> dict[str, Any]:
    """Measure all three, and print them beside their targets."""
    with tempfile.TemporaryDirectory() as folder:
        base = SMOLLM2 if (SMOLLM2 / "config.json").is_file() else _random_model(Path(folder) / "base")
        shape, layout = _shape(json.loads((base / "config.json").read_text()), base, rank=RANK, cache=Path(folder))
        shares = {codec: nbytes(codec, layout.size) / (4 * shape.frozen) for codec in CODECS}
        for codec, share in shares.items():
            print(f"a push: {nbytes(codec, layout.size):,} bytes in {codec}, {share:.2%} of the model (target 1.5 %)")
        found = {"push_share": shares, **_memory(shape, layout), **_speed(shape, layout, base)}
        return found | _inner_node(Path(folder))


def _shape(config: dict[str, Any], base: Path, *, rank: int, cache: Path) -> tuple[PretrainedShape, Layout]:
    model = ModelConfig(backend="transformers", trainable="lora", lora=LoraConfig(r=rank), context=CONTEXT)
    shape, _, _ = read_shape(config, model, file=base / "config.json", folder=base, cache_dir=str(cache))
    return shape, shape.layout([])


def _random_model(folder: Path) -> Path:
    import transformers

    config = transformers.LlamaConfig(**{k: v for k, v in SHAPE_135M.items() if k != "architectures"})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _trainer(shape: PretrainedShape, layout: Layout) -> LocalTrainer:
    trainer = LocalTrainer(shape, layout, TrainingConfig(precision="fp32"), threads=1, device="cpu")
    trainer.write(initial_adapters(layout, seed=0))
    return trainer


def _batches(shape: PretrainedShape, seed: int) -> list[Batch]:
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, shape.vocab_size, (STEPS, BATCH, CONTEXT + 1))
    return [(np.ascontiguousarray(row[:, :-1]), np.ascontiguousarray(row[:, 1:])) for row in rows]


# ---- memory ------------------------------------------------------------------------------------------------------


def _memory(shape: PretrainedShape, layout: Layout) -> dict[str, Any]:
    """What the first and the second client of a process add to its resident memory, a step each."""
    before, kept = _resident(), []
    grown: list[int] = []
    for _ in range(2):
        trainer = _trainer(shape, layout)
        trainer.run(_batches(shape, 0)[:1], lambda _: RATE)
        kept.append(trainer)
        grown.append(_resident() - before - sum(grown))
    print(f"first client {grown[0] / 1e6:,.0f} MB, second {grown[1] / 1e6:,.0f} MB: {grown[1] / grown[0]:.2f} (0.25)")
    return {"first_client_bytes": grown[0], "second_client_bytes": grown[1]}


def _resident() -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


# ---- speed -------------------------------------------------------------------------------------------------------


def _speed(shape: PretrainedShape, layout: Layout, base: Path) -> dict[str, Any]:
    """Tokens per second of a client and of the loop that a user would write with peft, in turn."""
    trainer, bare = _trainer(shape, layout), _bare_loop(base)
    torch.set_num_threads(1)
    ratios, speeds = [], []
    for pair in range(PAIRS + 1):
        batches = _batches(shape, pair)
        began = time.perf_counter()
        trainer.run(batches, lambda _: RATE)
        ours = time.perf_counter() - began
        theirs = bare(batches)
        if pair:  # the first pair warms up
            ratios.append(theirs / ours)
            speeds.append(STEPS * BATCH * CONTEXT / ours)
    ratio = statistics.median(ratios)
    print(f"client {statistics.median(speeds):,.0f} tokens/s, {ratio:.3f} of a loop with peft (target 0.95)")
    return {"tokens_per_s": statistics.median(speeds), "of_bare_loop": ratio, "ratios": ratios}


def _bare_loop(base: Path) -> Any:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model.train()

    def train(batches: list[Batch]) -> float:
        began = time.perf_counter()
        for inputs, targets in batches:
            logits = model(input_ids=torch.from_numpy(inputs), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began

    return train


# ---- an inner node of a large model ------------------------------------------------------------------------------


def _inner_node(folder: Path) -> dict[str, Any]:
    """Seconds and memory of an inner node in a process without torch."""
    _, layout = _shape(SHAPE_7B, folder, rank=RANK_7B, cache=folder)
    given = folder / "layout.pickle"
    given.write_bytes(pickle.dumps((layout, 0)))
    done = subprocess.run([sys.executable, "-c", INNER_NODE, given], capture_output=True, text=True, check=True)
    seconds, anonymous = (float(number) for number in done.stdout.split())
    copies = anonymous / layout.nbytes
    print(
        f"inner node of 7B, rank {RANK_7B}: adapters of {layout.nbytes / 1e6:,.0f} MB, starts in {seconds:.1f} s "
        f"(target 5), holds {copies:.2f} of them with its interpreter (target 3)"
    )
    return {"inner_node_s": seconds, "inner_node_copies": copies, "adapter_bytes_7b": layout.nbytes}
