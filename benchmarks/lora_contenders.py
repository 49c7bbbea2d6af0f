"""The merges of LoRA adapters that are compared, and how each tool is told to make them.

Commands are kept as they can be shown; ``resolve`` puts in the programs of this machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_lora import SHAPES, adapter_names

__all__ = ["OUTPUT", "PEFT_DENSE", "LoraContender", "contenders", "resolve"]

OUTPUT = "output"
#: PEFT's kinds that decompose a dense matrix per module: measured on one layer, once.
PEFT_DENSE = ("svd", "ties_svd")

_ADAPTERS = 8
_FLOOR, _PEFT = "benchmarks/floors.py", "benchmarks/peft_merge.py"
_PEFT_KINDS = ("linear", "cat", "ties", "dare_linear", "magnitude_prune")
_PROGRAM = ("python", "-m", "orthomerge_cli", "merge")


@dataclass(frozen=True)
class LoraContender:
    """One command that is measured.

    Args:
        name: Names it in the results.
        command: As it can be shown.
        scale: Which adapters it reads.
        floor: The floor that reads and writes as many bytes; None for a floor.
        truth: What its result should be: the weighted sum, that cut to the adapters' rank, or
            None where only the method itself says.
        once: Whether one sample must do.
    """

    name: str
    command: tuple[str, ...]
    scale: str
    floor: str | None = None
    truth: Literal["sum", "truncated"] | None = None
    once: bool = False


def contenders(scale: str, *, dense: bool) -> list[LoraContender]:
    """Return everything that is measured, in the order of a round.

    Args:
        scale: Of the adapters; the dense decompositions take one layer of it.
        dense: Whether to measure those, for minutes.
    """
    found = [*_floors(scale), *_own(scale), *(_peft(kind, scale) for kind in _PEFT_KINDS)]
    if dense:
        layer = "layer" if scale == "full" else scale
        own = [one for one in _own(layer, "-one-layer") if "-svd" in one.name or "ties" in one.name]
        found += [*own, *(_peft(kind, layer, "-one-layer") for kind in PEFT_DENSE)]
    return found


def _floors(scale: str) -> list[LoraContender]:
    size = 4 * SHAPES[scale].parameter_count
    command = ("python", _FLOOR, "traffic", *adapter_names(_ADAPTERS), "--output", OUTPUT)
    sizes = {"floor-lossless": _ADAPTERS * size, "floor-one-rank": size}
    return [
        LoraContender(name, (*command, "--bytes", str(nbytes)), scale)
        for name, nbytes in sizes.items()
    ]


def _own(scale: str, suffix: str = "") -> list[LoraContender]:
    rank = ("--rank", str(SHAPES[scale].rank))
    # Equal weights of sum 1, as PEFT is given; the method without -m is do-merging.
    even = [word for _ in range(_ADAPTERS) for word in ("--weight", str(1 / _ADAPTERS))]
    routes: list[tuple[str, Sequence[str], Literal["sum", "truncated"] | None]] = [
        ("do-merging", even, None),
        ("task-arithmetic", ("-m", "task-arithmetic", *even), "sum"),
        ("svd", ("-m", "task-arithmetic", *even, *rank), "truncated"),
        ("ties", ("-m", "ties", *even, *rank), None),
        ("tsv-m", ("-m", "tsv-m", *even), None),
    ]
    return [
        LoraContender(
            f"orthomerge-{name}{suffix}",
            (*_PROGRAM, *adapter_names(_ADAPTERS), *words, "-o", OUTPUT),
            scale,
            floor=None if suffix else f"floor-{'one-rank' if '--rank' in words else 'lossless'}",
            truth=truth,
            once=bool(suffix),
        )
        for name, words, truth in routes
    ]


def _peft(kind: str, scale: str, suffix: str = "") -> LoraContender:
    words = ("python", _PEFT, kind, *adapter_names(_ADAPTERS), "--output", OUTPUT)
    rank = ("--rank", str(SHAPES[scale].rank)) if kind in PEFT_DENSE else ()
    floor = "floor-lossless" if kind == "cat" else "floor-one-rank"
    truth: Literal["sum", "truncated"] | None = None
    if kind in ("linear", "cat"):
        truth = "sum"  # linear says that it is one, and is not
    elif kind == "svd":
        truth = "truncated"
    return LoraContender(
        f"peft-{kind}{suffix}",
        (*words, "--scale", scale, *rank),
        scale,
        floor=None if suffix else floor,
        truth=truth,
        once=bool(suffix),
    )


def resolve(command: Sequence[str]) -> list[str]:
    """Return a command with the programs of this machine in their places."""
    here = Path(__file__).resolve().parent
    programs = {"python": sys.executable}
    programs |= {program: str(here / Path(program).name) for program in (_FLOOR, _PEFT)}
    return [programs.get(word, word) for word in command]
