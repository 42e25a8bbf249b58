"""Runs the steps in order of worth and writes results.json and table.md after each of them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import ROWS, Rows, read

MODEL, TEXT = "WORLDLM_GPU_MODEL", "WORLDLM_GPU_TEXT"
"""Environment variables that tell a step the folders of --model and --text."""


@dataclass(frozen=True)
class Step:
    """A part of the run."""

    name: str
    """Module of this package that has `measure(rows, toy)`."""
    minutes: float
    """Its time limit."""
    wants_model: bool = False
    """Whether it needs a pre-trained model and text."""


STEPS = (
    Step("correctness", 2.0),
    Step("speed", 4.5),
    Step("zero", 2.0),
    Step("privacy", 1.5),
    Step("exchange", 1.5),
    Step("quality", 4.0),
    Step("small_clients", 1.0),
    Step("adapters", 6.0, wants_model=True),
)
SPARE_S = 5.0
"""Kept for writing the table when the time is up."""
DRY_RUN_S = 200.0
"""Time limit of a step at toy size."""


def main(arguments: list[str]) -> int:
    """Run what was asked for; returns the exit code: 1 where a step failed or missed a target that is not a speed."""
    options = _parsed(arguments)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.step is not None:
        import_module(f"benchmarks.gpu.{options.step}").measure(Rows(out / f"{options.step}.jsonl"), options.dry_run)
        return 0
    facts = _facts(options.dry_run)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    until = time.monotonic() + 60.0 * options.minutes
    found: dict[str, dict[str, Any]] = {}
    os.environ |= {MODEL: str(Path(options.model).absolute()), TEXT: str(Path(options.text).absolute())}
    wanted = options.only.split(",") if options.only else [step.name for step in STEPS]
    for step in (step for step in STEPS if step.name in wanted):
        limit_s = DRY_RUN_S if options.dry_run else 60.0 * step.minutes
        if step.wants_model and not (options.dry_run or (options.model and options.text)):
            found[step.name] = {"state": "left out", "why": "give --model and --text", "seconds": 0.0, "rows": []}
        else:
            found[step.name] = _run(step, out, min(limit_s, until - SPARE_S - time.monotonic()), options.dry_run)
        result = {"facts": facts, "steps": found}
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / "table.md").write_text(table(result), encoding="utf-8")
    print(table({"facts": facts, "steps": found}))
    print(f"written to {out}: results.json, table.md")
    return int(any(step["state"] in ("failed", "cut off") or _is_wrong(step["rows"]) for step in found.values()))


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=14.0, help="time for everything")
    parser.add_argument("--out", default="benchmarks/out/gpu", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="all of it on the CPU, at toy size")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", default="", help=f"steps, with commas; of {', '.join(names)}")
    parser.add_argument("--model", default="", help="folder of a pre-trained model, for the step adapters")
    parser.add_argument("--text", default="", help="folder of text files, for the step adapters")
    parser.add_argument("--step", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in filter(None, options.only.split(",")):
        if name not in names:
            parser.error(f"--only: there is no step {name!r}; there are {', '.join(names)}")
    return options


def _run(step: Step, out: Path, limit_s: float, dry_run: bool) -> dict[str, Any]:
    """One step in its own process group, which ends with it."""
    rows = out / f"{step.name}{ROWS}"
    rows.unlink(missing_ok=True)
    if limit_s <= 1.0:
        return {"state": "no time left", "why": "", "seconds": 0.0, "rows": []}
    print(f"{step.name}: at most {limit_s:.0f} s", flush=True)
    command = [sys.executable, "-m", "benchmarks", "gpu", "--step", step.name, "--out", str(out)]
    began, log = time.monotonic(), out / f"{step.name}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command + ["--dry-run"] * dry_run, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - began
    state = {0: "done", None: "cut off"}.get(code, "failed")
    why = f"after {limit_s:.0f} s" if code is None else _last_line(log) if code else ""
    print(f"{step.name}: {state} in {seconds:.0f} s {why}", flush=True)
    return {"state": state, "why": why, "seconds": round(seconds, 1), "rows": read(rows)}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no output"


def _is_wrong(rows: list[dict[str, Any]]) -> bool:
    """Whether a row says that something is computed wrongly; a speed that is missed is no error."""
    return any(row["must"] and row["met"] is False for row in rows)


def _facts(dry_run: bool) -> dict[str, str]:
    """Card, versions, date and commit."""
    import torch

    cuda = torch.cuda.is_available() and not dry_run
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "card": torch.cuda.get_device_name() if cuda else "CPU, toy sizes",
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda or "none"),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
    }


def table(result: dict[str, Any]) -> str:
    """All rows as Markdown."""
    lines = [", ".join(f"{name} {value}" for name, value in result["facts"].items()), ""]
    lines += ["| step | what | value | target | met |", "|---|---|---|---|---|"]
    for name, step in result["steps"].items():
        for row in step["rows"]:
            met = {True: "yes", False: "**no**", None: ""}[row["met"]]
            lines.append(f"| {name} | {row['what']} | {row['value']:.4g} {row['unit']} | {row['target']} | {met} |")
        if step["state"] != "done":
            lines.append(f"| {name} | *{step['state']}* {step['why']} | | | |")
    return "\n".join(lines) + "\n"
