"""Diagonal preconditioners P for projections: the identity, an optimizer's, or a Fisher diagonal.

Any positive P keeps the constraints exact; it only decides which feasible update is nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from orthomerge.errors import NumericalError, RecipeError
from orthomerge.unlearning.projection.scopes import local

__all__ = ["MetricName", "adam_metric", "fisher_metric", "has_momentum"]

MetricName = Literal["euclid", "adam", "fisher"]
FLOOR = 1e-2  # of a tensor's root mean square: entries never seen would get P = 1 / eps
_DAMPING = 1e-3  # of a tensor's mean Fisher value


def adam_metric(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor] | None:
    """Return ``p = 1 / (sqrt(v / (1 - beta2^t)) + eps)`` per parameter, flat, or None if cold.

    v is the second moment in the optimizer's state, the running maximum for AMSGrad. Roots below
    a hundredth of their tensor's root mean square are raised to it. A parameter without a state
    yet gets the identity, scaled to the others' mean; None means that no parameter has one.

    Raises:
        RecipeError: The optimizer keeps no usable second moment: it is not of Adam's kind, or
            stores it in 8 bits.
    """
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = [_root(optimizer, parameter, settings.get(id(parameter))) for parameter in parameters]
    known = [scale for scale in found if scale is not None]
    if not known:
        return None
    count = max(1, sum(scale.numel() for scale in known))
    mean = sum(float(scale.double().sum()) for scale in known) / count
    return [
        torch.full((local(p).numel(),), mean, device=local(p).device) if scale is None else scale
        for p, scale in zip(parameters, found, strict=True)
    ]


def _root(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, group: Mapping[str, Any] | None
) -> torch.Tensor | None:
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    if group is None or not state:
        return None
    # Paged 32-bit optimizers name the second moment state2.
    v = next((state[k] for k in ("max_exp_avg_sq", "exp_avg_sq", "state2") if k in state), None)
    if v is None or not v.is_floating_point() or v.shape != parameter.shape:
        raise RecipeError(
            "the metric 'adam' needs the optimizer's second moments",
            expected="exp_avg_sq (or a 32-bit state2) of the parameter's shape",
            found=f"{type(optimizer).__name__} with {', '.join(map(str, state)) or 'no state'}",
            remedy="Use the metric 'euclid'.",
        )
    beta2 = group["betas"][1]
    root = (local(v).reshape(-1).float() / (1 - beta2 ** float(state["step"]))).sqrt()
    floor = FLOOR * float(torch.linalg.vector_norm(root)) / max(1, root.numel()) ** 0.5
    scale: torch.Tensor = 1 / (
        root.clamp(min=floor) + max(group["eps"], torch.finfo(torch.float32).tiny)
    )
    return scale


def fisher_metric(
    fisher: Mapping[str, torch.Tensor] | None,
    names: Sequence[str],
    parameters: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Return ``p = 1 / (F + 0.001 mean(F))`` per parameter, flat; F of a tensor of zeros gives 1.

    Args:
        fisher: Non-negative diagonal (or local part of it) by parameter name.
        names: Names of the parameters.
        parameters: The parameters.

    Raises:
        RecipeError: There is no diagonal for a parameter, or its shape differs.
        NumericalError: A value is negative or not finite.
    """
    scales = []
    for name, parameter in zip(names, parameters, strict=True):
        F = None if fisher is None else fisher.get(name)
        own = local(parameter)
        if F is None or local(F).shape != own.shape:
            raise RecipeError(
                "the metric 'fisher' needs a diagonal for every protected parameter",
                tensor=name,
                expected=tuple(own.shape),
                found=None if F is None else tuple(F.shape),
            )
        diagonal = local(F).reshape(-1).to(own.device, torch.float32)
        if not bool((torch.isfinite(diagonal) & (diagonal >= 0)).all()):
            raise NumericalError("a Fisher value is negative or not finite", tensor=name)
        damping = _DAMPING * float(diagonal.mean()) if diagonal.numel() else 0.0
        scales.append(1 / (diagonal + damping) if damping > 0 else torch.ones_like(diagonal))
    return scales


def has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether past gradients take part in the optimizer's next step."""
    return any(
        group.get("momentum", 0) or (group.get("betas") or (0,))[0]
        for group in optimizer.param_groups
    )
