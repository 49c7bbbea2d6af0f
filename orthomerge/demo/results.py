"""What the demo makes and hands back: models, one row of accuracies for each, and file paths.

Plain values only, so that the command line can draw its own table from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ADAPTERS",
    "BASE",
    "BASE_FOLDER",
    "FOLDED",
    "FULL",
    "FULL_EXPERTS",
    "FULL_MERGES",
    "GROUPS",
    "OFT_EXPERTS",
    "OFT_MERGES",
    "DemoResult",
    "DemoRow",
    "MadeModel",
]

BASE = "base"
FULL_EXPERTS = "full fine-tunes"
FULL_MERGES = "merges of the full fine-tunes"
OFT_EXPERTS = "OFT adapters"
OFT_MERGES = "merges of the OFT adapters"
GROUPS = (BASE, FULL_EXPERTS, FULL_MERGES, OFT_EXPERTS, OFT_MERGES)

# Folders inside the demo's folder, with forward slashes as in the commands.
BASE_FOLDER = "base"
FULL = "experts/full"
ADAPTERS = "experts/oft"
FOLDED = "experts/oft-folded"


@dataclass(frozen=True)
class MadeModel:
    """A model on disk, not yet measured.

    Args:
        name: What the model is called in the tables.
        group: One of ``GROUPS``.
        path: Its folder, relative to the demo's folder.
        adapter: Whether the folder holds an adapter rather than a full checkpoint.
        command: The command line that made it, to be typed in the demo's folder; empty for a
            model that was trained.
        seconds: Wall-clock time of the training or of the command.
    """

    name: str
    group: str
    path: str
    adapter: bool = False
    command: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class DemoRow:
    """One model's accuracies, each a fraction in [0, 1].

    Args:
        model: The model measured.
        accuracy: One entry for each column of images, the clean ones first.
        mean: Average over the experts' domains; the clean digits are not part of it.
    """

    model: MadeModel
    accuracy: Mapping[str, float]
    mean: float

    @property
    def name(self) -> str:
        """Return the model's name."""
        return self.model.name

    @property
    def group(self) -> str:
        """Return the model's group."""
        return self.model.group


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured.

    Args:
        out: The demo's folder; it keeps the base, the experts and the merges.
        columns: Names of the accuracy columns: ``"clean"``, then the experts' domains.
        rows: One row for each model, group by group.
        settings: Seed, sizes, steps, learning rates and the merges' strengths.
        versions: Versions of Python and of the packages used.
        stages: Wall-clock seconds of each stage, in order.
    """

    out: Path
    columns: tuple[str, ...]
    rows: tuple[DemoRow, ...]
    settings: Mapping[str, object]
    versions: Mapping[str, str]
    stages: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Return the wall-clock seconds of all stages together."""
        return sum(self.stages.values())

    @property
    def json_path(self) -> Path:
        """Return where the numbers are."""
        return self.out / "results.json"

    @property
    def markdown_path(self) -> Path:
        """Return where the table is."""
        return self.out / "results.md"

    @property
    def png_path(self) -> Path:
        """Return where the chart is."""
        return self.out / "results.png"
