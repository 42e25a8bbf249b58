"""Small random models of transformers on disk, one of every shape that people fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
