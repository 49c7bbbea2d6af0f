"""Merges that PEFT's ``add_weighted_adapter`` gets or got wrong, each with the truth, ours, PEFT's.

One case is a pair of adapters that PEFT writes, what both tools are asked, and the dense fp64
answer. ``peft_defects.py`` writes the record, tests/parity/test_peft_defects.py holds both to it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lora_oracles import (
    Array,
    Changes,
    apart,
    changes,
    elected,
    in_knots,
    pruned,
    rank_limited,
    weighted_mean,
    weighted_sum,
)
from torch import nn

__all__ = ["CASES", "Case", "Model", "answers", "our_answer", "peft_answer", "write_adapter"]

_Merge = Callable[[Sequence[Array], Sequence[float]], Array]


class Model(nn.Module):
    """Layers of several shapes, in float64, of which adapters are made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.one = nn.Linear(1, 1)
        self.head = nn.Linear(12, 3)
        self.double()


@dataclass(frozen=True)
class Case:
    """One question to both tools.

    Attributes:
        name: Id in the record.
        group: The defect it belongs to.
        about: What is asked, in words, for the table.
        peft: Arguments of ``add_weighted_adapter``.
        ours: Arguments of ``orthomerge.merge``.
        truth: What becomes of every changed weight.
        theirs: The truth that PEFT's answer is held to, where PEFT defines the method on other
            coordinates; None for the same.
        adapters: ``LoraConfig`` settings of each adapter.
        weights: One per adapter.
        dtype: Of adapters and base.
        tolerance: Of our answer.
        refused: Words of our refusal, where there is no right answer.
        values: What each adapter of a 1 × 1 weight changes it by; None for random numbers.
    """

    name: str
    group: str
    about: str
    peft: Mapping[str, Any]
    ours: Mapping[str, Any]
    truth: _Merge = weighted_sum
    theirs: _Merge | None = None
    adapters: Sequence[Mapping[str, Any]] = ({}, {})
    weights: Sequence[float] = (1.0, 1.0)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    refused: str | None = None
    values: Sequence[float | None] = (None, None)


