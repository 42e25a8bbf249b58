"""The model card of an exported folder: the origin of a model, and its measures.

One card is made for adapters, for merged weights and for whole models. Its head is YAML that model hubs read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

NOTHING = "-"
BASE_CARD = "README.md"
OF_BASE = ("license", "license_name", "license_link", "language")
"""What a card takes from the card of the base model."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one client, or the clients of one federation, have added to a model."""

    node: str
    clients: int
    tokens: int | None
    """None if it is not known."""
    data: str
    """The format of the text."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What the ledgers of one federation's clients say."""

    node: str
    clients: int
    unit: str
    """`record` or `client`."""
    epsilon: float | None
    """The largest that has been spent on one client's text; None if no ledger lies on this machine."""
    delta: float


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Held-out quality of a model at the beginning and at the end of its run."""

    what: str
    """Whose model, on whose text."""
    before: float | None
    """Loss in nats per byte; None if it was not measured or is private."""
    after: float | None
    perplexity_before: float | None
    """Per byte."""
    perplexity_after: float | None
    private: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One number of lm-evaluation-harness."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None
    """Examples of the task."""


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
    base: str | None = None
    """Name of the model that the run began from."""
    of_base: Mapping[str, Any] = field(default_factory=dict)
    """License and languages, by the card of that model."""
    is_adapter: bool = False
    """Whether the folder holds a PEFT adapter."""
    has_adapters: bool = False
    """Whether the run has trained adapters."""
    contributions: Sequence[Contribution] = ()
    others: str = ""
    """A sentence about contributions that have no row."""
    promises: Sequence[Promise] = ()
    policy: Mapping[str, str] = field(default_factory=dict)
    """The rules of each node in words, by its path."""
    evaluated: Sequence[Evaluated] = ()
    tasks: Sequence[TaskResult] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    """By package."""


def card(facts: Facts) -> str:
    """The text of a model card."""
    title = f"# {facts.run}: {facts.node}"
    what = f"The model of the {facts.kind} `{facts.node}`, trained by worldlm_ray in the run `{facts.run}`."
    sections = {
        "Use": _use(facts),
        "Contributions": _contributions(facts),
        "Privacy": _privacy(facts),
        "Policy": "\n".join(f"* `{node}`: {text}" for node, text in facts.policy.items()),
        "Evaluation": _evaluation(facts),
        "Tasks of lm-evaluation-harness": _tasks(facts.tasks),
        "Versions": ", ".join(f"{package} {version}" for package, version in facts.versions.items()),
    }
    body = "\n".join(f"\n## {head}\n\n{text}\n" for head, text in sections.items() if text)
    return f"---\n{_head(facts)}---\n\n{title}\n\n{what}\n\n{_summary(facts)}\n{body}"


def base_facts(folder: Path) -> dict[str, Any]:
    """License and languages in the head of a model's card; empty where there is none that can be read.

    Args:
        folder: of the model.
    """
    try:
        begin, _, rest = (folder / BASE_CARD).read_text(encoding="utf-8").lstrip("\ufeff").partition("---\n")
        head = yaml.safe_load(rest.partition("\n---")[0]) if not begin.strip() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = head if isinstance(head, dict) else {}
    return {name: found[name] for name in OF_BASE if isinstance(found.get(name), str | list)}


def _head(facts: Facts) -> str:
    kind = "adapter" if facts.is_adapter else "finetune"
    lora = ["lora"] if facts.has_adapters else []
    head: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["worldlm_ray", "federated-learning", *lora],
    }
    if facts.base is not None:
        head |= {"base_model": facts.base, "base_model_relation": kind, **facts.of_base}
    text: str = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return text


def _summary(facts: Facts) -> str:
    whose = "that client's" if facts.kind == "client" else "all clients' below it"
    rows = {
        "architecture": facts.architecture,
        "began from": facts.began_from + (", whose embedding and head were one tensor" if facts.tied else ""),
        "license of the base model": _listed(facts.of_base.get("license")),
        "method": facts.method,
        "trained on": "not known: the run has not ended" if facts.tokens is None else f"{facts.tokens:,} tokens",
        "sequences": f"{facts.context:,} tokens in training, at most {facts.longest:,}",
        "tokenizer": facts.tokenizer,
        f"loss on {whose} held-out text": _loss(facts),
        "differential privacy": "; ".join(facts.privacy) if facts.privacy else "none promised",
    }
    return table(["", ""], ([name, value] for name, value in rows.items() if value))


def _use(facts: Facts) -> str:
    if facts.is_adapter:
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{facts.base}")  # the folder that the run began from',
            "model = PeftModel.from_pretrained(base, FOLDER)",
            "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        ]
    else:
        code = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
            "model = AutoModelForCausalLM.from_pretrained(FOLDER)",
        ]
    return "\n".join(["```python", *code, "```"])


def _contributions(facts: Facts) -> str:
    total = sum(each.tokens or 0 for each in facts.contributions)
    rows = [
        [
            f"`{each.node}`",
            f"{each.clients:,}",
            NOTHING if each.tokens is None else f"{each.tokens:,}",
            NOTHING if each.tokens is None or not total else f"{each.tokens / total:.1%}",
            each.data,
        ]
        for each in facts.contributions
    ]
    drawn = table(["from", "clients", "tokens trained on", "share", "text"], rows) if rows else ""
    return "\n\n".join(part for part in (drawn, facts.others) if part)


def _privacy(facts: Facts) -> str:
    rows = [
        [
            f"`{each.node}`",
            f"{each.clients:,}",
            each.unit,
            "no ledger lies on this machine" if each.epsilon is None else f"{each.epsilon:.3f}",
            f"{each.delta:g}",
        ]
        for each in facts.promises
    ]
    if not rows:
        return ""
    note = "Epsilon is the largest that was spent on one client's text. Losses on private text are not reported."
    return f"{table(['federation', 'private clients', 'unit', 'epsilon', 'delta'], rows)}\n\n{note}"


def _evaluation(facts: Facts) -> str:
    rows = [
        [each.what, *(["private"] * 4 if each.private else _numbers(each))]
        for each in facts.evaluated
        if each.private or each.after is not None
    ]
    heads = ["on held-out text", "loss before", "after", "perplexity per byte before", "after"]
    return f"{table(heads, rows)}\n\nLosses are in nats per byte." if rows else ""


def _numbers(each: Evaluated) -> list[str]:
    losses = [_or(value, ".4f") for value in (each.before, each.after)]
    return losses + [_or(value, ".3f") for value in (each.perplexity_before, each.perplexity_after)]


def _tasks(found: Sequence[TaskResult]) -> str:
    if not found:
        return ""
    rows = [[each.task, each.metric, f"{each.value:.4f}", _or(each.stderr, ".4f"), _or(each.n, ",")] for each in found]
    return f"{table(['task', 'metric', 'value', 'stderr', 'n'], rows)}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines
    )


def _loss(facts: Facts) -> str:
    if facts.loss is None:
        return "not measured, or private"
    per_token = f", perplexity {facts.perplexity_per_token:.3f} per token" if facts.perplexity_per_token else ""
    return f"{facts.loss:.4f} nats per byte{per_token}"


def _or(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else value or ""
