"""Hugging Face folders: export of a node's model for `AutoModelForCausalLM`, and import as a run's initial weights.

Parameter names and shapes are Hugging Face's already (worldlm_ray/model/shape.py), so this is a file format, not a
conversion. A folder holds config.json, model.safetensors (or shards with an index), and the tokenizer's files.

    declared.py   reads config.json, and checks that this package computes exactly what it declares
    weights.py    checks the tensors, and reads them
    export.py     writes a folder
    side_files.py its small files: special tokens, generation, the tokenizer
    card.py       its model card
"""

from worldlm_ray.huggingface.declared import CONFIG, Declared, read_declared, read_object, read_shape
from worldlm_ray.huggingface.export import export, has_other_card
from worldlm_ray.huggingface.weights import check_weights, read_weights

__all__ = [
    "CONFIG",
    "Declared",
    "check_weights",
    "export",
    "has_other_card",
    "read_declared",
    "read_object",
    "read_shape",
    "read_weights",
]
