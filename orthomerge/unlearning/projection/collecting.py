"""Collect retain gradients over a window, and keep the order of a window's steps.

What is done with the rows is in projector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from orthomerge.errors import OrthoMergeError, RecipeError, UnknownNameError, combined
from orthomerge.unlearning.projection.bank import Bank, BankGroup
from orthomerge.unlearning.projection.capturing import Backward, gradients_of
from orthomerge.unlearning.projection.guarding import Attachment
from orthomerge.unlearning.projection.products import average_
from orthomerge.unlearning.projection.scopes import find_scope, local
from orthomerge.unlearning.projection.settings import ProjectionSettings
from orthomerge.unlearning.projection.window import Window

__all__ = ["RowCollector"]


class RowCollector:
    """A window's retain gradients, by whichever way they come; the base of the projector.

    A window is open while rows are collected, then projected, then stepped.

    Args:
        params_or_model: See ``RetainProjector``; the others too.
        scope: Regular expression of the names to protect.
        scaler: The GradScaler of fp16 training.
        process_group: Processes of data-parallel or sharded training.
        sharded: Whether every process holds a part of each parameter.
        settings: Keyword arguments of ``ProjectionSettings``.
    """

    def __init__(
        self,
        params_or_model: nn.Module | Iterable[nn.Parameter] | Mapping[str, nn.Parameter],
        scope: str | None,
        scaler: Any | None,
        process_group: Any | None,
        sharded: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self.settings = _checked(settings)
        self.scope = find_scope(params_or_model, scope, self.settings.granularity)
        if sharded and process_group is None:
            process_group = torch.distributed.group.WORLD
        self.scaler = scaler
        self._group = process_group
        self._averaging = None if sharded else process_group
        self.window = Window(self.scope, self.settings, process_group if sharded else None)
        self._bank: Bank | None = None
        self._attachments: list[Attachment] = []
        self._rise: torch.Tensor | float = 0.0
        self._restart()

    @property
    def attached(self) -> bool:
        """Return whether hooks of this projector are on an optimizer."""
        return any(attachment.attached for attachment in self._attachments)

    @property
    def stepped(self) -> bool:
        """Return whether the guarded optimizer has stepped in this window."""
        return self._state == "stepped"

    @property
    def alone(self) -> bool:
        """Return whether gradients are taken to be complete on this process."""
        return self._group is None

    @property
    def sharded(self) -> bool:
        """Return whether every process is taken to hold a part of each parameter."""
        return self._group is not None and self._averaging is None

    def update(
        self,
        loss: torch.Tensor,
        weight: float = 1.0,
        *,
        start_loss: torch.Tensor | float | None = None,
        backward: Backward | None = None,
    ) -> None:
        """Add ``weight`` times the gradient of a retain (micro-)loss to the window's row.

        The forget gradient in ``.grad`` is set aside meanwhile and not touched.

        Args:
            loss: Scalar with a graph; freed by the backward pass.
            weight: Share of the window, e.g. 1 / micro-batches, or tokens / tokens in the window.
            start_loss: The same batch's loss in the starting model. It switches the restore rule
                on: stage B asks for ``R^T Delta <= -restore * max(0, sum w (L - L_start))``.
            backward: What to call in place of ``loss.backward()``, e.g. ``accelerator.backward``.

        Raises:
            RecipeError: The window was projected already.
        """
        self._open()
        run = self._backward(backward)
        gradients = gradients_of(loss * weight, self.scope.trained, run)
        self.window.add(gradients, 1 / self._scale())
        if start_loss is not None:
            self._rise = self._rise + weight * (loss.detach().double() - start_loss)

    def update_from_grads(self, weight: float = 1.0) -> None:
        """Take ``weight`` times the current ``.grad`` as retain gradient, and set it to None."""
        self._open()
        self.window.add([p.grad for p in self.scope.trained], weight / self._scale())
        for parameter in self.scope.trained:
            parameter.grad = None

    def add_rows(
        self, losses: Iterable[torch.Tensor] | torch.Tensor, *, backward: Backward | None = None
    ) -> None:
        """Protect rows of their own in this window: samples, anchors, outputs.

        Losses in a list or a tensor [m] may share one graph; of any other iterable each loss is
        differentiated before the next is asked for.
        """
        self._open()
        shared = isinstance(losses, torch.Tensor | list | tuple)
        items = list(losses) if shared else losses
        backward = self._backward(backward)
        for number, loss in enumerate(items):
            retained = shared and number + 1 < len(items)  # type: ignore[arg-type]

            def run(loss: torch.Tensor, keep: bool = retained) -> None:
                backward(loss, **({"retain_graph": True} if keep else {}))

            self.window.add_extra(gradients_of(loss, self.scope.trained, run), 1 / self._scale())

    def set_bank(self, groups: Sequence[BankGroup], *, backward: Backward | None = None) -> None:
        """Give the bank's groups of retain rows; ``project_`` computes their gradients.

        Args:
            groups: Callables yielding (loss, weight) of micro-batches; the gradient of a group's
                weighted mean is one row. They should cover as much of the retain set as
                affordable.
            backward: What to call in place of ``loss.backward()``.

        Raises:
            RecipeError: There are more groups than ``bank_size``, or rows exclude the bank.
        """
        if "bank" not in self.settings.rows or len(groups) > self.settings.bank_size:
            raise RecipeError(
                "the bank does not fit the projector's settings",
                expected=f"'bank' among the rows, at most {self.settings.bank_size} groups",
                found=f"rows {tuple(self.settings.rows)}, {len(groups)} groups",
            )

        def gradients(loss: torch.Tensor) -> list[torch.Tensor | None]:
            found = gradients_of(loss, self.scope.trained, self._backward(backward))
            return found[: len(self.scope.parameters)]

        bank = Bank(groups, self.settings.refresh_every, gradients)
        self.window.make_room_for(bank)
        self._bank = bank

    def end_window(self) -> None:
        """End the window: its row joins the history, and new rows may be collected."""
        if self._state in ("projected", "stepped") and self._bank is not None:
            self._bank.age = None if self._bank.age is None else self._bank.age + 1
        self.window.close()
        self._restart()

    def _restart(self) -> None:
        self._state = "open"
        self._retain_weight = 0.0
        self._rise = 0.0

    def _open(self) -> None:
        """Start the next window if the last one has stepped, or refuse rows that come too late."""
        if self._state == "stepped" or (self._state == "projected" and self.attached):
            self.end_window()
        if self._state == "projected":
            raise RecipeError(
                "the window was projected already",
                remedy="Call end_window() after the optimizer's step.",
            )

    def _ready(self, retain_weight: float) -> None:
        """Refuse a projection without the rows it needs, or a second one."""
        if self._state != "open":
            raise RecipeError(
                "the window was projected already",
                remedy="project_ is called once per window, after its last row.",
            )
        protecting = self.settings.before_step or self.settings.after_step
        needs_batch = retain_weight != 0 or (protecting and "batch" in self.settings.rows)
        if needs_batch and not self.window.filled:
            raise RecipeError(
                "the window has no retain gradient",
                remedy="Call update() for its retain losses before project_().",
            )
        banked = self._bank is not None
        if protecting and not banked and not any(self.window.kinds().values()):
            raise RecipeError(
                "the window has no row to protect", expected=" or ".join(self.settings.rows)
            )

    def _refresh(self) -> bool:
        """Compute the bank's rows if they are due; return whether they were."""
        if self._bank is None or not self._bank.due:
            return False
        slots, rows = self.window.bank, self.window.rows
        self._bank.refresh(rows, slots, self._scale())
        for slot in slots:
            average_(rows.flats(slot), self._averaging)
        return True

    def _average(self) -> None:
        """Average the window's rows and the gradients over data-parallel processes."""
        if self._averaging is None:
            return
        slots = [self.window.batch, *self.window.extra]
        tensors = [flat for slot in slots for flat in self.window.rows.flats(slot)]
        if self.window.outside is not None:
            tensors += self.window.outside.flats(0)
        for slot in slots:
            self.window.rows.touched(slot)
        gradients = _present(self.scope.trained, self._averaging)
        average_([*tensors, *gradients], self._averaging)

    def _leave_out(self) -> None:
        """Make the optimizer do nothing in this window.

        Without gradients an optimizer skips a parameter altogether, moments and decay included.
        A GradScaler needs to see an infinite gradient to skip the step and lower its scale.
        """
        for parameter in self.scope.trained:
            if self.scaler is None:
                parameter.grad = None
            elif parameter.grad is not None:
                local(parameter.grad).fill_(float("inf"))

    def _backward(self, backward: Backward | None) -> Backward:
        """Return the given backward, or the scaler's scaled one, or the plain one."""
        if backward is not None:
            return backward
        if self.scaler is None:
            return torch.autograd.backward
        scaler = self.scaler
        return lambda loss, **options: torch.autograd.backward(scaler.scale(loss), **options)

    def _scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())


def _present(parameters: Sequence[torch.Tensor], group: Any) -> list[torch.Tensor]:
    """Return the gradients that some process has; where another one has none it gets zeros."""
    found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float64)
    found = found.to(parameters[0].device)
    average_([found], group)
    present = [p for p, there in zip(parameters, found.tolist(), strict=True) if there]
    for parameter in present:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [local(parameter.grad) for parameter in present if parameter.grad is not None]


def _checked(settings: Mapping[str, Any]) -> ProjectionSettings:
    """Return the settings, refusing unknown names with the nearest known one."""
    known = ProjectionSettings.__dataclass_fields__
    unknown: list[OrthoMergeError] = [
        UnknownNameError("setting", name, known) for name in settings if name not in known
    ]
    if unknown:
        raise combined(unknown)
    return ProjectionSettings(**settings)
