"""Training speed of a plain client against a bare PyTorch loop on the same model, batches and optimizer settings."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch

from worldlm_ray.client.client import Client
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.exchange.messages import Model
from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.training.schedule import learning_rate

PAIRS, STEPS = 7, 30


def bare_loop(client: Client) -> Any:
    """What a user would write without us: a model, torch.optim.AdamW, clip, step."""
    assert isinstance(client.plan.shape, ModelShape)
    model = Decoder(client.plan.shape)
    settings = client.training
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        fused=True,
    )

    def train(round_: int) -> float:
        batches = client.dataset.batches(0, round_, steps=STEPS, batch_size=settings.batch_size, context=client.context)
        began = time.perf_counter()
        for step, (inputs, targets) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, (round_ + step / STEPS) / PAIRS)
            optimizer.zero_grad(set_to_none=True)
            model.loss(torch.from_numpy(inputs), torch.from_numpy(targets)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
        return time.perf_counter() - began

    return train


def run() -> dict[str, Any]:
    """Alternate the two, and take the ratio pair by pair."""
    rows = []
    for preset in ("nano", "micro"):
        with tempfile.TemporaryDirectory() as folder:
            raw = {
                "run_dir": folder,
                "merge": {"client": 1.0},  # one model per client
                "model": {"preset": preset},
                "budget": {"rounds": PAIRS + 1},
                "training": {"local_steps": STEPS},
                "world": {"children": [{"client": "a", "data": {"corpus": "python_stdlib"}}]},
            }
            plan = make_plan(from_mapping(raw))
            client = Client(plan, plan.root.clients[0])
            bare = bare_loop(client)
            model = Model(version=0, progress=0.0, finished=False, tokens=0.0, last_seq=0, values=build.initial(plan))
            tokens = client.round_tokens
            ours_s, bare_s = [], []
            for pair in range(PAIRS + 1):
                torch.set_num_threads(1)
                bare_s.append(bare(pair))
                client.begin(model, now_s=0.0)
                began = time.perf_counter()
                client.train()
                ours_s.append(time.perf_counter() - began)
            ratios = [b / o for b, o in zip(bare_s[1:], ours_s[1:], strict=True)]
            rows.append(
                {
                    "preset": preset,
                    "bare_tokens_per_s": tokens / statistics.median(bare_s[1:]),
                    "client_tokens_per_s": tokens / statistics.median(ours_s[1:]),
                    "ratio_median": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                }
            )
    print(f"{'preset':8} {'bare tok/s':>11} {'client tok/s':>13} {'ratio':>6}  (min to max of {PAIRS} pairs)")
    for row in rows:
        print(
            f"{row['preset']:8} {row['bare_tokens_per_s']:11,.0f} {row['client_tokens_per_s']:13,.0f} "
            f"{row['ratio_median']:6.3f}  ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
        )
    print("target: ratio >= 0.97")
    return {"rows": rows}
