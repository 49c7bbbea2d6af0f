"""Content digests of checkpoints: independent of sharding, file names and tensor order.

Each tensor's bytes are hashed while they are read for the merge, so that provenance costs no
second pass; the checkpoint's digest is the hash of the sorted list of tensor digests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blake3 import blake3

from orthomerge.checkpoints.header import TensorInfo
from orthomerge.checkpoints.reader import Checkpoint

if TYPE_CHECKING:
    import torch

__all__ = [
    "DIGEST_PLACEHOLDER",
    "HashingSource",
    "content_digest",
    "hash_checkpoint",
    "hash_tensor",
    "tensor_hasher",
]

_BLOCK_BYTES = 1 << 20
_PREFIX = "blake3:"

#: As long as every real digest, so that a header can be sized before the content is known.
DIGEST_PLACEHOLDER = _PREFIX + "0" * 64


def tensor_hasher() -> blake3:
    """Return the incremental hash that tensor bytes are fed to, in order.

    BLAKE3: as hard to forge as SHA-256, and several times faster, which a merge feels.
    """
    return blake3()


def content_digest(infos: Iterable[TensorInfo], digests: Mapping[str, str]) -> str:
    """Combine tensor digests into the digest of a checkpoint.

    ``BLAKE3`` over the lines ``name NUL dtype NUL shape NUL hex LF`` in order of name, for every
    tensor that has a digest. The name is written as a JSON string, so that no name can imitate the
    end of a line.

    Args:
        infos: The checkpoint's tensors.
        digests: Tensor name to the hex digest of its bytes.

    Returns:
        ``"blake3:<hex>"``.
    """
    total = blake3()
    for info in sorted(infos, key=lambda info: info.name):
        if info.name in digests:
            shape = "x".join(map(str, info.shape))
            name = json.dumps(info.name)
            line = f"{name}\0{info.dtype}\0{shape}\0{digests[info.name]}\n"
            total.update(line.encode())
    return _PREFIX + total.hexdigest()


def hash_tensor(checkpoint: Checkpoint, name: str) -> str:
    """Read one tensor once and return the hex digest of its bytes."""
    size = checkpoint.tensors[name].nbytes
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, size)))
    hasher = tensor_hasher()
    for start in range(0, size, _BLOCK_BYTES):
        block = buffer[: min(_BLOCK_BYTES, size - start)]
        checkpoint.read_into(name, block, start)
        hasher.update(block)
    return hasher.hexdigest()


@dataclass(frozen=True)
class HashingSource:
    """A checkpoint that hashes whole tensors as they are read, for what reads them anyway.

    Attributes:
        checkpoint: What is read.
        digests: Tensor name to the hex digest of its bytes, of every tensor read so far.
    """

    checkpoint: Checkpoint
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Where it came from, as the user wrote it."""
        return self.checkpoint.origin

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, by name."""
        return self.checkpoint.tensors

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor, and keep the digest of its bytes."""
        import torch

        values = self.checkpoint.read(name)
        raw = values.cpu().contiguous().reshape(-1).view(torch.uint8)
        self.digests[name] = blake3(raw.numpy().data).hexdigest()
        return values

    def digest(self, name: str) -> str:
        """Return the hex digest of a tensor's bytes; it is read now if it has not been."""
        return self.digests.get(name) or hash_tensor(self.checkpoint, name)


def hash_checkpoint(checkpoint: Checkpoint) -> str:
    """Read all tensors of a checkpoint once and return its content digest."""
    digests = {name: hash_tensor(checkpoint, name) for name in checkpoint.tensors}
    return content_digest(checkpoint.tensors.values(), digests)
