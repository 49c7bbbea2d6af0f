"""Several processes that train one model together: what they must agree on.

Each holds the whole model (data parallel) and other batches of every optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

__all__ = ["Processes"]


class Processes:
    """The processes of an accelerator.

    Args:
        accelerator: Knows them.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """Return the means of numbers over the processes, the same on all of them."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self._accelerator.device)
        found: list[float] = self._accelerator.reduce(own, reduction="mean").tolist()
        return found

    def any(self, fact: bool) -> bool:
        """Return whether something holds on one of them, so that all stop together."""
        return self.mean([float(fact)])[0] > 0

    def first(self, value: Any) -> Any:
        """Return what the first process has, so that all decide the same."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average ``.grad`` of parameters over the processes."""
        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad.div_(self._accelerator.num_processes)
