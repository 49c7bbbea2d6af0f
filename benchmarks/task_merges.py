"""Merge experts of real tasks with every method, and say which differences are real.

One command does everything: fetch, train, merge, test, summarise. What is finished stays in the
cache, so the same command continues after an interruption, and several may run at once on
different families, methods or seeds; the last one then writes the report of them all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from circumstances import RESULTS, machine, run_command, versions, write_result
from rich.console import Console
from tasks import packages
from tasks.contenders import CONTENDERS, GRID, available
from tasks.experts import KINDS
from tasks.families import FAMILIES
from tasks.protocol import Sizes
from tasks.schedule import carry_out, estimate
from tasks.session import Session
from tasks.splits import DEFAULT_TASKS, TASKS
from tasks.summary import family_summary
from tasks.tables import method_table

__all__ = ["main"]

_MORE_TO_DO = 3
_QUICK: dict[str, Any] = {
    "families": ["lora"],
    "methods": ["task-arithmetic", "ties"],
    "seeds": [1],
    "tasks": ["spam", "subj"],
    "steps": 20,
    "test": 100,
    "validation": 40,
    "held_out": 0,
}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = argparse.ArgumentParser(description=__doc__)
    line.add_argument("--families", nargs="+", default=["lora", "lora_imb"], choices=FAMILIES)
    line.add_argument("--methods", nargs="+", default=list(CONTENDERS), metavar="NAME")
    line.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    line.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS), choices=TASKS)
    line.add_argument("--steps", type=int, default=60, help="training steps per expert")
    line.add_argument("--test", type=int, default=400, help="test texts per task")
    line.add_argument("--validation", type=int, default=100, help="validation texts per task")
    line.add_argument(
        "--held-out", type=int, default=100, help="test texts of a task without expert; 0: none"
    )
    line.add_argument("--bf16", action="store_true", help="score in bf16 autocast")
    line.add_argument("--device", default="cpu")
    line.add_argument("--threads", type=int, default=1)
    line.add_argument("--minutes", type=float, help="begin nothing that would end later")
    line.add_argument("--train-only", action="store_true", help="train the experts, then stop")
    line.add_argument("--estimate", action="store_true", help="say how long it takes, then stop")
    line.add_argument("--offline", action="store_true", help="fetch nothing")
    line.add_argument("--quick", action="store_true", help="two tasks, 20 steps: a smoke test")
    line.add_argument("--cache", type=Path, help=f"default: ${packages.CACHE_VARIABLE} or .cache")
    line.add_argument("--results", type=Path, default=RESULTS / "task_merges.json")
    return line


def session_of(options: argparse.Namespace, console: Console) -> Session:
    """Return what the options ask for, with everything fetched."""
    cache = packages.cache_folder(options.cache)
    if not options.offline:
        packages.fetch(cache)
    for name in packages.missing(cache):
        packages.archive(cache, name)  # says which one is missing
    contenders = available(options.methods)
    for name in options.methods:
        if name not in contenders:
            console.print(f"left out: {name}, not in this version of orthomerge")
    return Session(
        cache=cache,
        tasks=tuple(options.tasks),
        families=tuple(options.families),
        contenders=contenders,
        seeds=tuple(options.seeds),
        steps=options.steps,
        sizes=Sizes(options.validation, options.test, options.held_out),
        device=options.device,
        bf16=options.bf16,
    )


def report(session: Session, made_with: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return the result file's content from the finished cells."""
    counts = {"test": session.sizes.test, "held_out": session.sizes.held_out}
    families: dict[str, Any] = {}
    for name in session.families:
        cells = session.collected(name)
        refused = {m: by[s]["refused"] for m, by in cells.items() for s in by if "refused" in by[s]}
        kept = {m: by for m, by in cells.items() if m not in refused}
        families[name] = {
            "meaning": FAMILIES[name].meaning,
            "refused": refused,
            **family_summary(kept, session.tasks, counts),
            "cells": {m: {str(s): cell for s, cell in by.items()} for m, by in kept.items()},
        }
    return {
        "benchmark": "task_merges",
        "command": run_command(),
        "machine": machine(),
        "versions": {**versions(), **made_with},
        "threads": threads,
        "packages": {p.requirement: p.licence for p in packages.PACKAGES.values()},
        "tasks": {name: TASKS[name].prompts for name in session.tasks},
        "sizes": {**counts, "validation": session.sizes.validation},
        "kinds": {name: kind.settings for name, kind in KINDS.items()},
        "steps": session.steps,
        "grid": GRID,
        "precision": "bf16 autocast" if session.bf16 else "fp32",
        "families": families,
    }


def main() -> int:
    """Run as a program; return 3 when time ran out before everything was done."""
    line = parser()
    options = line.parse_args()
    if options.quick:
        line.set_defaults(**_QUICK)  # what was asked for explicitly stays
        options = line.parse_args()
    console = Console()
    torch.set_num_threads(options.threads)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    session = session_of(options, console)
    training, cells = session.training(), session.cells()
    for kind, (count, seconds) in estimate([*training, *cells], session.cache).items():
        console.print(f"to do: {count} {kind}s, about {seconds / 60:.0f} minutes")
    if options.estimate:
        return 0
    works = training if options.train_only else [*training, *cells]
    if not carry_out(works, session.cache, deadline, console.print):
        return _MORE_TO_DO
    if options.train_only:
        return 0
    result = report(session, peers(), options.threads)
    write_result(options.results, result)
    for name, family in result["families"].items():
        for setting in ("untuned", "tuned"):
            print(f"\n{name} ({family['meaning']}), {setting}, seeds {family['seeds']}")
            print("\n".join(method_table(family, setting)))
    return 0


def peers() -> dict[str, str]:
    """Return the versions of what trained the experts."""
    import peft
    import transformers

    return {"peft": peft.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    sys.exit(main())
