"""Write what a run made: the adapter or model, its record, its log; each file made durable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orthomerge.checkpoints.journal import fsync_folder, fsync_write
from orthomerge.checkpoints.json_text import json_text
from orthomerge.checkpoints.provenance import PROVENANCE_NAME, provenance_json

__all__ = ["LOG_NAME", "REPORT_NAME", "StepLog", "write_model"]

LOG_NAME, REPORT_NAME = "unlearning_steps.jsonl", "unlearning.json"


class StepLog:
    """One JSON object per optimizer step, appended as they are made.

    Args:
        path: The file.
        after: Steps of an earlier, interrupted run that are kept; later ones are dropped.
    """

    def __init__(self, path: Path, *, after: int = 0) -> None:
        kept = []
        if after and path.is_file():
            lines = path.read_text("utf-8").split("\n")[:-1]  # after the last: nothing, or torn
            kept = [line for line in lines if json.loads(line)["step"] <= after]
        self._path = path
        path.write_text("".join(f"{line}\n" for line in kept), "utf-8")

    def append(self, facts: Mapping[str, Any]) -> None:
        """Add one step."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json_text(facts, indent=None) + "\n")

    def text(self) -> str:
        """Return everything logged."""
        return self._path.read_text("utf-8")


def write_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    provenance: Mapping[str, Any],
    report: Mapping[str, Any],
    log: str,
    name_or_path: str,
) -> list[str]:
    """Write the output's files into a folder and return their names.

    An adapter's config names ``name_or_path`` as its base; a whole model takes its tokenizer along.
    """
    adapter = hasattr(model, "peft_config")
    if adapter:
        for config in model.peft_config.values():
            config.base_model_name_or_path = name_or_path
            for key, value in vars(config).items():
                if isinstance(value, set):  # whose order differs from process to process
                    setattr(config, key, sorted(value))
    for stale in folder.iterdir():  # of an attempt that failed
        stale.unlink()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    if not adapter:
        tokenizer.save_pretrained(folder)
    fsync_write(folder / PROVENANCE_NAME, (provenance_json(provenance) + "\n").encode())
    fsync_write(folder / REPORT_NAME, (json_text(report, indent=2) + "\n").encode())
    fsync_write(folder / LOG_NAME, log.encode())
    names = [path.name for path in folder.iterdir()]
    usual = (folder / REPORT_NAME).stat().st_mode
    for name in names:
        (folder / name).chmod(usual)  # safetensors lets nobody else read what it writes
    _flush(folder / name for name in names)
    fsync_folder(folder)
    return names


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
