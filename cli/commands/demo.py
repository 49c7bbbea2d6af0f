"""``orthomerge demo``: train small experts on real digits, merge them, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from orthomerge_cli.options import Json


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for models and results.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the whole demo.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A much smaller version.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    json: Json = False,
) -> None:
    """Train experts for visual domains on scikit-learn's digits, merge and compare them.

    Needs the extra `demo`, no network, and under two minutes on two cores.
    """
    raise NotImplementedError
