"""Reads a Hugging Face model's config.json, and checks that the decoder of this package computes exactly that model.

Every key that is set must be known: as a size, as harmless, or with the one value that the decoder computes. Any other
key, such as a new way to scale positions, is refused by name. To ignore it would silently train another model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldlm_ray.errors import DataError
from worldlm_ray.model.pretrained_shape import Architecture
from worldlm_ray.model.shape import MOST_LAYERS, ModelShape
from worldlm_ray.storage import filesystem

CONFIG = "config.json"
DEFAULT_CONTEXT = 512
"""Tokens per training sequence if the run sets none and the model allows more."""
NORM_EPS, ROPE_THETA, LONGEST = 1e-6, 10_000.0, 2_048
"""The values of transformers if config.json has none."""

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_READ = {*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling"}

_COMPUTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"],),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "hidden_dropout": (0,),
    "resid_pdrop": (0,),
    "embd_pdrop": (0,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_embedding": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
    "tie_word_embeddings": (False, True),
    "is_llama_config": (True,),
}
"""Keys that change the computation, each with the values that this package computes."""

_HARMLESS = {
    # Provenance and storage.
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "tokenizer_class", "name_or_path"),
    *("transformers.js_config", "unsloth_version", "unsloth_fixed", "_commit_hash", "torchscript", "use_bfloat16"),
    *("_attn_implementation_autoset", "attn_implementation", "_attn_implementation", "_flash_attn_2_enabled"),
    *("finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels"),
    # Return values of a call, and its speed.
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate"),
    *("output_scores", "tf_legacy_loss", "tokenizer_model_max_length", "remove_invalid_values"),
    # Ids of special tokens, lengths, random initial weights.
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "mask_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "prefix"),
    *("max_position_embeddings", "max_sequence_length", "initializer_range"),
    # Generation of text, which does not change the logits.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "suppress_tokens"),
    *("begin_suppress_tokens", "exponential_decay_length_penalty", "diversity_penalty"),
}
"""Keys that change nothing in the logits of a sequence."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The config.json of a model that can be trained here."""

    shape: Architecture
    """Sizes, with the context of the run."""
    max_positions: int
    """The model's longest sequence, in tokens."""
    tied: bool
    """Whether input embedding and output head are one tensor there. Here they are trained separately."""


def read_shape(folder: Path, *, context: int | None = None) -> ModelShape:
    """The shape of a Llama-shaped Hugging Face model on disk; see `read_declared`."""
    shape = read_declared(folder / CONFIG, context=context).shape
    assert isinstance(shape, ModelShape), "this package computes it"
    return shape


