"""One model, copied, optionally scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthomerge.merging.registry import merge_method
from orthomerge.merging.spaces import Space

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.linalg.factors import Factors

__all__ = ["passthrough"]


def _of_factors(factors: Sequence[Factors], *, scale: float) -> Factors:
    return factors[0].scaled(scale)


@merge_method(
    "passthrough",
    space=Space.WEIGHT,
    reference="mergekit's method of this name",
    max_models=1,
    laws=("identity", "idempotent", "permutation", "scale-equivariance"),
    factors=_of_factors,
    batched=True,
)
def passthrough(tensors: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    """Copy one model: to convert its dtype, reshard it, or scale chosen tensors.

    ``W = λ W_1``; of a LoRA adapter without its base ``D = λ D_1``.

    Args:
        tensors: W_1 alone.
        scale: λ.

    Returns:
        The scaled weight.

    Example:
        >>> import torch
        >>> passthrough([torch.ones(2)], scale=2.0)
        tensor([2., 2.])
    """
    return tensors[0] * scale
