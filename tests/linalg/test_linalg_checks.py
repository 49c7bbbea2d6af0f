"""Checks with residuals, the precision switch, and the room's lazy front door."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
import subprocess
import sys
import threading

import pytest
import torch

from orthomerge import linalg
from orthomerge.errors import NumericalError
from orthomerge.linalg import full_precision, orthogonality, require_finite, skewness, unpack_skew


def test_orthogonality_measures_the_worst_of_the_batch() -> None:
    R = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    assert orthogonality(R) == (True, 0.0)
    R[1] *= 1 + 1e-3
    ok, residual = orthogonality(R)
    # (1 + e)^2 - 1 on each of n diagonal entries: ||.||_F / sqrt(n) = 2e + e^2.
    assert not ok
    assert residual == pytest.approx(2e-3 + 1e-6, rel=1e-9)
    assert orthogonality(R, tolerance=1e-2)[0]


@pytest.mark.parametrize("size", [2, 64, 400])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tolerance_follows_size_and_dtype(size: int, dtype: torch.dtype) -> None:
    A = unpack_skew(torch.randn(size * (size - 1) // 2, dtype=torch.float64)) / size
    R = linalg.cayley(A).to(dtype)
    assert orthogonality(R)[0]
    broken = R.clone()
    broken[0] += 50 * torch.finfo(dtype).eps * math.sqrt(size) * R[1]
    assert not orthogonality(broken, tolerance=torch.finfo(dtype).eps)[0]


def test_skewness() -> None:
    A = unpack_skew(torch.randn(2, 6, dtype=torch.float64))
    assert skewness(A) == (True, 0.0)
    assert skewness(torch.zeros(2, 3, 3)) == (True, 0.0)
    A[1] += 1e-3 * torch.eye(4, dtype=torch.float64)
    ok, residual = skewness(A)
    assert not ok
    assert residual == pytest.approx(4e-3 / float(torch.linalg.vector_norm(A[1])), rel=1e-6)


@pytest.mark.parametrize("check", [orthogonality, skewness])
def test_nan_is_never_ok(check) -> None:  # type: ignore[no-untyped-def]
    assert check(torch.full((3, 3), math.nan)) == (False, math.inf)


def test_require_finite_counts() -> None:
    X = torch.tensor([1.0, math.nan, math.inf])
    with pytest.raises(NumericalError, match=r"the input is not finite .*2 of 3"):
        require_finite(X, "the input")
    assert require_finite(X[:1], "the input") is not None


def precision_now() -> str:
    return str(torch.backends.cuda.matmul.fp32_precision)


@pytest.fixture
def _tf32():  # type: ignore[no-untyped-def]
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one global switch")
    before = precision_now()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("_tf32")
def test_full_precision_restores_what_was_set() -> None:
    with full_precision():
        assert precision_now() == "ieee"
        with full_precision():
            pass
        assert precision_now() == "ieee"
    assert precision_now() == "tf32"
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert precision_now() == "tf32"


@pytest.mark.usefixtures("_tf32")
def test_a_block_in_another_thread_does_not_restore_too_early() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with full_precision():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with full_precision():
        pass
    assert precision_now() == "ieee"
    leave.set()
    thread.join()
    assert precision_now() == "tf32"


def test_front_door_is_complete() -> None:
    for name in linalg.__all__:
        assert getattr(linalg, name).__doc__ or name in ("Correction", "PolarMethod", "StackSolver")
    with pytest.raises(AttributeError, match="no_such"):
        _ = linalg.no_such


def test_no_module_hides_a_function() -> None:
    """Importing a submodule sets its name in the package, over a function of that name."""
    modules = {module.name for module in pkgutil.iter_modules(linalg.__path__)}
    assert not modules & set(linalg.__all__)


def test_triangular_does_not_import_torch() -> None:
    code = "import sys, orthomerge.linalg.triangular; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MODULES = ["blocks", "checks", "means", "precision", "rotations", "skew", "triangular"]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"orthomerge.linalg.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("_tf32")
def test_cuda_agrees_with_cpu_although_tf32_is_on() -> None:
    A = unpack_skew(0.1 * torch.randn(3, 4, 496))
    R = linalg.cayley(A.cuda())
    assert orthogonality(R)[0]
    torch.testing.assert_close(R.cpu(), linalg.cayley(A), atol=2e-6, rtol=0)
    merged, _ = linalg.merge_algebra(A.cuda(), [1, 2, 3])
    torch.testing.assert_close(merged.cpu(), linalg.merge_algebra(A, [1, 2, 3])[0])
    W = torch.randn(64, 128)
    rotated = linalg.rotate_columns(W.cuda(), R[0])
    torch.testing.assert_close(
        rotated.cpu(), linalg.rotate_columns(W, R[0].cpu()), atol=1e-5, rtol=0
    )
