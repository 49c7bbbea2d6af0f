"""Turn what a user names (file, folder, hub repository, dict) into an opened checkpoint.

Only an explicit ``hf:`` prefix may touch the network. Which kind of model or adapter the tensors
form is decided by ``adapters.sources``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from orthomerge.checkpoints.header import Header, read_header
from orthomerge.checkpoints.pickles import open_pickles
from orthomerge.checkpoints.reader import Checkpoint, FileCheckpoint
from orthomerge.checkpoints.state_dict import StateDictCheckpoint
from orthomerge.errors import (
    CheckpointError,
    MissingExtraError,
    OrthoMergeError,
    ShardIndexError,
    combined,
)

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointSource", "open_checkpoint"]

CheckpointSource: TypeAlias = "str | Path | Mapping[str, torch.Tensor]"

_HUB_PREFIX = "hf:"
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.(safetensors|bin)")
_PREFERRED = ("model.safetensors", "adapter_model.safetensors")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md"]


def open_checkpoint(source: CheckpointSource) -> Checkpoint:
    """Open a checkpoint, reading headers only.

    Args:
        source: A ``.safetensors`` file, a shard index, a folder with either, a pickle file
            (read with ``weights_only``), ``hf:org/name[@revision]``, or a state dict.

    Raises:
        CheckpointError: Nothing is there, or what is there is damaged.
        MissingExtraError: ``hf:`` was used without huggingface-hub.
    """
    if isinstance(source, Mapping):
        return StateDictCheckpoint(source)
    origin = str(source)
    path = _download(origin) if origin.startswith(_HUB_PREFIX) else Path(source)
    _check_present(origin, path)
    if path.is_dir():
        return _open_folder(origin, path)
    if path.name.endswith(_INDEX_SUFFIX):
        return _open_shards(origin, path)
    if path.suffix == ".safetensors":
        return FileCheckpoint(origin, {path: read_header(path)}, path.parent)
    if path.suffix in _PICKLE_SUFFIXES:
        return open_pickles(origin, [path], path.parent)
    raise CheckpointError(
        f"files of type '{path.suffix}' are not checkpoints",
        file=origin,
        remedy="Give a .safetensors file, a shard index, or a model folder.",
    )


def _check_present(origin: str, path: Path) -> None:
    try:
        present = path.exists()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=origin) from error
    if not present:
        raise CheckpointError(
            "no such file or folder",
            file=origin,
            remedy=f"For a model on the Hub write {_HUB_PREFIX}{origin}."
            if re.fullmatch(r"[\w.-]+/[\w.-]+", origin)
            else "Check the path.",
        )


def _open_folder(origin: str, folder: Path) -> Checkpoint:
    files = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*" + _INDEX_SUFFIX))
    preferred = [path for path in files if path.name in _PREFERRED]
    if len(indexes) > 1:
        raise _ambiguous(origin, "shard indexes", indexes)
    if indexes:
        shards = _open_shards(origin, indexes[0])
        unnamed = [path for path in preferred if path not in shards.files]
        if unnamed:
            raise _ambiguous(origin, "models", [*unnamed, indexes[0]])
        return shards
    if files:
        chosen = preferred if len(preferred) == 1 else _complete_set(origin, files)
        return FileCheckpoint(origin, {path: read_header(path) for path in chosen}, folder)
    pickles = sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("adapter_model.bin"))
    if pickles:
        whole = [path for path in pickles if path.name == "pytorch_model.bin"]
        return open_pickles(origin, whole or _complete_set(origin, pickles), folder)
    inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    raise CheckpointError(
        "the folder holds no model weights",
        file=origin,
        expected="*.safetensors, pytorch_model.bin or adapter_model.bin",
        found=f"folders of adapters: {', '.join(inside)}" if inside else None,
        remedy=f"Name one of them, e.g. {folder / inside[0]}."
        if inside
        else "Give the folder that save_pretrained wrote.",
    )


def _open_shards(origin: str, index_path: Path) -> FileCheckpoint:
    weight_map = _read_index(index_path)
    shards: dict[Path, Header] = {}
    problems: list[OrthoMergeError] = []
    for filename in sorted(set(weight_map.values())):
        path = index_path.parent / filename
        if not _is_file(path):
            problems.append(
                ShardIndexError(
                    f"the shard {filename} is missing",
                    file=index_path,
                    remedy="Fetch the model again, completely.",
                )
            )
            continue
        try:
            shards[path] = read_header(path)
        except OrthoMergeError as error:
            problems.append(error)
    if problems:
        raise combined(problems)
    _check_index(index_path, weight_map, shards)
    return FileCheckpoint(origin, shards, index_path.parent)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _complete_set(origin: str, files: list[Path]) -> list[Path]:
    """Return the files of a folder without index, if it is one file or a complete set of shards.

    Raises:
        ShardIndexError: Shards are missing, or the names do not say what belongs together.
    """
    names = [match for path in files if (match := _SHARD_NAME.fullmatch(path.name))]
    if len(files) == 1 and not names:
        return files
    stems = {(match["stem"], int(match["count"])) for match in names}
    parts = {int(match["part"]) for match in names}
    count = next(iter(stems))[1] if stems else 0
    if len(names) < len(files) or len(stems) > 1 or not parts <= set(range(1, count + 1)):
        raise _ambiguous(origin, "weight files without an index", files)
    if len(parts) < count:
        raise ShardIndexError(
            f"holds only {len(parts)} of {count} shards",
            file=origin,
            remedy="Fetch the model again, completely.",
        )
    return files


def _ambiguous(origin: str, what: str, paths: list[Path]) -> ShardIndexError:
    listed = ", ".join(path.name for path in paths[:6])
    return ShardIndexError(
        f"holds several {what}: {listed}",
        file=origin,
        remedy="Name the one that is meant, or restore model.safetensors.index.json.",
    )


def _read_index(path: Path) -> dict[str, str]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ShardIndexError("the index names this key twice", file=path, tensor=key)
        return dict(pairs)

    try:
        index = json.loads(path.read_text("utf-8"), object_pairs_hook=no_duplicates)
        weight_map = index["weight_map"]
        complete = all(isinstance(item, str) for pair in weight_map.items() for item in pair)
    except OSError as error:
        raise ShardIndexError(f"cannot be read: {error.strerror}", file=path) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardIndexError(
            "is not a shard index (a JSON object with a weight_map)", file=path
        ) from error
    if not weight_map or not complete:
        raise ShardIndexError("its weight_map must map tensor names to file names", file=path)
    for name, filename in weight_map.items():
        target = PurePosixPath(filename)
        outside = target.is_absolute() or ".." in target.parts or "\\" in filename
        if outside or not target.parts:
            raise ShardIndexError(
                f"points to '{filename}', outside its folder",
                file=path,
                tensor=name,
                remedy="Do not use this checkpoint; fetch it again from a source you trust.",
            )
    return dict(weight_map)


def _check_index(path: Path, weight_map: dict[str, str], shards: dict[Path, Header]) -> None:
    present = {name: shard for shard, header in shards.items() for name in header.tensors}
    problems: list[OrthoMergeError] = [
        ShardIndexError("is in the index but in no shard", file=path, tensor=name)
        for name in weight_map
        if name not in present
    ]
    for shard, header in shards.items():
        for name in header.tensors:
            if name not in weight_map:
                problem = f"is in {shard.name} but not in the index"
            elif path.parent / weight_map[name] != shard:
                problem = f"is in {shard.name}, the index says {weight_map[name]}"
            else:
                continue
            problems.append(ShardIndexError(problem, file=path, tensor=name))
    if problems:
        raise combined(problems)


def _download(origin: str) -> Path:
    repo, _, revision = origin.removeprefix(_HUB_PREFIX).partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface-hub", "hub", f"Reading {origin}") from error
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_FILES)
    except Exception as error:  # the hub client's own tree differs between its major versions
        raise CheckpointError(
            f"could not be fetched from the Hub: {type(error).__name__}: {error}",
            file=origin,
            remedy="Check the name, the revision, your token and the network.",
        ) from error
    return Path(folder)
