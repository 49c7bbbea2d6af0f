"""How much an unlearning run harms what should stay, with and without retain-gradient projection.

Every run starts from a small model that knows made-up facts, and is measured where its mean loss
on the forget rows reaches that of a model that never saw them. Drift is the rise of the loss on
retain rows of which no run has used a gradient. Facts, models, rows and their order all depend on
the seed. What is finished stays in the cache, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from circumstances import RESULTS, machine, run_command, sources_digest, versions, write_result
from tasks.schedule import Work, carry_out, estimate, write_json
from unlearning.arms import ARMS
from unlearning.crossing import Goal
from unlearning.descent import Setting, descend
from unlearning.drift_tables import drift_table, limit_table, world_table
from unlearning.facts import write_jsonl
from unlearning.models import World, WorldSettings, load_world, row_scores
from unlearning.parts import PARTS, Part
from unlearning.reporting import cell_figures, part_figures, targets

__all__ = ["main"]

_MORE_TO_DO = 3
_FOLDER = Path(__file__).parent / "unlearning"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = argparse.ArgumentParser(description=__doc__)
    line.add_argument("--part", nargs="+", default=["main", "controls"], choices=PARTS)
    line.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    line.add_argument("--minutes", type=float, help="begin nothing that would end later")
    line.add_argument("--quick", action="store_true", help="ten authors, one seed: a smoke test")
    line.add_argument("--export", type=Path, help="write rows and models of the first seed, stop")
    line.add_argument("--cache", type=Path, default=Path(".cache"), help="default: .cache")
    line.add_argument("--results", type=Path, default=RESULTS / "retain_drift.json")
    return line


@dataclass(frozen=True)
class Session:
    """One run of the benchmark: what it needs and where that is kept.

    Args:
        cache: Holds models and finished runs.
        parts: By name.
        seeds: Of facts, models and rows.
    """

    cache: Path
    parts: dict[str, Part]
    seeds: tuple[int, ...]

    @cached_property
    def digest(self) -> str:
        """Of all code that a run depends on: measured with other code, it is measured again."""
        return _code_digest()

    @cached_property
    def _worlds(self) -> dict[tuple[str, int], World]:
        return {}

    def world(self, part: Part, seed: int) -> World:
        """Return the facts and models of a seed, made when first needed."""
        key = (part.size, seed)
        if key not in self._worlds:
            self._worlds[key] = load_world(self.cache, WorldSettings(*key))
        return self._worlds[key]

    def runs(self) -> Iterator[tuple[Part, Setting]]:
        """Yield every run, seed by seed, so that early stops are useful."""
        for seed in self.seeds:
            for part in self.parts.values():
                for setting in part.settings(seed):
                    yield part, setting

    def path(self, part: Part, setting: Setting) -> Path:
        """Return where a run's figures are kept: under a hash of all that they depend on."""
        key = {
            "setting": asdict(setting),
            "arm": asdict(ARMS[setting.arm]),
            "size": part.size,
            "scale": asdict(part.scale),
            "code": self.digest,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        lora = "-lora" if setting.lora_rank else ""
        name = f"{part.size}{lora}-{setting.method}-{setting.arm}-{setting.seed}-{digest}.json"
        return self.cache / "unlearning" / "runs" / name

    def works(self) -> list[Work]:
        """Return what is to be measured, each run once."""
        works = {}
        for part, setting in self.runs():
            path = self.path(part, setting)
            label = f"{part.size} {setting.method} {setting.retain_weight:g} {setting.arm}"
            like = f"unlearning/runs/{path.name.rpartition(f'-{setting.seed}-')[0]}-*.json"
            run = self._measuring(part, setting, path)
            works.setdefault(path, Work(f"{label} {setting.seed}", "cell", path, like, run))
        return list(works.values())

    def _measuring(self, part: Part, setting: Setting, path: Path) -> Any:
        def measure() -> None:
            started = time.process_time()
            world = self.world(part, setting.seed)
            gold = row_scores(world.model("gold"), world.rows["forget"])
            goal = Goal(gold.loss, float(gold.exact.double().mean()))
            figures = cell_figures(descend(world, setting, part.scale, goal), goal)
            if _code_digest() != self.digest:
                raise SystemExit("the sources changed during the run: call again")
            figures["seconds"] = round(time.process_time() - started, 1)
            write_json(path, figures)

        return measure

    def figures(self, part: Part) -> dict[str, Any]:
        """Return the report of one part, from finished runs."""
        cells: dict[str, Any] = {}
        for seed in self.seeds:
            for setting in part.settings(seed):
                cell = json.loads(self.path(part, setting).read_text())
                by_arm = cells.setdefault(setting.method, {}).setdefault(setting.retain_weight, {})
                by_arm.setdefault(setting.arm, {})[seed] = cell
        settings = {k: v for k, v in asdict(part).items() if k not in ("meaning", "methods")}
        return {
            "meaning": part.meaning,
            "settings": settings,
            "figures": part_figures(cells, part.arms, tuned=part.tuned),
            "runs": {m: {f"{w:g}": by for w, by in found.items()} for m, found in cells.items()},
        }

    def worlds(self) -> dict[str, Any]:
        """Return what the models of every world know."""
        found = {}
        for part in self.parts.values():
            for seed in self.seeds:
                world = self.world(part, seed)
                count = len(world.rows["retain"]) + len(world.rows["forget"])
                found.setdefault(f"{count}, {seed}", _known_by(world))
        return found


def _code_digest() -> str:
    own = b"".join(path.read_bytes() for path in sorted(_FOLDER.glob("*.py")))
    return sources_digest(["orthomerge"]) + hashlib.sha256(own).hexdigest()


def _known_by(world: World) -> dict[str, Any]:
    facts: dict[str, Any] = {"training_cpu_seconds": dict(world.seconds)}
    for name in ("base", "target", "gold"):
        model = world.model(name)
        for part in ("forget", "retain", "holdout", "known"):
            scores = row_scores(model, world.rows[part])
            exact = float(scores.exact.double().mean())
            facts.setdefault(f"{part}_loss", {})[name] = round(scores.loss, 5)
            facts.setdefault(f"{part}_exact", {})[name] = round(exact, 4)
    return facts


def export(world: World, folder: Path) -> None:
    """Write a world's rows as JSON lines, and its models."""
    for name, rows in world.facts.named().items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    for name, source in world.folders.items():
        shutil.copytree(source, folder / name, dirs_exist_ok=True)


def quick(part: Part) -> Part:
    """Return a part at a size for a smoke test."""
    scale = replace(part.scale, batch=4, bank_rows=16, unused=12, steps=4)
    return replace(part, size="tiny", scale=scale, learning_rate=1e-3)


def report(session: Session) -> dict[str, Any]:
    """Return the result file's content from the finished runs."""
    import transformers

    parts = {name: session.figures(part) for name, part in session.parts.items()}
    return {
        "benchmark": "retain_drift",
        "command": run_command(),
        "machine": machine(),
        "versions": {**versions(), "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "seeds": list(session.seeds),
        "arms": {name: arm.meaning for name, arm in ARMS.items()},
        "worlds": session.worlds(),
        "targets": targets(parts),
        "parts": parts,
    }


def main() -> int:
    """Run as a program; return 3 when time ran out before everything was done."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    parts = {name: PARTS[name] for name in options.part}
    if options.quick:
        parts = {name: quick(part) for name, part in parts.items()}
    session = Session(options.cache, parts, tuple(options.seeds[: 1 if options.quick else None]))
    if options.export is not None:
        export(session.world(next(iter(parts.values())), session.seeds[0]), options.export)
        return 0
    works = session.works()
    for count, seconds in estimate(works, options.cache).values():
        print(f"to do: {count} runs, about {seconds / 60:.0f} minutes", flush=True)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    if not carry_out(works, options.cache, deadline, lambda text: print(text, flush=True)):
        return _MORE_TO_DO
    result = report(session)
    write_result(options.results, result)
    print("\n".join(world_table(result)))
    for name, part in result["parts"].items():
        print(f"\n{name}: {part['meaning']}")
        print("\n".join(drift_table(part)))
    print("\n".join(["", *limit_table(result)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
