"""Write a demo's numbers as JSON and its table as Markdown."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from itertools import groupby

from orthomerge.demo.results import DemoResult, DemoRow

__all__ = ["write_report"]


def write_report(result: DemoResult) -> None:
    """Write both files into the demo's folder."""
    result.markdown_path.write_text(_markdown(result), encoding="utf-8")
    text = json.dumps(_as_json(result), indent=2, ensure_ascii=False)
    result.json_path.write_text(text + "\n", encoding="utf-8")


def _as_json(result: DemoResult) -> dict[str, object]:
    return {
        "columns": list(result.columns),
        "rows": [_row_as_json(row) for row in result.rows],
        "settings": dict(result.settings),
        "seconds": {name: round(value, 2) for name, value in result.stages.items()},
        "total_seconds": round(result.seconds, 2),
        "versions": dict(result.versions),
    }


def _row_as_json(row: DemoRow) -> dict[str, object]:
    return {
        "name": row.name,
        "group": row.group,
        "accuracy": {name: round(value, 6) for name, value in row.accuracy.items()},
        "mean": round(row.mean, 6),
        "path": row.model.path,
        "command": row.model.command or None,
        "seconds": round(row.model.seconds, 2),
    }


def _markdown(result: DemoResult) -> str:
    return "\n".join(
        [
            "# The digits demo",
            "",
            "Accuracy in % on the test digits. *Mean* is over the experts' domains, without the "
            "clean digits.",
            "",
            *_table(result),
            "",
            *_notes(),
            "",
            "## The merge commands",
            "",
            "They ran in this folder, exactly as printed:",
            "",
            "```console",
            *(f"$ {row.model.command}" for row in result.rows if row.model.command),
            "```",
            "",
            f"The whole demo took {result.seconds:.0f} s.",
            "",
        ]
    )


def _table(result: DemoResult) -> Iterator[str]:
    yield f"| model | {' | '.join(result.columns)} | mean |"
    yield "|---|" + "---:|" * (len(result.columns) + 1)
    for group, rows in groupby(result.rows, key=lambda row: row.group):
        if group != "base":
            yield f"| **{group}** |" + " |" * (len(result.columns) + 1)
        for row in rows:
            values = [row.accuracy[name] for name in result.columns] + [row.mean]
            yield f"| {row.name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |"


def _notes() -> list[str]:
    text = """
    The classifier head is trained with the base and never again: all experts share it. The full
    fine-tunes train everything else, the OFT adapters rotate the attention's and MLP's linear
    layers. "Folded" experts are the OFT adapters as PEFT folds them into the base, merged as
    ordinary checkpoints; only these rows and the orthomerge rows start from the same experts. The
    strengths were fixed before any merge was measured; none was tuned. One split, one seed, a model
    of seventy thousand parameters: this shows how merging works, not which method is best.
    """
    return textwrap.wrap(" ".join(text.split()), 100)
