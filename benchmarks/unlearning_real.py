"""Make a model forget chapters of a real text, end to end through ``orthomerge.unlearn``.

A Llama is trained from scratch on topics of Python's own documentation, then unlearns some of them
with a LoRA adapter: two objectives, two weights of the retain loss, with and without projection.
Every run stops where the forget topics are predicted as badly as topics never read. What the
retain loss has risen by is read off at that level, between the two measurements around it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from circumstances import RESULTS, check_sources, machine, run_command, versions, write_result
from python_topics import SIZES, Size, make_model_folder, topic_rows, write_sets

import orthomerge

__all__ = ["arms", "main", "rise_at_level"]

# npo's loss is a sum over the tokens of a row, the retain loss a mean over tokens. A row stops to
# pull a few 1/β above its start, so rows of this length need a β smaller than that of answers.
_ALPHAS = {"npo": (10.0, 100.0), "grad-diff": (1.0, 10.0)}
_PARAMETERS: dict[str, dict[str, float]] = {"npo": {"beta": 0.01}, "grad-diff": {}}
_LEARNING_RATE = 1e-3  # of the LoRA adapters; a model this small needs more than a large one


def arms() -> Iterator[dict[str, Any]]:
    """Yield what is compared."""
    for objective, alphas in _ALPHAS.items():
        for alpha in alphas:
            for projection in ("off", "gu"):
                yield {"objective": objective, "alpha": alpha, "projection": projection}


def rise_at_level(log: list[Mapping[str, Any]], before: Mapping[str, float], level: float) -> float:
    """Return the rise of the retain loss where the forget loss first passes a level.

    Args:
        log: Steps with what was "measured" after them.
        before: The losses "forget" and "retain" before the first step.
        level: The forget loss to read it off at.

    Returns:
        By linear interpolation between the measurements around it; NaN if it is never reached.
    """
    last = before
    for step in log:
        now = step.get("measured")
        if now is None:
            continue
        if now["forget"] >= level:
            share = (level - last["forget"]) / (now["forget"] - last["forget"])
            retain = last["retain"] + share * (now["retain"] - last["retain"])
            return float(retain - before["retain"])
        last = now
    return float("nan")


def run_arm(
    arm: Mapping[str, Any], folder: Path, paths: Mapping[str, str], size: Size, seed: int
) -> dict[str, Any]:
    """Unlearn once; return the table, the steps and the seconds."""
    output = folder / "unlearned"
    shutil.rmtree(output, ignore_errors=True)
    projection: Any = "off"
    if arm["projection"] != "off":
        projection = {"preset": arm["projection"], "bank_rows": size.bank_rows}
    started = time.perf_counter()
    result = orthomerge.unlearn(
        folder / "model", paths["forget"], paths["retain"], holdout=paths["holdout"],
        output=output, objective=arm["objective"], projection=projection, seed=seed,
        loss={"retain_weight": arm["alpha"]}, parameters=_PARAMETERS[arm["objective"]],
        train={"learning_rate": _LEARNING_RATE, "max_steps": size.steps, "device": "cpu"},
        stop={"max_retain_rise": None, "evaluate_every": 2},
    )  # fmt: skip
    seconds = time.perf_counter() - started
    lines = (output / "unlearning_steps.jsonl").read_text("utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    table = {row.name: row.as_dict() for row in result.table}
    before = {name: table[name]["loss_before"] for name in ("forget", "retain")}
    level = result.report["level"]["loss"]
    rise = rise_at_level(log, before, level)
    return {
        **arm,
        "seed": seed,
        "level": level,
        "reached": rise == rise,
        "retain_rise_at_level": rise if rise == rise else None,
        "table": table,
        "steps": result.steps,
        "kept_step": result.kept,
        "seconds_in_steps": sum(step["seconds"] for step in log),
        "seconds": seconds,
        "reason": result.reason,
    }


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of unlearning, per arm")
    parser.add_argument("--model", type=Path, help="folder to keep the trained model in")
    parser.add_argument("--output", type=Path, default=RESULTS / "unlearning_real.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, measured = SIZES[options.size], versions()
    rows = topic_rows(size)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = write_sets(folder, rows)
        trained = _model(folder / "model", options.model, rows, size)
        runs = []
        for seed in range(options.seeds):
            for arm in arms():
                runs.append(run_arm(arm, folder, paths, size, seed))
                print(_line(runs[-1]), flush=True)
    check_sources(measured)
    topics = {name: sorted({row["topic"] for row in found}) for name, found in rows.items()}
    result = {
        "machine": machine(),
        "versions": measured,
        "command": run_command(),
        "threads": torch.get_num_threads(),
        "notes": [_note(rows, topics, trained)],
        "model": trained,
        "rows": {name: len(found) for name, found in rows.items()},
        "topics": topics,
        "seeds": options.seeds,
        "learning_rate": _LEARNING_RATE,
        "parameters": _PARAMETERS,
        "runs": runs,
    }
    write_result(options.output, result)


def _model(folder: Path, kept: Path | None, rows: Any, size: Size) -> dict[str, Any]:
    """Make the model, or take the one that an earlier run kept."""
    facts = None if kept is None else kept / "facts.json"
    if kept is None or facts is None or not facts.is_file():
        found = make_model_folder(folder, rows, size)
        if kept is not None and facts is not None:
            shutil.copytree(folder, kept)
            facts.write_text(json.dumps(found))
        return found
    shutil.copytree(kept, folder)
    known: dict[str, Any] = json.loads(facts.read_text())
    return known


def _note(rows: Any, topics: Any, trained: Mapping[str, Any]) -> str:
    parts = [f"{len(rows[name])} {name} rows of {len(topics[name])} topics" for name in rows]
    return f"A Llama of {trained['parameters']:,} parameters; {', '.join(parts)}."


def _line(run: Mapping[str, Any]) -> str:
    table = run["table"]
    losses = ", ".join(
        f"{name} {row['loss_before']:.3f} → {row['loss_after']:.3f}" for name, row in table.items()
    )
    rise = run["retain_rise_at_level"]
    return (
        f"{run['seed']} {run['objective']} α {run['alpha']:g} {run['projection']}: {losses}; "
        f"rise {'–' if rise is None else f'{rise:.4f}'}, {run['steps']} steps, "
        f"{run['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
