"""Whether torch can compute on a device, asked before anything is started."""

from __future__ import annotations

import torch

from orthomerge.errors import BudgetError

__all__ = ["require_device"]


def require_device(name: str) -> None:
    """Refuse a device that torch does not see on this machine.

    Raises:
        BudgetError: There is no such device.

    >>> require_device("cpu")
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown; or known, but not on this machine
        raise BudgetError(
            "there is no such device here",
            expected="cpu, cuda or cuda:N",
            found=name,
            remedy="Leave --device out to compute on the CPU.",
        ) from error
