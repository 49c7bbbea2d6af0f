"""What a run will need, from configuration and shapes: memory, and about how much time.

Estimates, made without loading a weight; the formulas are in the docstrings.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from orthomerge.quiet import quiet_libraries
from orthomerge.unlearning.training.loading import device_of, precision_of, with_adapter
from orthomerge.unlearning.training.preparing import PreparedSets
from orthomerge.unlearning.training.settings import UnlearnRequest

__all__ = ["Estimate", "bank_rows", "estimate"]

_STATES = {"adamw": 2, "sgd": 0}  # fp32 numbers per trained one, beside its gradient
_PROBE = 768


@dataclass(frozen=True)
class Estimate:
    """What a run will about need.

    Attributes:
        parameters: Numbers in the model, adapter included.
        trained: Numbers that are trained.
        model_bytes: The model.
        training_bytes: Gradients, optimizer, the copies kept of the start and the best step.
        projection_bytes: Rows and snapshot of the projection.
        activation_bytes: One pass over a batch: logits in fp32 three times, and per layer what
            backpropagation keeps.
        reference_bytes: A second copy of the model, where the objective needs one.
        steps: Most optimizer steps.
        seconds_per_step: ``6 N`` operations per token and backward pass, at the speed of a matrix
            product measured just now; measurements during training included.
    """

    parameters: int
    trained: int
    model_bytes: int
    training_bytes: int
    projection_bytes: int
    activation_bytes: int
    reference_bytes: int
    steps: int
    seconds_per_step: float

    @property
    def peak_bytes(self) -> int:
        """All memory together."""
        return (
            self.model_bytes
            + self.training_bytes
            + self.projection_bytes
            + self.activation_bytes
            + self.reference_bytes
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as one JSON-ready object."""
        return {
            "parameters": self.parameters,
            "trained": self.trained,
            "model_bytes": self.model_bytes,
            "training_bytes": self.training_bytes,
            "projection_bytes": self.projection_bytes,
            "activation_bytes": self.activation_bytes,
            "reference_bytes": self.reference_bytes,
            "peak_bytes": self.peak_bytes,
            "steps": self.steps,
            "seconds_per_step": round(self.seconds_per_step, 3),
            "seconds": round(self.seconds_per_step * self.steps, 1),
        }


def estimate(request: UnlearnRequest, sets: PreparedSets) -> Estimate:
    """Estimate a run's memory and time from the model's configuration."""
    model = _hollow(request)
    parameters = sum(p.numel() for p in model.parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in trained.values())
    width = 4 if device_of(request.train) == "cpu" or request.adapter.kind == "full" else 2
    passes, rows = _passes(request, sets)
    tokens = request.train.batch_size * sets.forget.longest
    operations = passes * 6 * parameters * tokens * request.train.accumulation
    operations += 2 * parameters * rows * sets.forget.longest / request.measured_every
    return Estimate(
        parameters=parameters,
        trained=count,
        model_bytes=width * (parameters - count) + 4 * count,
        training_bytes=4 * count * (1 + _STATES[request.train.optimizer] + 2),
        projection_bytes=_projection_bytes(request, trained),
        activation_bytes=_activations(model.config, tokens, request),
        reference_bytes=_reference_bytes(request, width * parameters),
        steps=request.train.max_steps,
        seconds_per_step=operations / _speed(request),
    )


def _hollow(request: UnlearnRequest) -> Any:
    """Return the model with its adapter, in shapes only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(request.model)
    with quiet_libraries(), torch.device("meta"):
        return with_adapter(AutoModelForCausalLM.from_config(config), request.adapter)


def _passes(request: UnlearnRequest, sets: PreparedSets) -> tuple[float, int]:
    """Return backward passes over a batch per step, and rows measured per measurement."""
    retained = sets.retain is not None
    k = request.data.retain_per_forget
    needs = retained and (request.projection is not None or request.objective.retain_weight)
    passes = 1.0 + (k if needs else 0)
    if request.projection is not None and sets.retain is not None:
        bank = bank_rows(request, sets)
        every = request.projection.get("refresh_every", 4)
        passes += bank / every / request.train.batch_size / request.train.accumulation
    measured = min(len(sets.forget), request.stop.rows)
    measured += 0 if sets.check is None else min(len(sets.check), request.stop.rows)
    return passes, measured


def bank_rows(request: UnlearnRequest, sets: PreparedSets) -> int:
    """Return how many retain rows the projection's bank covers."""
    if request.projection is None or sets.retain is None:
        return 0
    if "bank" not in request.projection.get("rows", ("bank",)):
        return 0
    most: int = request.bank_rows
    return min(len(sets.retain), most)


def _projection_bytes(request: UnlearnRequest, trained: dict[str, Any]) -> int:
    if request.projection is None:
        return 0
    from orthomerge.unlearning.projection import ProjectionSettings, plan_memory

    settings = dict(request.projection)
    scope = settings.pop("scope", None)
    plan = plan_memory(trained, ProjectionSettings(**settings), scope=scope)
    return plan.device_bytes + plan.on_host


def _activations(config: Any, tokens: int, request: UnlearnRequest) -> int:
    width = 2 if precision_of(request.train) != "fp32" else 4
    hidden, layers = config.hidden_size, config.num_hidden_layers
    kept = 2 * hidden if request.train.gradient_checkpointing else 17 * hidden
    return tokens * int(3 * 4 * config.vocab_size + layers * kept * width)


def _reference_bytes(request: UnlearnRequest, model_bytes: int) -> int:
    from orthomerge.unlearning.objectives import Need

    heavy = {Need.REFERENCE_LOGITS, Need.REFERENCE_HIDDEN} & set(request.objective.needs)
    return model_bytes if heavy and request.adapter.kind == "full" else 0


def _speed(request: UnlearnRequest) -> float:
    """Return operations per second of a matrix product where the model will run."""
    import torch

    device = device_of(request.train)
    dtype = torch.float32 if precision_of(request.train) == "fp32" else torch.bfloat16
    a = torch.ones(_PROBE, _PROBE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        b = a @ a
        float(b[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * _PROBE**3 / best / 2  # a model reaches about half of it
