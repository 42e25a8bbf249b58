"""The model card of an exported folder: the origin of a model and its measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- worldlm_ray
---
"""
_USE = """## Use

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
"""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The content of a card."""

    run: str
    node: str
    kind: str
    """`client`, `federation` or `world`."""
    method: str
    architecture: str
    """What computes the model, and how many parameters were trained."""
    context: int
    """Tokens of a training sequence."""
    longest: int
    """Tokens of the longest sequence that config.json allows."""
    began_from: str
    tied: bool
    """Whether embedding and head were one tensor in the model that the run began from."""
    tokens: int | None
    """Tokens that all clients at or below the node have trained on; None if the run has not ended."""
    tokenizer: str
    loss: float | None
    """In nats per byte, on held-out text; None if it was not measured or is private."""
    perplexity_per_token: float | None
    privacy: Sequence[str] = ()
    """A line for each privacy promise."""


def card(facts: Facts) -> str:
    """The text of a model card."""
    whose = "that client's" if facts.kind == "client" else "all clients' below it"
    rows = {
        "architecture": facts.architecture,
        "began from": facts.began_from + (", whose embedding and head were one tensor" if facts.tied else ""),
        "method": facts.method,
        "trained on": "not known: the run has not ended" if facts.tokens is None else f"{facts.tokens:,} tokens",
        "sequences": f"{facts.context:,} tokens in training, at most {facts.longest:,}",
        "tokenizer": facts.tokenizer,
        f"loss on {whose} held-out text": _loss(facts),
        "differential privacy": "; ".join(facts.privacy) if facts.privacy else "none promised",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    title = f"# {facts.run}: {facts.node}"
    what = f"The model of the {facts.kind} `{facts.node}`, trained by worldlm_ray in the run `{facts.run}`."
    return "\n".join([_HEAD, title, "", what, "", table, "", _USE])


def _loss(facts: Facts) -> str:
    if facts.loss is None:
        return "not measured, or private"
    per_token = f", perplexity {facts.perplexity_per_token:.3f} per token" if facts.perplexity_per_token else ""
    return f"{facts.loss:.4f} nats per byte{per_token}"
