"""Methods for adapters on a pre-trained model at equal tokens, where each client's text is scarce.

Eight clients in two federations; two clients share each language. The model and the text are given to the run:
--model FOLDER (as examples/get_smollm2.py makes it) and --text FOLDER (one plain file per language, see TEXTS).
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.gpu.card import device
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.runner import MODEL, TEXT
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.experiments.compare import compare

GROUPS = (("local", "fedit", "kin"), ("fedalt", "worldlm", "pooled+ft"), ("ffa_lora", "fedsa_lora"))
"""Methods that run at the same time, a process each. Eight processes on one card finished no run in 211 s."""
SEEDS = 2
TEXTS = {
    "nordic": ("germanic/norwegian.txt", "germanic/swedish.txt"),
    "african": ("lowres/wolof.txt", "lowres/swahili.txt"),
}
CORPORA = {"code": ("python_stdlib", "cpp_headers"), "prose": ("python_reference", "package_descriptions")}
"""Text of a dry run."""
SHARDS = 2


def measure(rows: Rows, toy: bool) -> None:
    """Losses of each method, seed by seed, and their means."""
    with tempfile.TemporaryDirectory() as place:
        model = _toy_model(Path(place) / "model") if toy else Path(os.environ[MODEL])
        size = 4_000 if toy else 50_000
        config = from_mapping(_world(model, toy) | {"data": {"cache_dir": f"{place}/cache", "train_bytes": size}})
        groups, seeds = ((("local", "kin"),), 1) if toy else (GROUPS, SEEDS)

        def on_done(method: str, seed: int, own: float) -> None:
            rows.add(f"{method}, seed {seed}: mean loss of the clients' own models", own, "nats per byte")

        found = list[dict[str, Any]]()
        for seed in range(seeds):  # so that a run that is cut off has whole seeds
            for group in groups:
                jobs = 1 if toy else len(group)
                found += compare(config, group, [seed], out=Path(place) / "runs", jobs=jobs, on_done=on_done)
    own, world = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for row in found:
        own[row["method"]].append(row["own"])
        world[row["method"]].append(row["world"])
    alone = {(row["seed"], row["client"]): row["own"] for row in found if row["method"] == "local"}
    for method in (method for group in groups for method in group):
        rows.add(f"{method}: own models", mean(own[method]), "nats per byte")
        rows.add(f"{method}: world's model", mean(world[method]), "nats per byte")
        mine = [row for row in found if row["method"] == method]
        rows.add(f"{method}: worst client", max(r["own"] / alone[r["seed"], r["client"]] - 1 for r in mine) * 100, "%")


def _world(model: Path, toy: bool) -> dict[str, Any]:
    where, texts = device(toy), CORPORA if toy else TEXTS
    return {
        "name": "gpu_adapters",
        "model": {
            "backend": "transformers",
            "initial_from": str(model),
            "trainable": "lora",
            "lora": {"r": 8, "alpha": 16},
            "context": 32 if toy else 256,
        },
        "budget": {"rounds": 2 if toy else 10},
        "training": {
            "local_steps": 2 if toy else 8,
            "batch_size": 4,
            "lr": 1e-3,
            "weight_decay": 0.0,
            "compile": "off",
        },
        "aggregation": {"trigger": "synchronous"},
        "evaluation": {
            "every_rounds": 0,
            "tokens": 256 if toy else 8_192,
            "final_tokens": 256 if toy else 16_384,
            "validation_tokens": 256 if toy else 4_096,
        },
        "resources": {"gpus": 1.0 if where == "cuda" else 0.0},
        "world": {
            "children": [
                {
                    "federation": federation,
                    "children": [
                        {"client": f"{Path(name).stem}{shard}", "data": _text(name, shard, toy)}
                        for name in names
                        for shard in range(SHARDS)
                    ],
                }
                for federation, names in texts.items()
            ]
        },
    }


def _text(name: str, shard: int, toy: bool) -> dict[str, Any]:
    source = {"corpus": name} if toy else {"files": [str(Path(os.environ[TEXT]) / name)]}
    return source | {"shard": f"{shard + 1}/{SHARDS}"}


def _toy_model(folder: Path) -> Path:
    """A random model of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=None
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
