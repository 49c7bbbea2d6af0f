from __future__ import annotations

import pytest
import torch

from orthomerge.quiet import quiet_libraries

pytestmark = pytest.mark.slow  # the first import of transformers alone takes seconds


@pytest.mark.parametrize("threads", [1, None])
def test_quieting_is_undone(threads: int | None) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    with quiet_libraries(threads):
        assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.ERROR
        assert torch.get_num_threads() == (threads or before[2])
    after = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    assert after == before
