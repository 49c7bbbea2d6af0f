"""Keep transformers and PEFT from printing while they work for us; errors still come through."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_libraries", "quiet_peft"]


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide one FutureWarning: PEFT asks transformers 5 for a property that has been renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


@contextmanager
def quiet_libraries(threads: int | None = None) -> Iterator[None]:
    """Silence transformers' bars and logs, and put them back at the end.

    Args:
        threads: What torch's number of threads is set to meanwhile; None leaves it.
    """
    import torch
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    threads_before = torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads or threads_before)
    try:
        with quiet_peft():
            yield
    finally:
        torch.set_num_threads(threads_before)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