def read_declared(file: Path, *, context: int | None = None) -> Declared:
    """Read a config.json.

    Args:
        file: the config.json.
        context: tokens per training sequence of the run. None: the model's limit, at most DEFAULT_CONTEXT.

    Raises:
        DataError: the file cannot be read, or the model is not one that this package computes exactly.
    """
    found = {name: value for name, value in read_object(file).items() if value is not None}
    _refuse_others(found, file)
    sizes = {name: _whole(found, name, file) for name in _SIZES}
    if sizes["num_hidden_layers"] > MOST_LAYERS:
        raise _refusal(file, "num_hidden_layers", sizes["num_hidden_layers"], f"at most {MOST_LAYERS:,} are trained")
    heads = sizes["num_attention_heads"]
    kv_heads = _whole(found, "num_key_value_heads", file) if "num_key_value_heads" in found else heads
    limit = _whole(found, "max_position_embeddings", file) if "max_position_embeddings" in found else LONGEST
    shape = ModelShape(
        hidden_size=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=sizes["intermediate_size"],
        context=context if context is not None else min(limit, DEFAULT_CONTEXT),
        vocab_size=sizes["vocab_size"],
        rope_theta=_rope_theta(found, file),
        norm_eps=_above_zero(found.get("rms_norm_eps", NORM_EPS), "rms_norm_eps", file),
    )
    if shape.hidden_size % (2 * heads):
        raise _refusal(
            file, "num_attention_heads", heads, f"hidden_size {shape.hidden_size} / {heads} is no even width"
        )
    if heads % kv_heads:
        raise _refusal(file, "num_key_value_heads", kv_heads, f"it does not divide the {heads} heads")
    if found.get("head_dim", shape.head_size) != shape.head_size:
        raise _refusal(file, "head_dim", found["head_dim"], f"only hidden_size / heads = {shape.head_size} is computed")
    return Declared(shape=shape, max_positions=limit, tied=found.get("tie_word_embeddings", False) is True)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder.

    Raises:
        DataError: the file is missing or holds no object.
    """
    try:
        with filesystem.refusals(file):
            raw = file.read_bytes()
    except OSError as error:
        detail = error.strerror or str(error)
        raise DataError(f"{file}: cannot be read ({detail}); give the folder of a Hugging Face model") from error
    refuse_pointer(raw, file)
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{file}: is not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: is a {type(found).__name__}, not an object; download it again")
    return found


def refuse_pointer(begin: bytes, file: Path) -> None:
    """Refuse a pointer of git-lfs: a few lines of text instead of a content that has not been fetched.

    Args:
        begin: the first bytes of the file.
        file: for the message.
    """
    if filesystem.is_lfs_pointer(begin):
        raise DataError(f"{file}: is a pointer of git-lfs, not the file itself; run `git lfs pull` in {file.parent}")


def _refuse_others(found: Mapping[str, Any], file: Path) -> None:
    """Refuse the first key that this package does not compute, the most informative ones first."""
    if "model_type" not in found:
        raise DataError(f"{file}: names no model_type; give the folder of a Llama-shaped Hugging Face model")
    if "quantization_config" in found:
        got = found["quantization_config"]
        method = got.get("quant_method", got) if isinstance(got, dict) else got
        raise DataError(f"{file}: quantization_config is {method!r}: weights are quantized; give the model unquantized")
    for name, values in _COMPUTED.items():
        if name in found and not any(_same(found[name], value) for value in values):
            raise _refusal(file, name, found[name])
    if "sliding_window" in found and found.get("use_sliding_window") is not False:
        raise _refusal(file, "sliding_window", found["sliding_window"])
    if set(_listed(found.get("layer_types"))) - {"full_attention"}:
        raise _refusal(file, "layer_types", found["layer_types"])
    known = _READ | set(_COMPUTED) | _HARMLESS | {"sliding_window", "layer_types"}
    for name in sorted(set(found) - known):
        why = "it is not known whether that changes what the model computes"
        raise _refusal(file, name, found[name], f"{why}; remove the key if it does not")


def _refusal(file: Path, name: str, got: Any, why: str = "only plain Llama models can be trained on") -> DataError:
    text = repr(got)
    return DataError(f"{file}: {name} is {text if len(text) <= 80 else text[:77] + '...'}; {why}")


def _same(got: Any, value: Any) -> bool:
    """Whether two values are equal, where true is not 1."""
    return bool(got == value) and isinstance(got, bool) == isinstance(value, bool)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [str(value)]


def _whole(found: Mapping[str, Any], name: str, file: Path) -> int:
    if name not in found:
        raise DataError(f"{file}: lacks {name}; give the folder of a Llama-shaped Hugging Face model")
    value = found[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refusal(file, name, value, "expected a whole number above 0")
    return value


def _above_zero(value: Any, name: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        raise _refusal(file, name, value, "expected a number above 0")
    return float(value)


def _rope_theta(found: Mapping[str, Any], file: Path) -> float:
    """Base of the rotary angles. Scaled positions of any kind are refused.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`, which holds both.
    """
    thetas = {"rope_theta": found["rope_theta"]} if "rope_theta" in found else {}
    for section in ("rope_scaling", "rope_parameters"):
        given = found.get(section) or {}
        if not isinstance(given, dict):
            raise _refusal(file, section, given)
        plain: dict[str, tuple[Any, ...]] = {"rope_type": ("default",), "type": ("default",)}
        plain["partial_rotary_factor"] = (1,)
        for name, value in sorted(given.items(), key=lambda item: item[0] not in ("rope_type", "type")):
            if name == "rope_theta" and value is not None:
                thetas[f"{section}.rope_theta"] = value
            elif value is not None and not any(_same(value, computed) for computed in plain.get(name, ())):
                raise _refusal(file, f"{section}.{name}", value, "only plain rotary positions are computed")
    numbers = {name: _above_zero(value, name, file) for name, value in thetas.items()}
    if len(set(numbers.values())) > 1:
        first, second = list(numbers)[:2]
        raise _refusal(file, second, numbers[second], f"{first} is {numbers[first]!r}; keep one of them")
    return next(iter(numbers.values()), ROPE_THETA)
