"""The walk of the demo: train the base, train experts, merge on the command line, measure, write.

Each step lives in a file of its own; this one keeps the order and the time.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata, util
from pathlib import Path

from orthomerge.demo.chart import draw_chart
from orthomerge.demo.data import CLEAN, Digits, in_domain, load_digits
from orthomerge.demo.evaluation import measure
from orthomerge.demo.experts import make_base, make_full, make_oft
from orthomerge.demo.merges import STRENGTHS, merge_jobs, run_merges
from orthomerge.demo.report import write_report
from orthomerge.demo.results import BASE_FOLDER, GROUPS, DemoResult, DemoRow, MadeModel
from orthomerge.demo.settings import FULL_DEMO, QUICK_DEMO, DemoSettings
from orthomerge.errors import MissingExtraError, OutputError
from orthomerge.quiet import quiet_libraries

__all__ = ["run_demo"]

# Module to import -> package to install.
_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}
_OWN_FOLDERS = {BASE_FOLDER, "experts", "merges"}
_OWN_FILES = {"results.json", "results.md", "results.png"}


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Train a base and experts on real digits, merge them by command line, measure everything.

    Args:
        out: Folder for the models, the table, the numbers and the chart.
        seed: Decides the split, the initial weights, the order of batches and the noise.
        quick: Two domains and few steps: shows that all works, not which method is better.
        overwrite: Replace what an earlier demo left in ``out``.
        say: Receives a line of text as each step begins.

    Returns:
        One row of accuracies for each model, and the paths of what was written.

    Raises:
        MissingExtraError: A package of the extra ``demo`` is not installed.
        OutputError: ``out`` is not empty, or holds something that no demo wrote.
        MergeCommandError: A merge command failed.
    """
    settings = QUICK_DEMO if quick else FULL_DEMO
    _require_packages()
    _prepare_folder(out, overwrite=overwrite)
    walk = _Walk(out, seed, settings, say)
    with walk.stage("loading libraries"):
        _load_libraries(say)
    # One thread: the model is so small that more of them only wait for each other, and the
    # numbers then do not depend on how many cores there are.
    with quiet_libraries(threads=1):
        rows = walk.rows()
    result = DemoResult(
        out=out,
        columns=(CLEAN, *settings.domains),
        rows=rows,
        settings={"seed": seed, "quick": quick, **asdict(settings), "strengths": STRENGTHS},
        versions=_versions(),
        stages=walk.stages,
    )
    with walk.stage("drawing"):
        draw_chart(result)
    write_report(result)
    return result


@dataclass
class _Walk:
    """What the steps share: where, with which settings, and the time each took."""

    out: Path
    seed: int
    settings: DemoSettings
    say: Callable[[str], None]
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - start

    def rows(self) -> tuple[DemoRow, ...]:
        """Make every model, then measure every model, group by group."""
        digits = load_digits(self.seed)
        models = [*self._trained(digits), *self._merged()]
        models.sort(key=lambda model: GROUPS.index(model.group))
        with self.stage("measuring"):
            return self._measured(digits, models)

    def _trained(self, digits: Digits) -> list[MadeModel]:
        out, seed, settings, train = self.out, self.seed, self.settings, digits.train
        with self.stage("training the base"):
            self.say(f"training the base on {len(train):,} clean digits")
            base = make_base(out, train, settings, seed)
        full, oft = [], []
        with self.stage("training the full fine-tunes"):
            for domain in settings.domains:
                self.say(f"fine-tuning a full expert on {domain} digits")
                full.append(make_full(out, domain, train, settings, seed))
        with self.stage("training the OFT adapters"):
            for domain in settings.domains:
                self.say(f"training an OFT adapter on {domain} digits")
                oft.append(make_oft(out, domain, train, settings, seed))
        return [base, *full, *oft]

    def _merged(self) -> list[MadeModel]:
        jobs = merge_jobs(self.settings.domains)
        self.say(f"merging on the command line, in {self.out}:")
        for job in jobs:
            self.say(f"$ {job.command}")
        with self.stage("merging"):
            return run_merges(jobs, self.out)

    def _measured(self, digits: Digits, models: list[MadeModel]) -> tuple[DemoRow, ...]:
        columns = (CLEAN, *self.settings.domains)
        tests = {
            name: in_domain(digits.test, name, seed=self.seed, part="test") for name in columns
        }
        self.say(
            f"measuring {len(models)} models on {len(digits.test)} test digits, seen "
            f"{len(columns)} ways"
        )
        return tuple(measure(model, self.out, tests) for model in models)


def _require_packages() -> None:
    for module, package in _PACKAGES.items():
        if util.find_spec(module) is None:
            raise MissingExtraError(package, "demo", "the demo")


def _load_libraries(say: Callable[[str], None]) -> None:
    """Pay for the slow imports here, so that the other stages' times are their own."""
    say("loading torch, transformers, PEFT and scikit-learn")
    import peft  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    from transformers import Trainer, ViTForImageClassification  # noqa: F401


def _prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Make ``out`` an empty folder; only what a demo writes is ever removed."""
    out.mkdir(parents=True, exist_ok=True)
    found = {entry.name for entry in out.iterdir()}
    foreign = found - _OWN_FOLDERS - _OWN_FILES
    if foreign:
        raise OutputError(
            "the folder holds something that no demo wrote",
            file=out,
            found=", ".join(sorted(foreign)[:5]),
            remedy="Choose a new folder.",
        )
    if found and not overwrite:
        raise OutputError(
            "the folder is not empty",
            file=out,
            remedy="Choose a new folder, or overwrite the demo in it with --overwrite.",
        )
    for name in found & _OWN_FOLDERS:
        shutil.rmtree(out / name)
    for name in found & _OWN_FILES:
        (out / name).unlink()


def _versions() -> dict[str, str]:
    packages = {package: metadata.version(package) for package in _PACKAGES.values()}
    return {"python": platform.python_version(), "cores": str(os.cpu_count()), **packages}
