"""What a projector will hold in memory, and what to change when that is too much.

Counts bytes from shapes; nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from orthomerge.errors import BudgetError
from orthomerge.unlearning.projection.scopes import find_scope, local
from orthomerge.unlearning.projection.settings import ProjectionSettings

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a projector needs on this process, beside the training itself.

    Attributes:
        parameters: Protected entries N.
        rows: Rows k that are stored.
        row_bytes: Memory of all rows, and of the retain gradient outside the scope.
        snapshot_bytes: Copies of the parameters for stage B.
        gradient_bytes: The retain gradient while it is computed, beside the forget gradient.
        working_bytes: Largest temporary of the algebra: a few vectors of the longest tensor.
        on_host: Bytes of these that are kept in host memory.
        settings: The settings planned for; ``fitting`` may have changed them.
    """

    parameters: int
    rows: int
    row_bytes: int
    snapshot_bytes: int
    gradient_bytes: int
    working_bytes: int
    on_host: int
    settings: ProjectionSettings

    @property
    def device_bytes(self) -> int:
        """Memory beside the parameters, on their device."""
        total = self.row_bytes + self.snapshot_bytes + self.gradient_bytes + self.working_bytes
        return total - self.on_host

    def as_dict(self) -> dict[str, int]:
        """Return the counts, ready for JSON."""
        return {
            "parameters": self.parameters,
            "rows": self.rows,
            "row_bytes": self.row_bytes,
            "snapshot_bytes": self.snapshot_bytes,
            "gradient_bytes": self.gradient_bytes,
            "working_bytes": self.working_bytes,
            "on_host": self.on_host,
            "device_bytes": self.device_bytes,
        }


def plan_memory(
    params: nn.Module | Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
    settings: ProjectionSettings | None = None,
    *,
    scope: str | None = None,
    bank: int | None = None,
    extra: int = 0,
    free_bytes: int | None = None,
    host_bytes: int | None = None,
) -> MemoryPlan:
    """Count what a projector with these settings needs, and refuse what does not fit.

    ``k N`` entries of rows, N of parameters copied for stage B, N of the retain gradient, and the
    longest tensor a few times.

    Args:
        params: See ``RetainProjector``.
        settings: The settings; the defaults if None.
        scope: See ``RetainProjector``.
        bank: Rows of the bank; ``bank_size`` if the settings have a bank and this is None.
        extra: Rows that ``add_rows`` will give.
        free_bytes: Free memory where the parameters are. If the settings do not fit, rows in
            bfloat16 and rows in host memory are tried in the text of the refusal, not silently.
        host_bytes: Free memory of the host, for rows kept there.

    Raises:
        BudgetError: It does not fit; says how much is needed and which changes would fit.
    """
    settings = settings or ProjectionSettings()
    plan = _plan(params, settings, scope, bank, extra)
    problem = _excess(plan, free_bytes, host_bytes)
    if problem is None:
        return plan
    ways = []
    for name, change in _CHANGES.items():
        other = _plan(params, replace(settings, **change), scope, bank, extra)
        if _excess(other, free_bytes, host_bytes) is None:
            ways.append(f"{name} ({_gigabytes(other.device_bytes)} beside the parameters)")
    remedy = "These would fit: " + "; ".join(ways) if ways else "Narrow the scope to fewer tensors"
    raise BudgetError(
        f"{plan.rows} rows of {plan.parameters} entries do not fit",
        expected=f"at most {_gigabytes(problem[1])}",
        found=f"{_gigabytes(problem[0])} needed on the {problem[2]}",
        remedy=f"{remedy}.",
    )


_CHANGES: dict[str, dict[str, Any]] = {
    "row_dtype bfloat16, with residuals of about 1e-3": {
        "row_dtype": torch.bfloat16,
        "rtol": 1e-3,
    },
    "row_device 'cpu', which brings every block over when it is used": {"row_device": "cpu"},
    "rows ('batch',) alone": {"rows": ("batch",), "history": 0},
    "rows ('batch',) alone on row_device 'cpu'": {
        "rows": ("batch",),
        "history": 0,
        "row_device": "cpu",
    },
}


def _plan(
    params: nn.Module | Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
    settings: ProjectionSettings,
    scope: str | None,
    bank: int | None,
    extra: int,
) -> MemoryPlan:
    found = find_scope(params, scope)
    own = [local(parameter) for parameter in found.parameters]
    outside = sum(local(parameter).numel() for parameter in found.outside)
    count = sum(tensor.numel() for tensor in own)
    banked = (settings.bank_size if bank is None else bank) if "bank" in settings.rows else 0
    rows = 1 + settings.history + (settings.row_ema is not None) + banked + extra
    stored = (rows * count + outside) * settings.row_dtype.itemsize
    size = sum(tensor.numel() * tensor.element_size() for tensor in own)
    others = sum(local(p).numel() * local(p).element_size() for p in found.outside)
    longest = max((tensor.numel() for tensor in own), default=0)
    moved = settings.row_device != "param"
    working = 4 * longest * (3 + (rows if moved else 0))
    return MemoryPlan(
        parameters=count,
        rows=rows,
        row_bytes=stored,
        snapshot_bytes=size if settings.after_step else 0,
        gradient_bytes=size + others,
        working_bytes=working,
        on_host=stored if moved else 0,
        settings=settings,
    )


def _excess(
    plan: MemoryPlan, free_bytes: int | None, host_bytes: int | None
) -> tuple[int, int, str] | None:
    """Return needed and free bytes and the place where they do not fit, or None."""
    if free_bytes is not None and plan.device_bytes > free_bytes:
        return plan.device_bytes, free_bytes, "parameters' device"
    if host_bytes is not None and plan.on_host > host_bytes:
        return plan.on_host, host_bytes, "host"
    return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
