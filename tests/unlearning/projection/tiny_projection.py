"""Small problems for the projection tests: a tiny transformer, random gradients, plain oracles."""

from __future__ import annotations

import math

import torch
from torch import nn


class TinyTransformer(nn.Module):
    """One causal block with tied embeddings, about five thousand parameters."""

    def __init__(self, vocabulary: int = 17, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(0.3 * torch.randn(12, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        x = x + self.out(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v)
        return self.head(x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x)))))


def nll(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss."""
    logits = model(tokens)[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch(seed: int, rows: int = 6, length: int = 9, vocabulary: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


def flat(tensors) -> torch.Tensor:
    """All tensors as one float64 vector; the oracle's view of a gradient."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def gradient(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Gradient over all trained parameters by autograd.grad, as one float64 vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return flat(
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    )


def values(model: nn.Module) -> torch.Tensor:
    return flat(p for p in model.parameters() if p.requires_grad)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))
