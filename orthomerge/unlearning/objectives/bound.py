"""An objective with its settings: it runs the model, the reference and the pure functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthomerge.errors import RecipeError
from orthomerge.unlearning.objectives import scores
from orthomerge.unlearning.objectives.distances import hidden_distance, kl_from_reference
from orthomerge.unlearning.objectives.dual import Dual
from orthomerge.unlearning.objectives.forwards import forward_hidden, forward_logits
from orthomerge.unlearning.objectives.registry import RETAIN_LOSSES, Need, ObjectiveInfo

if TYPE_CHECKING:
    from orthomerge.unlearning.objectives.reference import Reference

__all__ = ["Components", "Objective"]

Batch = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Components:
    """The parts of ``γ L_forget + α L_retain``, kept apart for the projection.

    Attributes:
        forget: L_forget, a scalar to minimise.
        retain: L_retain, or None where there is none.
        forget_weight: γ.
        retain_weight: α.
    """

    forget: Tensor
    retain: Tensor | None
    forget_weight: float
    retain_weight: float


class Objective:
    """One objective with its parameters, weights and retain loss; from ``ObjectiveInfo.bind``.

    A batch is ``{"forget": ..., "retain": ..., "alternate": ...}``, each with ``input_ids``,
    ``attention_mask`` and ``labels`` [B, T], padded on the right. The losses of a micro-batch are
    means over its scored tokens, or over its rows where ``info.averages`` says so. Gradients of
    several micro-batches add up to that of all their rows together only if each is weighted by its
    ``forget_count`` (``retain_count``) over the sum of them.
    """

    def __init__(
        self,
        info: ObjectiveInfo,
        parameters: Mapping[str, Any],
        *,
        compat: bool,
        retain: str,
        weights: tuple[float, float],
    ) -> None:
        self.info, self.parameters = info, dict(parameters)
        self.compat, self.retain = compat, retain
        self.forget_weight, self._retain_weight = float(weights[0]), float(weights[1])
        self.needs: frozenset[Need] = info.needs | RETAIN_LOSSES[retain]
        self._direction: Tensor | None = None
        self._dual: Dual | None = None
        if info.dual:
            self._dual = Dual(self._retain_weight, **self.parameters)

    @property
    def retain_weight(self) -> float:
        """α; where it is a dual variable, its present value."""
        return self._retain_weight if self._dual is None else self._dual.value

    @property
    def needs_retain(self) -> bool:
        """Whether training is impossible without a retain set."""
        return self._dual is not None or self._retain_weight > 0

    def forget_loss(self, model: Any, ref: Reference | None, batch: Batch) -> Tensor:
        """Return L_forget of a batch; the reference is asked before the model is run.

        Raises:
            RecipeError: The batch or the reference lacks what the objective needs.
        """
        inputs = self._inputs(model, ref, batch)
        asked = sorted(self.info.arguments, key=lambda name: "reference" not in name)
        given = {name: inputs[name]() for name in asked}
        options = {"compat": self.compat} if self.info.takes_compat else {}
        ordered = (given[name] for name in self.info.arguments)
        loss: Tensor = self.info.function(*ordered, **self.parameters, **options)
        return loss

    def retain_loss(self, model: Any, ref: Reference | None, batch: Batch) -> Tensor | None:
        """Return L_retain of a batch, also where α is 0: a projection needs its gradient.

        Returns:
            The loss; None where the retain loss is ``none``, or where the batch has no retain rows
            and none are needed.

        Raises:
            RecipeError: The batch has no retain rows though α is not 0.
        """
        if self.retain == "none" or ("retain" not in batch and not self.needs_retain):
            return None
        rows = _part(batch, "retain", self.info.name)
        if self.retain == "nll":
            return scores.token_mean(
                *scores.token_losses(forward_logits(model, rows), rows["labels"])
            )
        known = _given(ref, self.info.name)
        if self.retain == "kl":
            reference = known.logits(rows)
            logits = forward_logits(model, rows)
            return kl_from_reference(logits, rows["labels"], reference, compat=self.compat)
        layer = self.parameters["layer"]
        target = known.hidden(rows, layer)
        hidden = forward_hidden(model, rows, layer)
        return hidden_distance(hidden, target, rows["labels"], compat=self.compat)

    def components(self, model: Any, ref: Reference | None, batch: Batch) -> Components:
        """Return both losses and their weights."""
        forget = self.forget_loss(model, ref, batch)
        retain = self.retain_loss(model, ref, batch)
        return Components(forget, retain, self.forget_weight, self.retain_weight)

    def forget_count(self, batch: Batch) -> Tensor:
        """Return what L_forget of a batch is a mean over: how many tokens, or rows."""
        part = "forget" if "labels" in self.info.arguments else "alternate"
        rows = _part(batch, part, self.info.name)
        if self.info.averages == "rows":
            return scores.answer_rows(rows)
        skipped = self.parameters[self.info.skips] if self.info.skips else 0
        per_row = (rows["labels"][:, 1:] != scores.IGNORED).sum(-1)
        return (per_row - skipped).clamp(min=0).sum()

    def retain_count(self, batch: Batch) -> Tensor:
        """Return what L_retain of a batch is a mean over: how many tokens, or rows."""
        rows = _part(batch, "retain", self.info.name)
        return scores.answer_rows(rows) if self.retain == "hidden" else scores.answer_tokens(rows)

    def after_step(self, retain_loss: float, *, epoch: float | None = None) -> None:
        """Take note of an optimiser step; moves α where it is a dual variable.

        Args:
            retain_loss: L_r of the step, neither weighted nor projected.
            epoch: Epochs done after the step, as a fraction.
        """
        if self._dual is not None:
            self._dual.after_step(retain_loss, epoch=epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return what changes during training, or must stay the same when it is resumed."""
        state: dict[str, Any] = {}
        if self._direction is not None:
            state["direction"] = self._direction.clone()
        if self._dual is not None:
            state["dual"] = self._dual.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Raises:
            RecipeError: It is the state of another objective.
        """
        known = {"direction"} if "direction" in self.info.arguments else set()
        known |= {"dual"} if self._dual is not None else set()
        if set(state) - known or (self._dual is not None and "dual" not in state):
            raise RecipeError(
                f"not a state of {self.info.name}", expected=sorted(known), found=sorted(state)
            )
        if "direction" in state:
            self._direction = state["direction"].detach().cpu().clone()
        if self._dual is not None:
            self._dual.load_state_dict(state["dual"])

    def _inputs(
        self, model: Any, ref: Reference | None, batch: Batch
    ) -> dict[str, Callable[[], Tensor]]:
        """Return what gives each of the tensors a function may ask for."""
        name = self.info.name
        forget = functools.partial(_part, batch, "forget", name)
        other = functools.partial(_part, batch, "alternate", name)
        known = functools.partial(_given, ref, name)
        hidden = functools.cache(lambda: forward_hidden(model, forget(), self.parameters["layer"]))
        return {
            "logits": lambda: forward_logits(model, forget()),
            "labels": lambda: forget()["labels"],
            "reference_scores": lambda: known().scores(forget(), part="forget"),
            "reference_logits": lambda: known().logits(forget()),
            "hidden": hidden,
            "direction": lambda: self._drawn(hidden()),
            "alternate_logits": lambda: forward_logits(model, other()),
            "alternate_labels": lambda: other()["labels"],
            "alternate_reference_scores": lambda: known().scores(other(), part="alternate"),
        }

    def _drawn(self, hidden: Tensor) -> Tensor:
        """Return the fixed direction u of the hidden states' width: U[0, 1)^d / ‖·‖."""
        width = hidden.shape[-1]
        if self._direction is None:
            generator = torch.Generator().manual_seed(self.parameters["seed"])
            drawn = torch.rand(width, generator=generator, dtype=torch.float64)
            self._direction = (drawn / torch.linalg.vector_norm(drawn)).float()
        if len(self._direction) != width:
            found = len(self._direction)
            raise RecipeError("the saved direction is another model's", expected=width, found=found)
        return self._direction.to(hidden.device)


def _part(batch: Batch, part: str, name: str) -> Mapping[str, Tensor]:
    if part not in batch:
        remedies = {
            "retain": "Give a retain set, or set retain_weight to 0.",
            "alternate": "Give every forget row another answer, or use refusals.",
        }
        raise RecipeError(
            f"{name} needs the batch's {part} rows", found=sorted(batch), remedy=remedies.get(part)
        )
    return batch[part]


def _given(ref: Reference | None, name: str) -> Reference:
    if ref is None:
        raise RecipeError(
            f"{name} compares with the starting model, and there is no reference",
            remedy="Make one with reference_for(model, objective.needs).",
        )
    return ref
