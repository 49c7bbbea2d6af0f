"""Small random transformers and a convolutional network, in float64, and what they answer."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["bert", "convolutions", "gpt2", "llama", "logits"]

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}


def llama() -> nn.Module:
    """Return a Llama with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**_SIZES, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).double().eval()


def bert() -> nn.Module:
    """Return a BERT classifier of three classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(**_SIZES, num_attention_heads=4, num_labels=3)
    return BertForSequenceClassification(config).double().eval()


def gpt2() -> nn.Module:
    """Return a GPT-2, whose layers store the transposed weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=16)
    return GPT2LMHeadModel(config).double().eval()


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(input_ids[:, None, None].to(self.first.weight.dtype)))
        answer: torch.Tensor = self.head(self.point(hidden).mean(dim=(2, 3)))
        return answer


def convolutions() -> nn.Module:
    """Return two convolutions and a linear head."""
    torch.manual_seed(0)
    return _Convolutions().double().eval()


def logits(model: nn.Module) -> torch.Tensor:
    """Return what a model answers to two fixed sequences."""
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        found = model(input_ids=ids)
    return found if isinstance(found, torch.Tensor) else found.logits
