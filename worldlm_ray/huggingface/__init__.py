"""Hugging Face folders: a node's model as one that `AutoModelForCausalLM` loads, and one as a run's initial weights.

Parameter names and shapes are Hugging Face's already (worldlm_ray/model/shape.py): this is a file format, not a
conversion. A folder holds config.json, model.safetensors (or shards with an index), and the tokenizer's files.

    declared.py   config.json of a model: whether this package computes exactly what it declares
    weights.py    its tensors: looked through before they are read
    export.py     a folder written
    side_files.py its small files: how texts begin and end, the tokenizer's
    card.py       its model card
"""

from worldlm_ray.huggingface.declared import Declared, read_declared, read_object, read_shape
from worldlm_ray.huggingface.export import export, has_other_card
from worldlm_ray.huggingface.weights import check_weights, read_weights

__all__ = [
    "Declared",
    "check_weights",
    "export",
    "has_other_card",
    "read_declared",
    "read_object",
    "read_shape",
    "read_weights",
]
