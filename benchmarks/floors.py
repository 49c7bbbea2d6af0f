"""Programs that a merge can be compared with: move the bytes, and average in the plain way.

Each runs as a process of its own, makes its output durable as orthomerge does (files, rename,
folder), and does nothing else: no checks, no hashes, no resuming.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

__all__ = ["average", "copy", "publish", "traffic"]

_BLOCK_BYTES = 1 << 20


def copy(inputs: list[Path], output: Path) -> None:
    """Read every byte of all inputs and write the first input's: the least any merge can do."""
    partial = _start(output)
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    for shard in sorted(inputs[0].glob("*.safetensors")):
        with (partial / shard.name).open("wb", buffering=0) as target:
            files = [(folder / shard.name).open("rb", buffering=0) for folder in inputs]
            while count := files[0].readinto(buffer):
                target.write(buffer[:count])
                for other in files[1:]:
                    other.readinto(buffer)
            for file in files:
                file.close()
    publish(partial, output)


def average(inputs: list[Path], output: Path) -> None:
    """Average the models in fp32 and round once, tensor by tensor, in a few lines of torch."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    partial = _start(output)
    for shard in sorted(inputs[0].glob("*.safetensors")):
        files = [safe_open(folder / shard.name, framework="pt") for folder in inputs]
        merged = {}
        for name in files[0].keys():  # noqa: SIM118 - safe_open is no mapping
            total = files[0].get_tensor(name).float()
            for file in files[1:]:
                total += file.get_tensor(name)
            merged[name] = (total / len(files)).to(torch.bfloat16)
        save_file(merged, partial / shard.name, metadata={"format": "pt"})
    publish(partial, output)


def traffic(inputs: list[Path], output: Path, nbytes: int) -> None:
    """Read every byte of all inputs and write a file of another size."""
    partial = _start(output)
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    for path in sorted(path for folder in inputs for path in folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with (partial / "adapter_model.safetensors").open("wb", buffering=0) as target:
        for start in range(0, nbytes, _BLOCK_BYTES):
            target.write(buffer[: min(_BLOCK_BYTES, nbytes - start)])
    publish(partial, output)


def _start(output: Path) -> Path:
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, output: Path) -> None:
    """Wait until every file is on disk, rename the folder, wait until that is on disk."""
    for path in [*partial.iterdir(), partial]:
        _fsync(path)
    partial.rename(output)
    _fsync(output.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("floor", choices=("copy", "average", "traffic"))
    parser.add_argument("inputs", type=Path, nargs="+", help="folders with equally cut files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bytes", type=int, help="size of the output of traffic")
    options = parser.parse_args()
    if options.floor == "traffic":
        traffic(options.inputs, options.output, options.bytes)
        return
    {"copy": copy, "average": average}[options.floor](options.inputs, options.output)


if __name__ == "__main__":
    main()
