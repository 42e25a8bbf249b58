"""A Llama-shaped decoder (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, untied head.

Shape suffixes: B batch, T time, C hidden width, H heads, D head width, V vocabulary.
Module names give the parameter names of Hugging Face's LlamaForCausalLM, so that export is a file format.
Only plain nn.Linear, nn.Embedding and nn.RMSNorm hold parameters: per-sample gradients work on all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from worldlm_ray.model.shape import ModelShape
from worldlm_ray.tensors.targets import IGNORED


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864), in Hugging Face's half-split arrangement."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        # The device is explicit, so that these exist even if the parameters are built on "meta".
        half = torch.arange(0, shape.head_size, 2, dtype=torch.float32, device="cpu") / shape.head_size
        positions = torch.arange(shape.context, dtype=torch.float32, device="cpu")
        angles_TD = torch.outer(positions, shape.rope_theta**-half)
        angles_TD = torch.cat([angles_TD, angles_TD], dim=-1)
        self.register_buffer("cos_TD", angles_TD.cos(), persistent=False)
        self.register_buffer("sin_TD", angles_TD.sin(), persistent=False)

    def forward(self, x_BHTD: Tensor) -> Tensor:
        """Rotate queries or keys by their position."""
        time = x_BHTD.shape[-2]
        cos_TD, sin_TD = self.cos_TD[:time].to(x_BHTD.dtype), self.sin_TD[:time].to(x_BHTD.dtype)  # type: ignore[index]
        first, second = x_BHTD.chunk(2, dim=-1)
        return x_BHTD * cos_TD + torch.cat([-second, first], dim=-1) * sin_TD


class SelfAttention(nn.Module):
    """Causal self-attention with grouped keys and values."""

    def __init__(self, shape: ModelShape, rotary: Rotary) -> None:
        super().__init__()
        width, kv = shape.hidden_size, shape.kv_heads * shape.head_size
        self.head_size = shape.head_size
        self.grouped = shape.kv_heads != shape.heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv, bias=False)
        self.v_proj = nn.Linear(width, kv, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        # In a list, so that the one rotary of the model is not registered again in every block.
        self._rotary = [rotary]

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Attend over the sequence so far; [B, T, C] to [B, T, C]."""
        batch, time, width = x_BTC.shape
        rotary = self._rotary[0]

        def heads(y_BTC: Tensor) -> Tensor:
            return y_BTC.view(batch, time, -1, self.head_size).transpose(1, 2)

        q_BHTD = rotary(heads(self.q_proj(x_BTC)))
        k_BHTD = rotary(heads(self.k_proj(x_BTC)))
        v_BHTD = heads(self.v_proj(x_BTC))
        y_BHTD = functional.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, is_causal=True, enable_gqa=self.grouped
        )
        y_BTC: Tensor = self.o_proj(y_BHTD.transpose(1, 2).reshape(batch, time, width))
        return y_BTC


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Position-wise; [B, T, C] to [B, T, C]."""
        y_BTC: Tensor = self.down_proj(functional.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))
        return y_BTC


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, shape: ModelShape, rotary: Rotary) -> None:
        super().__init__()
        self.self_attn = SelfAttention(shape, rotary)
        self.mlp = FeedForward(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC))
        y_BTC: Tensor = x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))
        return y_BTC


class Trunk(nn.Module):
    """The decoder without its head, which Hugging Face calls `model`."""

    def __init__(self, shape: ModelShape, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.rotary = Rotary(shape)
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, self.rotary) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token ids [B, T] to hidden states [B, T, C]."""
        x_BTC = self.embed_tokens(tokens_BT)
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                # Re-entrant: the other kind compares tensors that ZeRO stage 3 has released since.
                x_BTC = checkpoint(block, x_BTC, use_reentrant=True)
            else:
                x_BTC = block(x_BTC)
        y_BTC: Tensor = self.norm(x_BTC)
        return y_BTC


class Decoder(nn.Module):
    """The language model: token ids [B, T] to logits [B, T, V], T at most `shape.context`.

    Args:
        shape: sizes.
        recompute: compute the blocks' activations again in the backward pass instead of keeping them.
    """

    def __init__(self, shape: ModelShape, *, recompute: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape, recompute=recompute)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    @property
    def root(self) -> nn.Module:
        """The module whose parameters have the layout's names."""
        return self

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        logits_BTV: Tensor = self.lm_head(self.model(tokens_BT))
        return logits_BTV

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats: the mean per counted target, the sum, or one number per target."""
        return cross_entropy(self(tokens_BT), targets_BT, reduction=reduction)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, computed in fp32: the mean per counted target, the sum, or one number per target.

    An ignored target adds 0. A mean of no counted target is 0.
    """
    logits, targets = logits_BTV.float().flatten(0, 1), targets_BT.flatten()
    if reduction == "mean":
        total = functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
        return total / (targets != IGNORED).sum().clamp(min=1)
    return functional.cross_entropy(logits, targets, reduction=reduction, ignore_index=IGNORED)
