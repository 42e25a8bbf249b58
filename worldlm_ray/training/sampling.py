"""Text from a model."""

from __future__ import annotations

import numpy as np
import torch

from worldlm_ray.data import Tokenizer
from worldlm_ray.model.decoder import Decoder


@torch.no_grad()
def sample(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue a prompt.

    Args:
        model: the decoder, on its device.
        tokenizer: the run's tokenizer.
        prompt: text to continue; empty starts from a line break.
        tokens: tokens to generate.
        temperature: 0 takes the likeliest token every time.
        seed: of the draws.

    Returns:
        The generated text, without the prompt.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = np.random.Generator(np.random.PCG64(seed))
    ids = [int(token) for token in tokenizer.encode(prompt or "\n")]
    first = len(ids)
    for _ in range(tokens):
        window_BT = torch.tensor([ids[-model.shape.context :]], device=device)
        logits = model(window_BT)[0, -1].double().cpu().numpy()
        if temperature <= 0.0:
            ids.append(int(logits.argmax()))
            continue
        weights = np.exp((logits - logits.max()) / temperature)
        ids.append(int(generator.choice(weights.size, p=weights / weights.sum())))
    return tokenizer.decode(np.array(ids[first:]))
