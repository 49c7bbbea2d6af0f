"""Which files a merged model folder inherits from its donor."""

from __future__ import annotations

from orthomerge.adapters.sources import Source
from orthomerge.checkpoints.dtypes import CONFIG_NAMES
from orthomerge.checkpoints.folder import config_with_dtype, inherited_files, read_config
from orthomerge.merging.planning.draft import Draft

__all__ = ["add_model_files"]


def add_model_files(donor: Source, draft: Draft) -> None:
    """Take config, tokenizer and generation files from the donor: the base, else the first model.

    config.json gets the dtype that most of the output's bytes have.
    """
    folder = donor.checkpoint.folder
    config = read_config(folder)
    if folder is None or config is None:  # a file that lies somewhere, not a model folder
        return
    draft.copied_files = inherited_files(folder)
    totals: dict[str, int] = {}
    for info in (info for task in draft.tasks for info in task.outputs):
        if info.dtype in CONFIG_NAMES:
            totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
    if totals:
        main = max(totals, key=lambda dtype: totals[dtype])
        draft.written_files["config.json"] = config_with_dtype(config, CONFIG_NAMES[main])
