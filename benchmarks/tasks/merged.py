"""Run a contender on experts' folders and return what it adds to the base's weights.

An update is one dense matrix per target; every method's update is linear in the strength, so one
merge serves all strengths.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import orthomerge
from orthomerge.errors import OrthoMergeError
from tasks.contenders import Contender
from tasks.encoder import Encoder, load_base

__all__ = ["MergedUpdate", "Update", "merged_update", "norm", "read_update"]

Update = dict[str, Tensor]


@dataclass(frozen=True)
class MergedUpdate:
    """One merge.

    Args:
        update: What it adds, at its own strength.
        form: ``adapter`` (adapters in, adapter out, no base), ``base`` (adapters merged into the
            base) or ``dense`` (full matrices).
        seconds: Of the merge itself, reading and writing included.
        refusal: Why there is no adapter, where the form is ``base``.
    """

    update: Update
    form: str
    seconds: float
    refusal: str = ""


def norm(updates: Sequence[Update], weights: Sequence[float] | None = None) -> float:
    """Return ‖Σ_i w_i D_i‖_F over all targets together."""
    weights = weights or [1.0] * len(updates)
    total = 0.0
    for name in updates[0]:
        summed = sum(w * update[name].double() for w, update in zip(weights, updates, strict=True))
        total += float(torch.as_tensor(summed).square().sum())
    return total**0.5


def read_update(folder: Path, encoder: Encoder) -> Update:
    """Return what a folder's adapter adds to the base's weights, as PEFT applies it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(load_base(encoder.folder)[0], folder)
    merged = model.merge_and_unload()
    return _difference(merged.state_dict(), encoder)


def _difference(weights: Mapping[str, Tensor], encoder: Encoder) -> Update:
    return {
        name: weights[f"{name}.weight"].detach().float() - base.cpu()
        for name, base in encoder.base.items()
    }


def merged_update(
    contender: Contender,
    folders: Sequence[Path],
    encoder: Encoder,
    seed: int,
    updates: Sequence[Update],
) -> MergedUpdate:
    """Merge experts: adapter in, adapter out where the method can, else into the base.

    Args:
        contender: The method.
        folders: The experts.
        encoder: Holds the base.
        seed: Of methods that draw random numbers.
        updates: What the folders' adapters add, for a dense merge.

    Raises:
        OrthoMergeError: The method can do neither; the message is that of the merge with a base.
    """
    if contender.maker == "peft":
        return _peft(contender, folders, encoder)
    if contender.dense:
        return _dense(contender, updates, encoder, seed)
    scratch = Path(tempfile.mkdtemp(prefix="orthomerge-tasks-"))
    arguments: dict[str, Any] = {"method": contender.method, "seed": seed, **contender.parameters}
    sources = [str(folder) for folder in folders]
    try:
        started = time.perf_counter()
        try:
            orthomerge.merge(sources, output=scratch / "merged", **arguments)
        except OrthoMergeError as refused:
            started = time.perf_counter()
            result = orthomerge.merge(sources, base=str(encoder.folder), **arguments)
            elapsed = time.perf_counter() - started
            update = _difference(result.tensors or {}, encoder)
            return MergedUpdate(update, "base", elapsed, str(refused).partition("\n")[0])
        elapsed = time.perf_counter() - started
        return MergedUpdate(read_update(scratch / "merged", encoder), "adapter", elapsed)
    finally:
        shutil.rmtree(scratch)


def _dense(
    contender: Contender, updates: Sequence[Update], encoder: Encoder, seed: int
) -> MergedUpdate:
    base = {f"{name}.weight": weight.cpu() for name, weight in encoder.base.items()}
    models = [{f"{n}.weight": base[f"{n}.weight"] + u[n] for n in u} for u in updates]
    started = time.perf_counter()
    result = orthomerge.merge(
        models, base=base, method=contender.method, seed=seed, **contender.parameters
    )
    elapsed = time.perf_counter() - started
    return MergedUpdate(_difference(result.tensors or {}, encoder), "dense", elapsed)


def _peft(contender: Contender, folders: Sequence[Path], encoder: Encoder) -> MergedUpdate:
    """Merge with PEFT's own function, every weight 1 / number of experts."""
    from peft import PeftModel

    names = [f"expert{i}" for i in range(len(folders))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load_base(encoder.folder)[0]
        model = PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
        started = time.perf_counter()
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        weights = [1 / len(folders)] * len(folders)
        model.add_weighted_adapter(
            names, weights, "merged", combination_type=contender.method, **contender.parameters
        )
        elapsed = time.perf_counter() - started
        model.set_adapter("merged")
        merged = model.merge_and_unload()
    return MergedUpdate(_difference(merged.state_dict(), encoder), "adapter", elapsed)
