"""Drive the streaming writer over a state dict, the way the engine does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from orthomerge.checkpoints.dtypes import safetensors_dtype
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.layout import plan_layout
from orthomerge.checkpoints.sources import open_checkpoint
from orthomerge.checkpoints.staging import Staging
from orthomerge.checkpoints.writer import StreamingWriter

StateDict = dict[str, torch.Tensor]


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def infos(tensors: StateDict) -> list[TensorInfo]:
    return [TensorInfo(n, safetensors_dtype(t.dtype), tuple(t.shape)) for n, t in tensors.items()]


def start(
    output: Path, tensors: StateDict, *, limit: int = 1 << 40, single: bool = False, **flags: bool
) -> StreamingWriter:
    filename = output.name if single else "model.safetensors"
    layout = plan_layout(infos(tensors), max_shard_bytes=limit, filename=filename)
    return StreamingWriter(layout, Staging(output, "plan", ["inputs"], **flags))


def fill(writer: Any, tensors: StateDict, names: Iterable[str] | None = None) -> None:
    for name in tensors if names is None else names:
        writer.write(name, 0, memoryview(as_bytes(tensors[name])))
        writer.finish(name, {"of": name})


def assert_published(output: Path, tensors: StateDict) -> None:
    checkpoint = open_checkpoint(output)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert as_bytes(checkpoint.read(name)) == as_bytes(tensor)
    checkpoint.close()
    assert not output.with_name(output.name + ".partial").exists()
