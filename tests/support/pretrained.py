"""Small random models of transformers on disk, one of every shape that people fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import worlds
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.config.schema import LoraConfig
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.plan.plan import Plan, make_plan

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied_gqa": ("LlamaForCausalLM", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama_scaled": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    ),
    "qwen2_biased": ("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": 16}),
    "gemma": ("GemmaForCausalLM", {"num_key_value_heads": 1, "head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("GPTNeoXForCausalLM", {"use_parallel_residual": True}),
}
"""Class and further settings, by a name."""


def save_pretrained(folder: Path, kind: str = "llama_tied_gqa", **settings: Any) -> Path:
    """A random model of a kind of `KINDS`, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    name, own = KINDS[kind]
    made = getattr(transformers, name)
    config = made.config_class(**(SIZES | {"bos_token_id": None, "eos_token_id": None} | own | settings))
    torch.manual_seed(0)
    made(config).save_pretrained(folder)
    return folder


def shape_of(parameters: tuple[tuple[str, tuple[int, ...]], ...], **changes: Any) -> PretrainedShape:
    """The shape of a model that is in no file, of which these parameters are trained."""
    settings: dict[str, Any] = {"trainable": "lora", "lora": LoraConfig()} | changes
    return PretrainedShape(
        folder="",
        config="{}",
        model_type="llama",
        hidden_size=2,
        layers=1,
        heads=1,
        vocab_size=8,
        context=4,
        parameters=parameters,
        frozen=0,
        cache_dir="",
        **settings,
    )


def world(folder: Path, model: Path, **settings: Any) -> Plan:
    """Two clients on a model on disk, two rounds of two steps."""
    raw = {
        "run_dir": str(folder / "run"),
        "data": {"cache_dir": str(folder / "cache")},
        "model": {"backend": "transformers", "initial_from": str(model), "context": 16, **settings},
        "merge": {"client": 1.0},
        "budget": {"rounds": 2},
        "training": {"local_steps": 2, "batch_size": 4, "lr": 1e-2},
        "evaluation": {"tokens": 256, "final_tokens": 256},
        "world": {"children": [worlds.client("a", folder, 1), worlds.client("b", folder, 2)]},
    }
    return make_plan(from_mapping(raw))


def logits(model: Any) -> np.ndarray:
    """Logits [2, 16, V] of a module of transformers on tokens that are always the same."""
    torch = pytest.importorskip("torch")
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.numpy()


def computed_here(plan: Plan, theta: np.ndarray) -> np.ndarray:
    """The same of a plan's model with trainable parameters, computed by a trainer."""
    from worldlm_ray.training.making import plain_trainer

    trainer = plain_trainer(plan.shape, plan.layout, plan.root.clients[0].settings)
    trainer.write(theta)
    return logits(trainer.model.root)
