"""One run of the benchmark: which experts and cells it needs and where they are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from circumstances import sources_digest

from orthomerge.errors import OrthoMergeError
from tasks import packages, splits
from tasks.contenders import Contender
from tasks.encoder import Encoder
from tasks.experts import ExpertSettings, expert_folder, train_expert
from tasks.families import FAMILIES
from tasks.protocol import Bench, Sizes, cell_path
from tasks.schedule import Work, write_json

__all__ = ["Session"]


@dataclass(frozen=True)
class Session:
    """What one run measures.

    Args:
        cache: Holds packages, experts and cells.
        tasks: In the order of the report.
        families: Names of families.
        contenders: By name.
        seeds: Of the experts.
        steps: Of the training.
        sizes: Texts per task.
        device: Where to compute.
        bf16: Whether to score in bf16 autocast.
    """

    cache: Path
    tasks: tuple[str, ...]
    families: tuple[str, ...]
    contenders: dict[str, Contender]
    seeds: tuple[int, ...]
    steps: int
    sizes: Sizes
    device: str = "cpu"
    bf16: bool = False

    @cached_property
    def examples(self) -> dict[str, splits.Examples]:
        """The texts of the tasks."""
        everything = splits.load(self.cache)
        return {task: everything[task] for task in self.tasks}

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded when first needed."""
        folder = packages.unpacked_model(self.cache)
        tasks = {name: splits.TASKS[name] for name in self.tasks}
        return Encoder(folder, tasks, self.device, bf16=self.bf16)

    @cached_property
    def bench(self) -> Bench:
        """The tokenised texts."""
        return Bench(self.encoder, self.examples, self.sizes)

    @cached_property
    def digest(self) -> str:
        """Of the library's sources: a cell measured with other sources is measured again."""
        return sources_digest(["orthomerge"])

    def check_sources(self) -> None:
        """Refuse to go on when the library was edited since the start.

        Raises:
            SystemExit: A cell would be kept under sources that did not make it.
        """
        if sources_digest(["orthomerge"]) != self.digest:
            raise SystemExit("orthomerge's sources changed during the run: call again")

    def _experts(self, family: str, seed: int) -> Iterator[tuple[ExpertSettings, Path]]:
        for expert in FAMILIES[family].experts(self.tasks, seed, self.steps):
            train = self.examples[expert.task]["train"]
            yield expert, expert_folder(self.cache, expert, train)

    def folders(self, family: str, seed: int) -> dict[str, Path]:
        """Return where the experts of a family and seed are or will be, by task."""
        return {expert.task: folder for expert, folder in self._experts(family, seed)}

    def training(self) -> list[Work]:
        """Return the training of every expert, each once."""
        works = {}
        for family in self.families:
            for seed in self.seeds:
                for expert, folder in self._experts(family, seed):
                    works.setdefault(folder, self._training(f"{family} {seed}", expert, folder))
        return list(works.values())

    def _training(self, whose: str, expert: ExpertSettings, folder: Path) -> Work:
        def run() -> None:
            train_expert(self.cache, expert, self.examples[expert.task], self.encoder)

        like = f"experts/{expert.kind}-{expert.task}-*/expert.json"
        label = f"expert {whose} {expert.task}"
        return Work(label, "expert", folder / "expert.json", like, run)

    def cells(self) -> list[Work]:
        """Return everything that is measured, seed by seed, so that early stops are useful."""
        works = [self._cell("any", "base", 0, lambda: self.bench.base_cell())]
        for seed in self.seeds:
            for family in self.families:
                folders = self.folders(family, seed)
                works.append(self._cell(family, "experts", seed, _expert_cell(self, folders)))
                for name, contender in self.contenders.items():
                    run = _merge_cell(self, contender, folders, seed)
                    works.append(self._cell(family, name, seed, run))
        return works

    def _cell(
        self, family: str, method: str, seed: int, measure: Callable[[], dict[str, Any]]
    ) -> Work:
        path = self.path(family, method, seed)
        label, like = f"{family} {seed} {method}", f"cells/*-{method}-[0-9]-*.json"
        return Work(label, "cell", path, like, lambda: write_json(path, measure()))

    def path(self, family: str, method: str, seed: int) -> Path:
        """Return where a cell is kept: under a hash of all that it depends on."""
        key: dict[str, Any] = {
            "family": family,
            "method": method,
            "seed": seed,
            "tasks": self.tasks,
            "sizes": asdict(self.sizes),
            "bf16": self.bf16,
        }
        if method != "base":
            key["experts"] = [folder.name for folder in self.folders(family, seed).values()]
        if method in self.contenders:
            key["contender"] = asdict(self.contenders[method])
            key["orthomerge"] = self.digest
        return cell_path(self.cache, key)

    def collected(self, family: str) -> dict[str, dict[int, dict[str, Any]]]:
        """Return the finished cells of a family: method → seed → cell."""
        base = json.loads(self.path("any", "base", 0).read_text())
        found = {"base": dict.fromkeys(self.seeds, base)}
        for name in ("experts", *self.contenders):
            paths = {seed: self.path(family, name, seed) for seed in self.seeds}
            if all(path.exists() for path in paths.values()):
                found[name] = {seed: json.loads(p.read_text()) for seed, p in paths.items()}
        return found


def _expert_cell(session: Session, folders: dict[str, Path]) -> Callable[[], dict[str, Any]]:
    return lambda: session.bench.expert_cell(folders)


def _merge_cell(
    session: Session, contender: Contender, folders: dict[str, Path], seed: int
) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        try:
            cell = session.bench.merge_cell(contender, folders, seed)
        except OrthoMergeError as refused:
            cell = {"refused": str(refused), "seconds": {"total": 0.0}}
        session.check_sources()
        return cell

    return measure
