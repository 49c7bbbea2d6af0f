"""Full float32 precision for matrix products and solves, as a context or decorator.

Only the reduced-precision switches of torch's backends are touched; dtypes are the callers' own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_precision", "working_dtype"]

_lock = threading.Lock()
_depth = 0
_restore: list[Callable[[], object]] = []


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and its CPU kin off inside the block; restore what was set afterwards.

    TF32 keeps 10 bits of the mantissa, so a product in it is a rotation only to about 1e-3. The
    switches are global to the process: concurrent blocks count, and the last one out restores.

    >>> with full_precision():
    ...     product = torch.eye(2) @ torch.eye(2)
    """
    global _depth
    with _lock:
        if _depth == 0:
            _restore[:] = _switch_off()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for restore in _restore:
                    restore()


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute in: the widest of the tensors', at least float32.

    >>> working_dtype(torch.ones(1, dtype=torch.bfloat16))
    torch.float32
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype) if tensor.dtype.itemsize > 2 else dtype
    return dtype


def _switch_off() -> list[Callable[[], object]]:
    # torch 2.9 gave every backend its own switch, and reading the old global one then raises.
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return [lambda: torch.set_float32_matmul_precision(before)]
    backends: Any = torch.backends  # torch's stubs do not know mkldnn.matmul
    return [_set_ieee(backends.cuda.matmul), _set_ieee(backends.mkldnn.matmul)]


def _set_ieee(backend: Any) -> Callable[[], object]:
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    return lambda: setattr(backend, "fp32_precision", before)