def write_adapter(
    folder: Path,
    seed: int,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    value: float | None = None,
) -> Path:
    """Let PEFT make and save an adapter of random numbers, or of rank 1 with one value."""
    import peft

    config = {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 8, **settings}
    model = peft.get_peft_model(
        Model().to(dtype), peft.LoraConfig(**config), autocast_adapter_dtype=False
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            noise = noise.abs() if "magnitude" in name else noise
            fixed = {"lora_A": 1.0, "lora_B": value}.get(name.split(".")[-3])
            with torch.no_grad():
                parameter.add_(noise) if value is None else parameter.fill_(fixed or 0.0)
    model.save_pretrained(folder)
    return folder


def answers(case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """Return what both tools make of a case: an error against the truth, or a refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = [
            write_adapter(folder / f"adapter-{at}", 1 + at, case.dtype, settings, value)
            for at, (settings, value) in enumerate(zip(case.adapters, case.values, strict=False))
        ]
        return {
            "ours": _judged(case, folders, case.truth, our_answer, folder),
            "peft": _judged(case, folders, case.theirs or case.truth, peft_answer, folder),
        }


def _judged(
    case: Case,
    folders: Sequence[Path],
    merge: _Merge,
    answer: Callable[[Case, Sequence[Path], Path], Changes],
    folder: Path,
) -> dict[str, Any]:
    base = _weights(Model().to(case.dtype))
    parts = [changes(path, base) for path in folders]
    wanted = {
        name: _whole(name, merge)([p[name] for p in parts if name in p], case.weights)
        for name in dict.fromkeys(name for part in parts for name in part)
    }
    try:
        error = apart(answer(case, folders, folder), wanted)
        if not math.isfinite(error):
            return {"error": "NaN", "text": "the result is not finite"}
        return {"relative_error": float(f"{error:.2e}")}
    except Exception as failure:
        text = str(failure).replace(str(folder), "").strip()
        return {"error": type(failure).__name__, "text": text.partition("\n")[0]}


def _whole(name: str, merge: _Merge) -> _Merge:
    """Trained heads are averaged, and biases added up, whatever is done to matrices."""
    if name.startswith("head."):
        return weighted_mean
    return weighted_sum if name.endswith(".bias") else merge


def our_answer(case: Case, folders: Sequence[Path], folder: Path) -> Changes:
    """Merge adapters into an adapter; return the changes PEFT makes of it."""
    import orthomerge

    output = folder / "merged"
    settings = dict(case.ours)
    if settings.pop("existing", False):
        orthomerge.merge(folders, method="linear", output=output)
    orthomerge.merge(folders, weights=list(case.weights), output=output, **settings)
    return _loaded(output)


def peft_answer(case: Case, folders: Sequence[Path], folder: Path) -> Changes:
    """Merge adapters with PEFT and save the result; return the changes PEFT makes of it."""
    import peft

    options = dict(case.peft)
    names = [f"a{at}" for at in range(len(folders))]
    model = peft.PeftModel.from_pretrained(
        Model().to(case.dtype), folders[0], adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name, path in list(zip(names, folders, strict=True))[1:]:
        model.load_adapter(path, name, autocast_adapter_dtype=False)
    output = options.pop("adapter_name", "result")
    model.add_weighted_adapter(names, list(case.weights), output, **options)
    for parameter in model.parameters():  # some versions cannot save what they made otherwise
        parameter.data = parameter.data.contiguous()
    model.save_pretrained(folder / "peft", selected_adapters=[output])
    return _loaded(folder / "peft" / output)


def _loaded(folder: Path) -> Changes:
    """Return what an adapter changes in the float64 base, by PEFT's own merge."""
    import peft

    before = _weights(Model())
    loaded = peft.PeftModel.from_pretrained(Model(), folder, autocast_adapter_dtype=False)
    after = _weights(loaded.merge_and_unload())
    changed = {name: after[name] - value for name, value in before.items()}
    return {name: change for name, change in changed.items() if change.any()}


def _weights(model: nn.Module) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


_SUM = {"method": "task-arithmetic"}
_RANK_8 = {"svd_rank": 8}
_TIES = {"method": "ties", "density": 0.5}
_PRUNE = {"method": "magnitude-prune", "density": 0.5}
_PATTERN = {"rank_pattern": {"down": 2}, "alpha_pattern": {"down": 6}}
_ONE = {"target_modules": ["one"], "r": 1, "lora_alpha": 1}
_SCALE = "the scaling α/r = 2 counts once"
_CROSS = "methods act on B A, not on A and B"
_ALONE = "a single adapter is merged as asked"

CASES = (
    Case("svd", _SCALE, "svd", {"combination_type": "svd", **_RANK_8}, _SUM),
    Case(
        "ties_svd", _SCALE, "ties_svd, all kept",
        {"combination_type": "ties_svd", "density": 1.0, "svd_rank": 12},
        {"method": "ties", "density": 1.0}, in_knots(elected(1.0)), elected(1.0),
    ),
    Case(
        "dare_linear_svd", _SCALE, "dare_linear_svd, all kept",
        {"combination_type": "dare_linear_svd", "density": 1.0, **_RANK_8},
        {"method": "dare", "density": 1.0},
    ),
    Case(
        "dare_ties_svd", _SCALE, "dare_ties_svd, all kept",
        {"combination_type": "dare_ties_svd", "density": 1.0, "svd_rank": 12},
        {"method": "dare-ties", "density": 1.0}, in_knots(elected(1.0)), elected(1.0),
    ),
    Case(
        "magnitude_prune_svd", _SCALE, "magnitude_prune_svd, half kept",
        {"combination_type": "magnitude_prune_svd", "density": 0.5, "svd_rank": 12},
        _PRUNE, in_knots(pruned(0.5)), pruned(0.5),
    ),
    Case(
        "rslora-cat", "rsLoRA's scale α/√r", "cat of rsLoRA adapters",
        {"combination_type": "cat"}, _SUM, adapters=[{"use_rslora": True}] * 2,
    ),
    Case(
        "rslora-linear", "rsLoRA's scale α/√r", "linear, one weight 0, rsLoRA",
        {"combination_type": "linear"}, _SUM, weights=(1.0, 0.0),
        adapters=[{"use_rslora": True}] * 2,
    ),
    Case(
        "lora-bias", "trained biases are merged too", "cat with lora_bias",
        {"combination_type": "cat"}, _SUM, weights=(0.7, 0.4), adapters=[{"lora_bias": True}] * 2,
    ),
    Case(
        "dora", "DoRA needs the base", "cat of DoRA adapters",
        {"combination_type": "cat"}, _SUM, adapters=[{"use_dora": True}] * 2,
        refused="Pass --base",
    ),
    Case("linear", _CROSS, "linear", {"combination_type": "linear"}, _SUM),
    Case(
        "ties", _CROSS, "ties, half kept", {"combination_type": "ties", "density": 0.5},
        _TIES, in_knots(elected(0.5)), elected(0.5),
    ),
    Case(
        "dare_linear", _CROSS, "dare_linear, all kept",
        {"combination_type": "dare_linear", "density": 1.0}, {"method": "dare", "density": 1.0},
    ),
    Case(
        "dare_ties", _CROSS, "dare_ties, all kept",
        {"combination_type": "dare_ties", "density": 1.0},
        {"method": "dare-ties", "density": 1.0}, in_knots(elected(1.0)), elected(1.0),
    ),
    Case(
        "magnitude_prune", _CROSS, "magnitude_prune, half kept",
        {"combination_type": "magnitude_prune", "density": 0.5},
        _PRUNE, in_knots(pruned(0.5)), pruned(0.5),
    ),
    Case(
        "negative-linear", "negative weights", "linear, weights -1 and 0",
        {"combination_type": "linear"}, _SUM, weights=(-1.0, 0.0),
    ),
    Case(
        "negative-cat", "negative weights", "cat, weights 1 and -0.5",
        {"combination_type": "cat"}, _SUM, weights=(1.0, -0.5),
    ),
    Case(
        "election-signs", "TIES elects on weighted changes",
        "ties_svd of the 1 × 1 changes 4 and -3, weights -1 and 1",
        {"combination_type": "ties_svd", "density": 1.0}, {"method": "ties", "density": 1.0},
        in_knots(elected(1.0)), elected(1.0), adapters=[_ONE] * 2, values=(4.0, -3.0),
        weights=(-1.0, 1.0),
    ),
    Case(
        "election-sizes", "TIES elects on weighted changes",
        "ties_svd of the 1 × 1 changes 1 and -5, weights 1 and 0.1",
        {"combination_type": "ties_svd", "density": 1.0}, {"method": "ties", "density": 1.0},
        in_knots(elected(1.0)), elected(1.0), adapters=[_ONE] * 2, values=(1.0, -5.0),
        weights=(1.0, 0.1),
    ),
    Case(
        "rank-pattern-cat", "ranks that differ by module", "cat",
        {"combination_type": "cat"}, _SUM, adapters=[_PATTERN, {}],
    ),
    Case(
        "rank-pattern-linear", "ranks that differ by module", "linear, the same ranks in both",
        {"combination_type": "linear"}, _SUM, weights=(1.0, 0.0), adapters=[_PATTERN] * 2,
    ),
    Case(
        "rank-pattern-mixed", "ranks that differ by module", "linear, one adapter with a pattern",
        {"combination_type": "linear"}, _SUM, adapters=[_PATTERN, {}],
    ),
    Case(
        "modules-to-save", "several trained heads", "cat of adapters with a head each",
        {"combination_type": "cat"}, _SUM, weights=(0.75, 0.25),
        adapters=[{"modules_to_save": ["head"]}] * 2,
    ),
    Case(
        "existing-name", "an existing name is not silently kept", "cat under a name in use",
        {"combination_type": "cat", "adapter_name": "a1"}, {**_SUM, "existing": True},
        refused="already exists",
    ),
    Case(
        "single-svd", _ALONE, "svd of one adapter to rank 2",
        {"combination_type": "svd", "svd_rank": 2},
        {**_SUM, "output_settings": {"rank": 2}},
        rank_limited(2), adapters=[{}], weights=(1.0,),
    ),
    Case(
        "single-magnitude_prune_svd", _ALONE, "magnitude_prune_svd of one adapter, half kept",
        {"combination_type": "magnitude_prune_svd", "density": 0.5, "svd_rank": 12},
        _PRUNE, in_knots(pruned(0.5)), pruned(0.5), adapters=[{}], weights=(1.0,),
    ),
    Case(
        "bfloat16-svd", "bfloat16 adapters on a CPU", "svd to rank 4",
        {"combination_type": "svd", "svd_rank": 4},
        {**_SUM, "output_settings": {"rank": 4, "dtype": "float32"}},
        rank_limited(4), dtype=torch.bfloat16, tolerance=1e-5,
    ),
    Case(
        "density-zero", "densities that make no sense", "dare_linear_svd, density 0",
        {"combination_type": "dare_linear_svd", "density": 0.0},
        {"method": "dare", "density": 0.0}, refused="density",
    ),
    Case(
        "density-none", "densities that make no sense", "ties_svd without a density",
        {"combination_type": "ties_svd", "svd_rank": 12},
        {"method": "ties"}, in_knots(elected(0.2)), elected(0.2),
    ),
    Case(
        "density-tiny", "densities that make no sense",
        "magnitude_prune_svd that keeps less than one entry",
        {"combination_type": "magnitude_prune_svd", "density": 1e-3},
        {"method": "magnitude-prune", "density": 1e-3}, in_knots(pruned(1e-3)), pruned(1e-3),
    ),
)  # fmt: skip
