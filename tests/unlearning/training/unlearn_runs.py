"""Runs of unlearning on the tiny model, described as a recipe would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orthomerge.quiet import quiet_libraries
from orthomerge.recipe.unlearning import unlearning_from_data, unlearning_request
from orthomerge.recipe.yaml_positions import Document
from orthomerge.unlearning.training import UnlearnRequest, UnlearnResult, run_unlearning

# What depends on the machine, or on when memory was taken, and not on what was computed.
TIMES = ("seconds", "milliseconds", "bank_milliseconds", "bytes")


def request(facts: Path, output: Path, **changes: Any) -> UnlearnRequest:
    """A short run: ``train__learning_rate=…`` changes a part of it."""
    data: dict[str, Any] = {
        "model": str(facts / "model"), "forget": str(facts / "forget.jsonl"),
        "retain": str(facts / "retain.jsonl"), "holdout": str(facts / "holdout.jsonl"),
        "output": str(output),
        "train": {"max_steps": 4, "batch_size": 6, "learning_rate": 2e-3, "save_every": 2},
        "stop": {"level": "none", "evaluate_every": 2, "max_retain_rise": 9.0},
    }  # fmt: skip
    for name, value in changes.items():
        first, _, inner = name.partition("__")
        if inner:
            data[first] = {**data.get(first, {}), inner: value}
        else:
            data[first] = value
    data = {name: value for name, value in data.items() if value is not None}
    return unlearning_request(unlearning_from_data(Document(data, "test")))


def run(asked: UnlearnRequest, **options: Any) -> UnlearnResult:
    with quiet_libraries():
        return run_unlearning(asked, **options)


def timeless(log: str) -> list[Any]:
    """The steps of a log without what a clock says."""

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: kept(v) for k, v in value.items() if k not in TIMES}
        return value

    return [kept(json.loads(line)) for line in log.splitlines()]


def content(folder: Path) -> dict[str, Any]:
    """Everything in an output, byte for byte but for the clock's times in the log."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["unlearning_steps.jsonl"] = timeless(found["unlearning_steps.jsonl"].decode())
    return found


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
