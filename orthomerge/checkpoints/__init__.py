"""The only room that opens tensor files: headers, readers, the streaming writer, provenance.

Nothing here knows what tensors mean: adapters are read in ``adapters``, merges made in ``merging``.
"""

from orthomerge.checkpoints.digest import hash_checkpoint
from orthomerge.checkpoints.header import Header, TensorInfo, read_header
from orthomerge.checkpoints.reader import Checkpoint
from orthomerge.checkpoints.sources import CheckpointSource, open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointSource",
    "Header",
    "TensorInfo",
    "hash_checkpoint",
    "open_checkpoint",
    "read_header",
]
