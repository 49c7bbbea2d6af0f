"""Decide whether an output may be written where it was asked for; nothing is written here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from orthomerge.errors import OutputError

__all__ = ["check_destination", "check_replaceable", "partial_folder"]

_ADAPTERS = ("oft", "lora")


def partial_folder(output: Path) -> Path:
    """Return the folder in which an output grows: beside it, named ``OUT.partial``.

    Raises:
        OutputError: The path has no name of its own: ``.``, ``..`` or ``/``.
    """
    if output.name in ("", ".."):
        raise OutputError(
            "is not a name for an output", file=output, remedy="Name a new folder or file."
        )
    return output.with_name(output.name + ".partial")


def check_destination(
    output: Path, inputs: Iterable[Path], *, single_file: bool, overwrite: bool
) -> None:
    """Refuse an output that exists (without ``overwrite``) or that would touch an input.

    Args:
        output: Where the result shall be.
        inputs: Files and folders of the sources.
        single_file: The output is one file; it may lie beside input files, not replace one.
        overwrite: Whether an existing output may be replaced.

    Raises:
        OutputError: With the reason.
    """
    targets = _places(output)
    cleared = targets | _places(partial_folder(output))
    for source in inputs:
        for path in _places(source):
            inside = not single_file and any(path in target.parents for target in targets)
            if inside or any(target == path or target in path.parents for target in cleared):
                raise OutputError(
                    f"the output would overwrite or lie inside the input {source}",
                    file=output,
                    remedy="Choose another output path; inputs are never overwritten.",
                )
    if os.path.lexists(output) and not overwrite:
        raise OutputError(
            "the output already exists",
            file=output,
            remedy="Choose another path, or pass --overwrite to replace it.",
        )
    check_replaceable(output, single_file)


def _places(path: Path) -> set[Path]:
    """Return where a path leads and, if it is a symbolic link, where the link itself lies."""
    parent = Path(os.path.realpath(path.parent))  # unlike resolve(), bears a loop of links
    return {Path(os.path.realpath(path)), parent / path.name}


def check_replaceable(output: Path, single_file: bool) -> None:
    """Guard against ``--overwrite`` on something that is no output, say a home folder.

    Raises:
        OutputError: It is not of the kind that is to be written, or does not look like a model.
    """
    if not output.exists():
        return
    if output.is_dir() == single_file:
        kinds = ("folder", "file") if single_file else ("file", "folder")
        raise OutputError(
            f"is a {kinds[0]}, and a {kinds[1]} is to be written there",
            file=output,
            remedy="Choose another path; one ending in .safetensors makes a file, others a folder.",
        )
    if not single_file and not _looks_like_output(output):
        raise OutputError(
            "the folder to overwrite does not look like a model, or holds other folders",
            file=output,
            remedy="Remove it yourself if it may go, or choose another path.",
        )


def _looks_like_output(folder: Path) -> bool:
    paths = list(folder.iterdir())
    known = {"config.json", "adapter_config.json", "orthomerge.json"}
    marked = any(path.name in known or path.suffix == ".safetensors" for path in paths)
    # An extraction holds its two adapters in folders of these names, and no others.
    inner = [path for path in paths if path.is_dir()]
    ours = all(path.name in _ADAPTERS and _looks_like_output(path) for path in inner)
    return not paths or (marked and ours)
