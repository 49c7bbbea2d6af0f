"""The merges that are compared, and how each tool is told to make them.

Commands are kept as they can be shown; ``resolve`` puts in the programs of this machine. They run
in the folder that holds the generated models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_shaped import DATA, model_names

__all__ = ["METHODS", "OUTPUT", "Contender", "Method", "floors", "generation", "mergekit_merge",
           "orthomerge_merge", "resolve", "start_up"]  # fmt: skip

OUTPUT = "output"

_BASE, *_TUNED = model_names(2)
_FLOORS = "benchmarks/floors.py"
_GENERATOR = "benchmarks/llama_shaped.py"
_ORTHOMERGE = ("python", "-m", "orthomerge_cli")


@dataclass(frozen=True)
class Method:
    """A merge method and the settings it is compared with; defaults where nothing is said.

    Args:
        name: orthomerge's id.
        models: The models that are merged.
        weights: One per model; empty for a method without.
        settings: orthomerge's parameters.
        base: The model they were fine-tuned from, for methods that look at it.
        peer_name: mergekit's id.
        peer_base: mergekit's ``base_model``.
        peer_settings: mergekit's names of the parameters, for the whole merge.
    """

    name: str
    models: Sequence[str]
    weights: tuple[float, ...]
    settings: dict[str, float] = field(default_factory=dict)
    base: str | None = None
    peer_base: str | None = None
    peer_name: str = ""
    peer_settings: dict[str, float] = field(default_factory=dict)

    def mergekit_config(self) -> dict[str, Any]:
        """Return mergekit's configuration; ``./`` tells it that a model is no hub id."""
        config: dict[str, Any] = {"merge_method": self.peer_name, "dtype": "bfloat16"}
        if self.peer_base:
            config["base_model"] = f"./{self.peer_base}"
        config["models"] = [{"model": f"./{model}"} for model in self.models]
        for entry, weight in zip(config["models"], self.weights, strict=False):
            entry["parameters"] = {"weight": weight}
        if self.peer_settings:
            config["parameters"] = self.peer_settings
        return config


_LINEAR = Method("linear", (_BASE, *_TUNED), (1.0, 1.0, 1.0), peer_name="linear")
_TASK_ARITHMETIC = Method(
    "task-arithmetic",
    _TUNED,
    (1.0, 0.7),
    {"scale": 0.4},
    base=_BASE,
    peer_base=_BASE,
    peer_name="task_arithmetic",
    peer_settings={"lambda": 0.4},
)
_TIES = Method(
    "ties",
    _TUNED,
    (1.0, 0.7),
    {"scale": 0.4, "density": 0.5},
    base=_BASE,
    peer_base=_BASE,
    peer_name="ties",
    peer_settings={"lambda": 0.4, "density": 0.5},
)
_SLERP = Method(
    "slerp",
    (_BASE, _TUNED[0]),
    (),
    {"t": 0.3},
    peer_base=_BASE,
    peer_name="slerp",
    peer_settings={"t": 0.3},
)
#: All methods; the first three read three models each and are also timed.
METHODS = {method.name: method for method in (_LINEAR, _TASK_ARITHMETIC, _TIES, _SLERP)}


@dataclass(frozen=True)
class Contender:
    """One command that is measured.

    Args:
        name: Names it in the results.
        command: As it can be shown; see ``resolve``.
        config: mergekit's configuration, written to the folder first.
    """

    name: str
    command: tuple[str, ...]
    config: dict[str, Any] | None = None

    def prepare(self, folder: Path) -> None:
        """Write the configuration file that the command reads."""
        if self.config is not None:
            (folder / self.command[1]).write_text(json.dumps(self.config, indent=1))  # is YAML


def floors() -> list[Contender]:
    """Return the copy floor and the average floor."""
    return [
        Contender(f"{name}-floor", ("python", _FLOORS, name, _BASE, *_TUNED, "--output", OUTPUT))
        for name in ("copy", "average")
    ]


def orthomerge_merge(method: Method, *, max_shard_size: str | None = None) -> Contender:
    """Return a merge by orthomerge, with provenance and all other defaults."""
    command = [*_ORTHOMERGE, "merge", *method.models, "--method", method.name]
    if method.base:
        command += ["--base", method.base]
    for weight in method.weights:
        command += ["--weight", str(weight)]
    for name, value in method.settings.items():
        command += ["--set", f"{name}={value}"]
    name = f"orthomerge-{method.name}"
    if max_shard_size:
        command += ["--max-shard-size", max_shard_size]
        name += f"-shards-{max_shard_size}"
    return Contender(name, (*command, "--output", OUTPUT))


def orthomerge_command() -> tuple[str, ...]:
    """Return how orthomerge is started."""
    return _ORTHOMERGE


def mergekit_merge(method: Method) -> Contender:
    """Return the same merge by mergekit, with its default flags."""
    command = ("mergekit-yaml", f"mergekit-{method.name}.yml", OUTPUT)
    return Contender(f"mergekit-{method.name}", command, method.mergekit_config())


def start_up() -> list[Contender]:
    """Return the commands that write nothing: the help and the plan of a merge."""
    merge = orthomerge_merge(METHODS["task-arithmetic"]).command
    plan = tuple("plan" if word == "merge" else word for word in merge)
    return [
        Contender("orthomerge-help", (*_ORTHOMERGE, "--help")),
        Contender("orthomerge-plan", plan),
    ]


def generation(folder: Path, scale: str, seed: int) -> list[str]:
    """Return the command that writes the models, unless they are there."""
    program = [sys.executable, str(DATA.parent / Path(_GENERATOR).name)]
    return [*program, "--out", str(folder), "--scale", scale, "--seed", str(seed)]


def resolve(command: Sequence[str], mergekit: str | None) -> list[str]:
    """Return a command with the programs of this machine in their places."""
    programs = {
        "python": sys.executable,
        _FLOORS: str(DATA.parent / Path(_FLOORS).name),
        "mergekit-yaml": mergekit or "mergekit-yaml",
    }
    return [programs.get(word, word) for word in command]
