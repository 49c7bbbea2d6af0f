"""How one merge is judged: strength by validation loss, then one look at the test texts.

A *cell* is everything measured of one (family, method, seed). It is kept in the cache under a hash
of all that it depends on, so that an interrupted run continues.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.contenders import Contender, walk
from tasks.encoder import Encoder, Tokens
from tasks.merged import MergedUpdate, Update, merged_update, norm, read_update
from tasks.splits import Examples

__all__ = ["Bench", "Sizes", "bits", "cell_path", "unpacked"]


@dataclass(frozen=True)
class Sizes:
    """How many texts per task are looked at.

    Args:
        validation: For the choice of the strength.
        test: For every number that is reported.
        held_out: Of the test texts, for tasks without an expert; 0 leaves these merges out.
    """

    validation: int = 100
    test: int = 400
    held_out: int = 100


def bits(correct: Tensor) -> str:
    """Return booleans as hexadecimal text, the first one in the highest bit."""
    digits = "".join("1" if value else "0" for value in correct.tolist())
    padded = digits + "0" * (-len(digits) % 4)
    return f"{int(padded, 2):0{len(padded) // 4}x}"


def unpacked(text: str, count: int) -> list[bool]:
    """Return the booleans that ``bits`` packed."""
    return [digit == "1" for digit in f"{int(text, 16):0{4 * len(text)}b}"[:count]]


def cell_path(cache: Path, key: Mapping[str, Any]) -> Path:
    """Return where a cell with this key is kept."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache / "cells" / f"{key['family']}-{key['method']}-{key['seed']}-{digest[:16]}.json"


class Bench:
    """The tokenised texts of all tasks with the encoder that reads them.

    Args:
        encoder: With the heads of all tasks.
        examples: By task, in the order of the report.
        sizes: How many of them.
    """

    def __init__(self, encoder: Encoder, examples: Mapping[str, Examples], sizes: Sizes) -> None:
        self.encoder = encoder
        self.sizes = sizes
        self.tasks = list(examples)
        self._expert = lru_cache(maxsize=len(self.tasks))(lambda f: read_update(f, encoder))
        self._parts: dict[str, dict[str, Tokens]] = {"validation": {}, "test": {}, "held_out": {}}
        for task, splits in examples.items():
            for part, split in (("validation", "validation"), ("test", "test"),
                                ("held_out", "test")):  # fmt: skip
                count = asdict(sizes)[part]
                if count:
                    self._parts[part][task] = encoder.tokens(splits[split].first(count))

    def losses(self, update: Update, factor: float) -> dict[str, float]:
        """Return the validation loss of every task at base + factor × update."""
        self.encoder.set_weights(update, factor)
        parts = self._parts["validation"]
        return {task: self.encoder.score(task, parts[task]).loss for task in self.tasks}

    def correct(
        self, update: Update, factor: float, part: str = "test", tasks: Sequence[str] | None = None
    ) -> dict[str, str]:
        """Return which test texts are classified correctly, packed by ``bits``."""
        self.encoder.set_weights(update, factor)
        chosen = self.tasks if tasks is None else tasks
        return {t: bits(self.encoder.score(t, self._parts[part][t]).correct) for t in chosen}

    def base_cell(self) -> dict[str, Any]:
        """Measure the base itself."""
        started = time.perf_counter()
        found = {"untuned": self.correct({}, 0.0)}
        if self.sizes.held_out:
            found["held_out_untuned"] = self.correct({}, 0.0, "held_out")
        return {**found, "seconds": {"total": time.perf_counter() - started}}

    def expert_cell(self, folders: Mapping[str, Path]) -> dict[str, Any]:
        """Measure every expert on its own task."""
        started = time.perf_counter()
        correct: dict[str, str] = {}
        sizes = {}
        for task, folder in folders.items():
            update = self._expert(folder)
            correct |= self.correct(update, 1.0, tasks=[task])
            sizes[task] = norm([update]) / norm([self.encoder.base])
        seconds = {"total": time.perf_counter() - started}
        return {"untuned": correct, "relative_norms": sizes, "seconds": seconds}

    def merge_cell(
        self, contender: Contender, folders: Mapping[str, Path], seed: int
    ) -> dict[str, Any]:
        """Measure one merge method on one set of experts."""
        started = time.perf_counter()
        updates = {task: self._expert(folder) for task, folder in folders.items()}
        merged = self._merge(contender, folders, seed)
        own = norm([merged.update]) / norm(list(updates.values()))
        cell: dict[str, Any] = {"form": merged.form, "refusal": merged.refusal}
        cell |= {"own_strength": own, "untuned": self.correct(merged.update, 1.0)}
        tried = {}
        if contender.tuned:
            tried = self._search(lambda strength: self.losses(merged.update, strength / own))
            chosen = best(tried, self.tasks)
            cell |= {"validation": {str(s): losses for s, losses in tried.items()}}
            cell |= {"strength": chosen, "tuned": self.correct(merged.update, chosen / own)}
        seconds = {"merge": merged.seconds}
        if self.sizes.held_out and len(self.tasks) > 2:
            cell |= self._held_out(contender, folders, seed, updates, tried)
        seconds["total"] = time.perf_counter() - started
        return {**cell, "seconds": {k: round(v, 2) for k, v in seconds.items()}}

    def _merge(self, contender: Contender, folders: Mapping[str, Path], seed: int) -> MergedUpdate:
        updates = [self._expert(folder) for folder in folders.values()]
        return merged_update(contender, list(folders.values()), self.encoder, seed, updates)

    def _search(
        self, measure: Callable[[float], dict[str, float]]
    ) -> dict[float, dict[str, float]]:
        tried: dict[float, dict[str, float]] = {}
        while (strength := walk({s: _mean(found) for s, found in tried.items()})) is not None:
            tried[strength] = measure(strength)
        return tried

    def _held_out(
        self,
        contender: Contender,
        folders: Mapping[str, Path],
        seed: int,
        updates: Mapping[str, Update],
        tried: Mapping[float, Mapping[str, float]],
    ) -> dict[str, Any]:
        """Merge all experts but one, for each task in turn, and test on that task.

        The strength is the one that the other tasks' validation texts prefer.
        """
        names = ("held_out_untuned", *(("held_out_tuned", "held_out_strength") if tried else ()))
        found: dict[str, Any] = {name: {} for name in names}
        for task in self.tasks:
            others = [name for name in self.tasks if name != task]
            sources = {name: folders[name] for name in others}
            update = self._merge(contender, sources, seed).update
            found["held_out_untuned"] |= self.correct(update, 1.0, "held_out", [task])
            if tried:
                strength = best(tried, others)
                factor = strength * norm([updates[name] for name in others]) / norm([update])
                found["held_out_strength"][task] = strength
                found["held_out_tuned"] |= self.correct(update, factor, "held_out", [task])
        return found


def best(tried: Mapping[float, Mapping[str, float]], tasks: Sequence[str]) -> float:
    """Return the strength of the smallest mean loss over some tasks."""
    return min(tried, key=lambda s: (_mean({task: tried[s][task] for task in tasks}), s))


def _mean(values: Mapping[str, float]) -> float:
    return float(torch.tensor(list(values.values()), dtype=torch.float64).mean())
