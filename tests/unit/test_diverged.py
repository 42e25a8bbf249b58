"""A model that has become NaN, and tokenizers that know no line break: a run bears both, and says so."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.worlds import a_verdict, client

from worldlm_ray.data import Tokenizer, load_tokenizer
from worldlm_ray.errors import CheckpointError, DataError, Interrupted, RunError
from worldlm_ray.experiments import evaluate
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord, Measure, VerdictRecord, perplexity
from worldlm_ray.reports.outcome import Outcome, combine, sampled
from worldlm_ray.reports.progress import Progress
from worldlm_ray.reports.tables import final_table
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tracking.run_state import RunState
from worldlm_ray.tracking.run_warnings import WARNINGS
from worldlm_ray.training.sampling import sample

Tiny = Callable[..., Plan]
KINDS = {"world": "world", "world/a": "client", "world/b": "client"}


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> tuple[Plan, Outcome]:
    children = [client("a", tmp_path, 1, training={"lr": 1e4}), client("b", tmp_path, 2)]
    plan = rundir.create(tiny(children, budget={"rounds": 6}))
    return plan, simulate(plan)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_with_a_diverged_client_ends_with_a_summary_that_says_so(run: tuple[Plan, Outcome]) -> None:
    plan, outcome = run
    summary = json.loads((plan.run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["nodes"]["world/a"]["loss"] is None
    assert summary["nodes"]["world/b"]["loss"] < 6.0
    assert summary["nodes"]["world"]["loss"] < 6.0
    [warning] = summary["warnings"]
    assert warning["node"] == "world/a"
    assert "not_finite" in warning["text"]
    assert "diverged" in warning["text"]
    assert 0.0 < warning["now_s"] < summary["wall_s"], "said while the run went on"
    assert "logits are not finite" in summary["samples_failed"]["world/a"]
    assert outcome.samples["world/b"]
    status = json.loads((plan.run_dir / "status.json").read_text())
    assert status["nodes"]["world/a"]["state"] == "diverged"
    assert status["nodes"]["world/b"]["state"] == "finished"
    console = Console(file=io.StringIO(), width=120)
    console.print(final_table(summary, outcome.samples))
    assert "no sample" in written(console)


def test_measuring_and_sampling_a_diverged_model_afterwards(run: tuple[Plan, Outcome]) -> None:
    plan, _ = run
    where = str(plan.run_dir)
    measures = evaluate.evaluate(where, tokens=64)
    assert math.isnan(measures["world/a"].loss)
    assert math.isfinite(measures["world/b"].loss)
    console = Console(file=io.StringIO(), width=120)
    console.print(evaluate.table(where, measures))
    assert "diverged" in written(console)
    with pytest.raises(RunError, match="diverged"):
        evaluate.sample(where, "world/a", prompt="", tokens=4, temperature=0.8, seed=0)
    with pytest.raises(CheckpointError, match=r"world/a.*not finite"):
        evaluate.sound_theta(plan, plan.node("world/a"))
    assert np.isfinite(evaluate.sound_theta(plan, plan.node("world/b"))).all()


# ---- warnings ------------------------------------------------------------------------------------------------


def verdict(kind: str, seq: int, *, sender: str = "a") -> VerdictRecord:
    return a_verdict(seq, kind, sender=sender, bytes=1, detail="why")


def ended(state: RunState) -> str:
    state.apply(LifeRecord(node="world/a", now_s=9.0, event="finished"))
    return str(state.snapshot()["nodes"]["world/a"]["state"])


def test_the_first_refusal_of_a_kind_is_a_warning(endless: Any) -> None:
    state = RunState(KINDS, budget=endless)
    for seq, kind in enumerate(["accepted", "stale", "duplicate", "not_finite", "not_finite", "malformed"], 1):
        state.apply(verdict(kind, seq))
    assert [(each["node"], each["now_s"]) for each in state.warnings.kept] == [("world/a", 4.0), ("world/a", 6.0)]
    again = RunState(KINDS, budget=endless)
    again.restore(json.loads(json.dumps(state.snapshot())), [vars(verdict("not_finite", 4))])
    again.apply(verdict("not_finite", 7))
    assert again.warnings.kept == state.warnings.kept, "a run that is continued has said it before"


def test_a_client_has_diverged_until_an_update_is_accepted_again(endless: Any) -> None:
    state = RunState(KINDS, budget=endless)
    state.apply(verdict("not_finite", 1))
    assert ended(state) == "diverged"
    state.apply(verdict("accepted", 2))
    assert ended(state) == "finished"
    state.apply(verdict("not_finite", 3))
    again = RunState(KINDS, budget=endless)
    again.restore(state.snapshot(), [vars(verdict("not_finite", 3))])
    again.apply(verdict("accepted", 4))
    assert again.snapshot()["nodes"]["world/a"]["state"] == "finished"


def test_warnings_are_kept_once_and_not_without_end(endless: Any) -> None:
    state = RunState(KINDS, budget=endless)
    for number in range(WARNINGS + 5):
        for _ in range(2):
            state.apply(LifeRecord(node="world/a", now_s=1.0, event="warning", detail=f"trouble {number}"))
    assert len(state.warnings.kept) == WARNINGS
    console = Console(file=io.StringIO(), width=20)
    progress = Progress(console)
    for _ in range(3):
        progress.show(state.snapshot() | {"run": "r", "trouble": ""})
    assert written(console).count("WARNING world/a: trouble 7\n") == 1
    assert written(console).count("WARNING r: there are more warnings than are kept\n") == 1


# ---- numbers -------------------------------------------------------------------------------------------------


def test_measures_of_a_diverged_model_are_combined_without_an_error() -> None:
    sound = Measure(loss=1.0, perplexity_per_token=2.0, heldout_bytes=10)
    for bad in (
        Measure(loss=math.nan, perplexity_per_token=math.nan, heldout_bytes=10),
        Measure(loss=math.inf, perplexity_per_token=math.inf, heldout_bytes=10),
        Measure(loss=800.0, perplexity_per_token=math.inf, heldout_bytes=10),
    ):
        found = combine([sound, bad])
        assert found is not None
        assert found.heldout_bytes == 20
        assert not math.isfinite(found.perplexity_per_token or 0.0)
    assert perplexity(800.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_a_sample_that_fails_says_why() -> None:
    def broken() -> str:
        raise RuntimeError("line 1\nline 2")

    def left() -> str:
        raise Interrupted("left")

    assert sampled(lambda: "text").text == "text"
    with pytest.raises(Interrupted):
        sampled(left)
    assert sampled(broken).failure == "RuntimeError: line 1 line 2"


# ---- where a text begins -------------------------------------------------------------------------------------


class Recording:
    """Stands for a trainer: keeps the prompt that it was given."""

    def sample(self, prompt: Any, **_: Any) -> list[int]:
        self.prompt = [int(token) for token in prompt]
        return self.prompt


def begun(tokenizer: Tokenizer, prompt: str = "", **settings: Any) -> list[int]:
    trainer: Any = Recording()
    sample(trainer, tokenizer, prompt, tokens=1, **settings)
    return list(trainer.prompt)


def words(path: Path, vocabulary: list[str]) -> Tokenizer:
    """A tokenizer of words between spaces, without a token for anything else."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers

    made = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(path))
    return load_tokenizer(str(path))


