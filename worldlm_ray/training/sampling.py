"""Text from a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldlm_ray.data import Tokenizer
from worldlm_ray.data.tokenizer import Tokens
from worldlm_ray.errors import DataError, RunError
from worldlm_ray.training.trainer import Trainer

OPENINGS = ("\n", ".", "a", "0")
"""An empty prompt becomes the first of these that is a token: not every tokenizer has a line break."""

SMALLEST_TEMPERATURE = 1e-200
"""At lower temperatures, logits divided by the temperature are not finite."""


def sample(
    trainer: Trainer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    opening: Tokens | None = None,
) -> str:
    """Continue a prompt with a trainer's model.

    Args:
        trainer: holds the model.
        tokenizer: the run's.
        prompt: text to continue. If empty, a line break, or another token if that is none.
        tokens: tokens to generate.
        temperature: 0, and what is too near it to divide by, takes the likeliest token every time.
        seed: of the draws.
        opening: token ids to start from if the prompt is empty and a line break is no token.

    Returns:
        The generated text, without the prompt.

    Raises:
        RunError: the prompt holds no token, or the model has diverged.
    """
    ids = np.asarray(tokenizer.encode(prompt) if prompt else _opening(tokenizer, opening), np.int64)
    if not ids.size:
        raise RunError(f"the tokenizer makes no token of the prompt {prompt!r}; give another prompt")
    return tokenizer.decode(np.array(trainer.sample(ids, tokens=tokens, temperature=temperature, seed=seed)))


def _opening(tokenizer: Tokenizer, opening: Tokens | None) -> Tokens:
    """Token ids to start from without a prompt: at least one."""
    for text in OPENINGS:
        with suppress(DataError):  # not every tokenizer has an unknown token
            if (ids := tokenizer.encode(text)).size:
                return ids
        if opening is not None and opening.size:
            return opening
    return np.flatnonzero(tokenizer.token_bytes)[:1].astype(tokenizer.dtype)


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
        temperature: 0, and what is too near it to divide by, takes the likeliest token every time.
        seed: of the draws.
        device: of the model.

    Returns:
        The generated token ids, without the prompt.

    Raises:
        RunError: the model has diverged: its logits are not finite.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    ids = [int(token) for token in prompt]
    for _ in range(tokens):
        window_BT = torch.tensor([ids[-context:]], device=device)
        logits = model(window_BT)[0, -1].double().cpu().numpy()
        if not np.isfinite(logits).all():
            raise RunError("the model has diverged: its logits are not finite; lower training.lr")
        if temperature < SMALLEST_TEMPERATURE:
            ids.append(int(logits.argmax()))
            continue
        weights = np.exp((logits - logits.max()) / temperature)
        ids.append(int(generator.choice(weights.size, p=weights / weights.sum())))
    return ids[len(prompt) :]
