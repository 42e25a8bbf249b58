"""Text from a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldlm_ray.data import Tokenizer
from worldlm_ray.data.tokenizer import Tokens
from worldlm_ray.errors import DataError, RunError

OPENINGS = ("\n", ".", "a", "0")
"""An empty prompt becomes the first of these that is a token: not every tokenizer has a line break."""

SMALLEST_TEMPERATURE = 1e-200
"""At lower temperatures, logits divided by the temperature are not finite."""


class Sampler(Protocol):
    """A trainer with its model, or whatever else continues token ids."""

    def sample(self, prompt: npt.NDArray[np.int64], *, tokens: int, temperature: float, seed: int) -> list[int]:
        """Token ids that continue a prompt."""
        ...


def sample(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    opening: Tokens | None = None,
) -> str:
    """Continue a prompt.

    Args:
        sampler: holds the model.
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
    return tokenizer.decode(np.array(sampler.sample(ids, tokens=tokens, temperature=temperature, seed=seed)))


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
        ids.append(draw(logits, temperature=temperature, generator=generator))
    return ids[len(prompt) :]


def draw(logits_V: npt.NDArray[np.float64], *, temperature: float, generator: np.random.Generator) -> int:
    """Draw a token.

    Args:
        logits_V: finite logits, or log probabilities.
        temperature: 0, and what is too near it to divide by, takes the likeliest token.
        generator: of the draw.
    """
    if temperature < SMALLEST_TEMPERATURE:
        return int(logits_V.argmax())
    weights_V = np.exp((logits_V - logits_V.max()) / temperature)
    return int(generator.choice(weights_V.size, p=weights_V / weights_V.sum()))
