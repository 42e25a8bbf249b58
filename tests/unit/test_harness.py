"""lm-evaluation-harness on a node's model: its table, where the table is shown, and what is refused in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import worlds
from support.pretrained import save_pretrained, world
from typer.testing import CliRunner

from worldlm_ray.cli import main as cli
from worldlm_ray.errors import ConfigError, DataError, RunError, WorldLMError
from worldlm_ray.experiments import harness_results
from worldlm_ray.experiments.export import export
from worldlm_ray.experiments.harness import EXTRA, _named, _tasks, evaluate_tasks
from worldlm_ray.huggingface.card import TaskResult
from worldlm_ray.plan import build, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.storage import checkpoint

Tiny = Callable[..., Plan]
QUESTIONS = 8
pytestmark = pytest.mark.filterwarnings("ignore")


def task(folder: Path, name: str = "rivers", **changes: Any) -> Path:
    """A task of questions with two answers, on a local file."""
    lines = [
        {"question": f"the river {number} speaks of the", "answers": ["law", "mountain"], "right": number % 2}
        for number in range(QUESTIONS)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    made = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "right",
        "doc_to_choice": "answers",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(made | changes), encoding="utf-8")  # JSON is YAML
    return file


def a_run(folder: Path) -> Plan:
    """A run of adapters on a model with a tokenizer; its nodes are models that have been trained."""
    pytest.importorskip("peft")
    base = save_pretrained(folder / "base", vocab_size=300, bos_token_id=0, eos_token_id=0)
    worlds.tokenizer(base / "tokenizer.json")
    ends = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(ends), encoding="utf-8")
    plan = rundir.create(world(folder, base, trainable="lora"))
    simulate(plan)
    return plan


@pytest.mark.slow
def test_the_table_is_printed_and_kept_and_stands_on_the_card(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason=EXTRA)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    plan, file = a_run(tmp_path), task(tmp_path)
    run, whole = str(plan.run_dir), tmp_path / "whole"
    done = CliRunner().invoke(cli.app, ["evaluate", run, "--lm-eval", str(file), "--node", "a", "--limit", "6"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith("written to ")
    (kept,) = harness_results.of_run(plan)["world/a"]
    assert (kept.task, kept.metric, kept.n) == ("rivers", "acc", 6)
    shown = harness_results.cells(kept)
    assert all(cell in done.stdout for cell in shown)
    again = CliRunner().invoke(cli.app, ["evaluate", run, "--tokens", "64"])
    assert "lm-evaluation-harness" in again.stdout

    export(run, "a", whole, merge=True)
    assert f"| {' | '.join(shown)} |" in (whole / "README.md").read_text(encoding="utf-8")
    export(run, "world", tmp_path / "world", merge=True)
    assert "lm-evaluation-harness" not in (tmp_path / "world" / "README.md").read_text(encoding="utf-8")
    exported = CliRunner().invoke(cli.app, ["evaluate", str(whole), "--lm-eval", f"{file},", "--limit", "6", "--json"])
    assert exported.exit_code == 0, exported.output
    assert json.loads(exported.stdout) == {"node": "whole", "rows": [vars(kept)]}
    assert (whole / "lm_eval.json").is_file()


def test_a_model_that_was_trained_since_has_no_table(tiny: Tiny) -> None:
    plan = rundir.create(tiny())
    theta = build.initial(plan)
    checkpoint.save(checkpoint.folder(plan.run_dir, "world"), {}, {"theta": theta})
    first, second = row("one", 0.5), row("two", 0.25)
    sha = harness_results.params_sha256(theta)
    harness_results.write(plan.run_dir, "world", sha, [row("one", 0.1), second], version="1")
    harness_results.write(plan.run_dir, "world", sha, [first], version="1")
    harness_results.write(plan.run_dir, "world/gone", "other", [first], version="1")
    assert harness_results.of_run(plan) == {"world": [second, first]}
    checkpoint.save(checkpoint.folder(plan.run_dir, "world"), {}, {"theta": theta + np.float32(1.0)})
    assert harness_results.of_run(plan) == {}
    harness_results.write(plan.run_dir, "world", "new", [first], version="1")
    assert harness_results.read(plan.run_dir, "world", "new") == [first], "rows of the older model are gone"


def row(name: str, value: float) -> TaskResult:
    return TaskResult(task=name, metric="acc", value=value, stderr=None, n=8)


def test_numbers_of_the_harness_become_rows() -> None:
    values = {
        "alias": "t",
        "sample_len": 6,
        "acc,none": 0.5,
        "acc_stderr,none": 0.2,
        "exact_match,strict-match": np.float64(0.25),
        "exact_match_stderr,strict-match": "N/A",
        "bad,none": float("nan"),
    }
    found = harness_results.rows_of({"results": {"t": values}, "n-samples": {"t": {"original": 8, "effective": 6}}})
    assert found == [
        TaskResult(task="t", metric="acc", value=0.5, stderr=0.2, n=6),
        TaskResult(task="t", metric="exact_match (strict-match)", value=0.25, stderr=None, n=6),
    ]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"nodes": {"world": {"params_sha256": null, "rows": [{"task": 1}, 3]}}}']
)
def test_a_damaged_file_costs_its_rows_only(tmp_path: Path, text: str) -> None:
    (tmp_path / "lm_eval.json").write_text(text, encoding="utf-8")
    assert harness_results.read(tmp_path, "world", None) == []


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    with pytest.raises(ConfigError, match=r"lm-evaluation-harness is not installed; pip install 'worldlm_ray\[eval\]'"):
        _tasks("arc_easy")


def test_a_model_of_bytes_is_refused(tiny: Tiny) -> None:
    plan = rundir.create(tiny())
    with pytest.raises(ConfigError, match="reads bytes"):
        refused(str(plan.run_dir), "arc_easy")
    checkpoint.save(checkpoint.folder(plan.run_dir, "world"), {}, {"theta": build.initial(plan)})
    export(str(plan.run_dir), "world", plan.run_dir.parent / "out")
    with pytest.raises(ConfigError, match="reads bytes"):
        refused(str(plan.run_dir.parent / "out"), "arc_easy")


def test_an_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"an adapter without its base model; give the run, or .*--merge"):
        refused(str(tmp_path), "arc_easy")


def refused(place: str, tasks: str) -> None:
    evaluate_tasks(place, tasks, on_phase=lambda text: None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (" , ", "names no task"),
        ("./away.yaml", "there is no .*away.yaml"),
        ("./empty.yaml", ".*empty.yaml defines no task"),
    ],
)
def test_tasks_that_are_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    pytest.importorskip("lm_eval", reason=EXTRA)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("a: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"--lm-eval: {message}"):
        _tasks(given)


def test_an_unknown_task_is_refused_with_its_neighbours(tmp_path: Path) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason=EXTRA)
    task(tmp_path)
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert _named("riv*", manager) == ["rivers"]
    with pytest.raises(ConfigError, match="has no task 'river'; near to it are rivers"):
        _named("river", manager)


def test_a_folder_stands_for_all_its_tasks(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=EXTRA)
    task(tmp_path)
    task(tmp_path, "brooks")
    assert sorted(_tasks(f"{tmp_path}/")[0]) == ["brooks", "rivers"]
    assert _tasks(str(tmp_path / "brooks.yaml"))[0] == ["brooks"]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dataset_path": "someone/no-such-questions", "dataset_kwargs": {}}, DataError, "cannot be fetched"),
        ({"doc_to_text": "{{question"}, RunError, "lm-evaluation-harness failed"),
    ],
)
def test_a_task_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], kind: type[WorldLMError], message: str
) -> None:
    pytest.importorskip("lm_eval", reason=EXTRA)
    hub, data = pytest.importorskip("huggingface_hub"), pytest.importorskip("datasets")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(data.config, "HF_HUB_OFFLINE", True)
    plan = a_run(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        refused(str(plan.run_dir), str(task(tmp_path, **changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--node", "a"], "--node: says what lm-evaluation-harness measures; give --lm-eval, too"),
        (["--limit", "3"], "--limit: says what lm-evaluation-harness measures; give --lm-eval, too"),
        (["--lm-eval", "x", "--limit", "0"], "--limit"),
        (["--lm-eval", "x", "--council"], "--council: lm-evaluation-harness measures one model"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], message: str) -> None:
    error = CliRunner().invoke(cli.app, ["evaluate", "RUN", *options]).exception
    assert isinstance(error, ConfigError)
    assert message in str(error)
