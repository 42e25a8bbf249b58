"""Text from a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldlm_ray.data import Tokenizer
from worldlm_ray.training.trainer import Trainer


def sample(
    trainer: Trainer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue a prompt with a trainer's model.

    Args:
        trainer: holds the model.
        tokenizer: the run's.
        prompt: text to continue; empty starts from a line break.
        tokens: tokens to generate.
        temperature: 0 takes the likeliest token every time.
        seed: of the draws.

    Returns:
        The generated text, without the prompt.
    """
    ids = np.asarray(tokenizer.encode(prompt or "\n"), np.int64)
    return tokenizer.decode(np.array(trainer.sample(ids, tokens=tokens, temperature=temperature, seed=seed)))


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: npt.NDArray[np.int64],
    *,
    context: int,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[int]:
    """Continue a prompt.

    Args:
        model: token ids [1, T] to logits [1, T, V].
        prompt: token ids, at least one.
        context: tokens that the model sees at most.
        tokens: tokens to generate.
        temperature: 0 takes the likeliest token every time.
        seed: of the draws.
        device: where the model lies.

    Returns:
        The generated token ids, without the prompt.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    ids = [int(token) for token in prompt]
    for _ in range(tokens):
        window_BT = torch.tensor([ids[-context:]], device=device)
        logits = model(window_BT)[0, -1].double().cpu().numpy()
        if temperature <= 0.0:
            ids.append(int(logits.argmax()))
            continue
        weights = np.exp((logits - logits.max()) / temperature)
        ids.append(int(generator.choice(weights.size, p=weights / weights.sum())))
    return ids[len(prompt) :]
