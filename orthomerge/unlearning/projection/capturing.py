"""Run a backward pass whose gradients do not mix with those already there.

Gradients go through ``.grad`` and ``.backward()``, so that sharded parameters, gradient
checkpointing and scaled losses work as in any training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

__all__ = ["captured_gradients", "gradients_of"]

Backward = Callable[..., object]


@contextmanager
def captured_gradients(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Set ``.grad`` aside for the block, in which it starts as None, and put it back.

    Only pointers are swapped; read the block's own gradients before it ends.
    """
    saved = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, saved, strict=True):
            parameter.grad = gradient


def gradients_of(
    loss: torch.Tensor, parameters: Sequence[torch.Tensor], backward: Backward | None = None
) -> list[torch.Tensor | None]:
    """Return the gradients of a loss; None for parameters that took no part.

    >>> w = torch.ones(2, requires_grad=True)
    >>> gradients_of((3 * w).sum(), [w])[0].tolist(), w.grad
    ([3.0, 3.0], None)
    """
    with captured_gradients(parameters):
        if backward is None:
            torch.autograd.backward(loss)
        else:
            backward(loss)
        return [parameter.grad for parameter in parameters]
