"""The small files of an exported folder: config.json, the settings of generation, and the tokenizer's files.

Some declarations of the model that a run began from are kept: tokens at the ends of a text, longest text, generation,
chat template. The tokenizer's class is the general one of a tokenizer.json: the class of one architecture would change
the tokenizer when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from worldlm_ray.data import special_tokens
from worldlm_ray.data.special_tokens import SETTINGS, TOKENIZER, SpecialTokens, byte_characters
from worldlm_ray.errors import DataError
from worldlm_ray.huggingface.declared import CONFIG, LONGEST
from worldlm_ray.model.shape import ModelShape

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
NAMES = {CONFIG, GENERATION, TOKENIZER, SETTINGS, TEMPLATE}
"""Files of an export other than its weights and its card."""
_OF_A_CLASS = {
    *(
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "legacy",
        "sp_model_kwargs",
        "spaces_between_special_tokens",
    ),
    *(
        "use_default_system_prompt",
        "auto_map",
        "processor_class",
        "vocab_file",
        "tokenizer_file",
        "from_slow",
        "backend",
    ),
    *("added_tokens_decoder", "is_local", "name_or_path", "special_tokens_map_file"),
}
"""Settings of one tokenizer class, or of the machine that wrote them."""
_ENDS = ("bos_token", "eos_token", "pad_token")


def side_files(shape: ModelShape, kept: Mapping[str, bytes]) -> dict[str, bytes]:
    """The content of the small files, by name.

    Args:
        shape: sizes of the decoder.
        kept: small files of the run's tokenizer and of the model that it began from, by name.

    Raises:
        DataError: one of them is damaged.
    """
    tokenizer = kept.get(TOKENIZER) or byte_tokenizer()
    special = special_tokens.find({**kept, TOKENIZER: tokenizer}, _vocabulary(tokenizer))
    base, generation = (_object(kept, name) for name in (CONFIG, GENERATION))
    config = _config(shape, base, special)
    settings = _settings(_object(kept, SETTINGS), special, longest=config["max_position_embeddings"])
    ends = {key: value for key, value in _ends({**base, **generation}, special).items() if value is not None}
    files = {CONFIG: _text(config), TOKENIZER: tokenizer, SETTINGS: _text(settings)}
    if generation or ends:
        files[GENERATION] = _text(generation | ends)
    return files | ({TEMPLATE: kept[TEMPLATE]} if TEMPLATE in kept else {})


def byte_tokenizer() -> bytes:
    """A tokenizer.json whose ids are the bytes of UTF-8, 0 to 255."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    state: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    return _text(state)


def _vocabulary(tokenizer: bytes) -> dict[str, int]:
    import tokenizers

    try:
        vocab: dict[str, int] = tokenizers.Tokenizer.from_buffer(tokenizer).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises bare exceptions from Rust
        raise DataError(f"{TOKENIZER}: is damaged ({' '.join(str(error).split())}); restore the file") from error
    return vocab


def _config(shape: ModelShape, base: Mapping[str, Any], special: SpecialTokens) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_ends(base, special),
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": base.get("initializer_range") or 0.02,
        "intermediate_size": shape.intermediate_size,
        # The run's context limits training only: positions are computed as in the base model.
        "max_position_embeddings": max(base.get("max_position_embeddings") or (LONGEST if base else 0), shape.context),
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": shape.vocab_size,
    }


def _ends(base: Mapping[str, Any], special: SpecialTokens) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad a text: the base model's, unless the run's tokenizer has others."""
    found = {}
    for role in _ENDS:
        theirs, own = base.get(f"{role}_id"), special.ids.get(role)
        fits = own is None or own in (theirs if isinstance(theirs, list) else [theirs])
        found[f"{role}_id"] = theirs if fits else own
    return found


def _settings(theirs: Mapping[str, Any], special: SpecialTokens, *, longest: int) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    kept = {name: value for name, value in theirs.items() if name not in _OF_A_CLASS}
    usual = {"clean_up_tokenization_spaces": False, "model_max_length": longest}
    return usual | kept | {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(special.roles)


def _object(kept: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(kept.get(name, b"{}"))
    except ValueError as error:
        raise DataError(f"{name}: is not JSON ({error}); restore the file") from error
    if not isinstance(found, dict):
        raise DataError(f"{name}: is a {type(found).__name__}, not an object; restore the file")
    return found


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