def test_an_empty_prompt_begins_from_a_token_whatever_the_tokenizer(tmp_path: Path) -> None:
    assert begun(load_tokenizer("bytes")) == [10]
    tokenizer = words(tmp_path / "t.json", ["river", "stone"])
    assert begun(tokenizer, opening=np.array([1], np.uint16)) == [1], "a token of the client's own text"
    assert begun(tokenizer) == [0], "without a text, any token"
    assert begun(words(tmp_path / "u.json", ["river", "."])) == [1]


def test_a_prompt_without_a_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot encode 'mountain'"):
        begun(words(tmp_path / "t.json", ["river"]), "mountain")
    with pytest.raises(RunError, match="no token of the prompt '   '; give another prompt"):
        begun(words(tmp_path / "t.json", ["river"]), "   ")


def test_a_run_with_a_tokenizer_that_knows_no_line_break_ends(tiny: Tiny, tmp_path: Path) -> None:
    children = [client("a", tmp_path, 1)]
    text = (tmp_path / "a.txt").read_text()
    path = tmp_path / "t.json"
    words(path, sorted(set(text.replace(".", " ").split()) | {"."}))
    outcome = simulate(tiny(children, data={"cache_dir": str(tmp_path / "cache"), "tokenizer": str(path)}))
    assert outcome.samples["world/a"]
    assert outcome.summary["samples_failed"] == {}
