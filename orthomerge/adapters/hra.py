"""HRA adapters: a product of Householder reflections on the input side.

An odd number of reflections, and any number of orthogonalised ones, is no rotation with a Cayley
generator; their effect on a weight is exact all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.contents import build_modules, malformed, read_contents
from orthomerge.adapters.convention import EXACT
from orthomerge.adapters.effective import BackMap
from orthomerge.adapters.rotated import OftModule, RotationAdapter, TensorSource, read_finite
from orthomerge.errors import AdapterError, NumericalError

if TYPE_CHECKING:
    import torch

    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["HraAdapter", "reflection_problem"]

_PARAMETERS = ("hra_u",)
_DEPENDENT = 1e-5  # relative length below which PEFT's float32 orthogonalisation returns noise


@dataclass(frozen=True)
class HraAdapter(RotationAdapter):
    """An HRA adapter, ``W_eff = W0 H`` with ``H = H_1 ... H_r`` and ``H_i = I - 2 u_i u_i^T``.

    The u_i are the normalised columns of the stored tensor [n, r]; with ``apply_GS`` they are
    orthogonalised first, and ``H = I - 2 U U^T``. In ``modules`` H is one dense block.

    References:
        Bridging LoRA and orthogonal fine-tuning by Householder reflections, arXiv:2405.17484.
    """

    @classmethod
    def from_checkpoint(cls, checkpoint: TensorSource, config: AdapterConfig) -> HraAdapter:
        """Recognise an HRA adapter from its headers.

        Raises:
            AdapterError: It is malformed.
            ProblemsError: In several ways.
        """
        origin = checkpoint.origin
        config.value("apply_GS", bool, False)
        contents = read_contents(checkpoint.tensors, origin, _PARAMETERS, "HRA")
        modules = build_modules(
            contents, lambda name, infos: _module(name, infos, origin), origin, "HRA"
        )
        return cls(
            origin, config, EXACT, modules, contents.others, contents.base_copies, checkpoint
        )

    @property
    def orthogonalised(self) -> bool:
        """Whether the reflections are made orthogonal to each other first."""
        return self.config.value("apply_GS", bool, False)

    @property
    def description(self) -> str:
        """What it is, in words."""
        counts = sorted({self.reflections(name) for name in self.modules})
        kind = " orthogonalised" if self.orthogonalised else ""
        return f"HRA adapter ({'/'.join(map(str, counts))}{kind} reflections)"

    def reflections(self, module_name: str) -> int:
        """Return how many reflections a module is turned by."""
        return self.source.tensors[self.modules[module_name].key].shape[1]

    def blocks(
        self, module_name: str, dtype: torch.dtype, back_map: BackMap = "as_trained"
    ) -> torch.Tensor:
        """Return H as one block [1, n, n]; a reflection when the number of columns is odd."""
        import torch

        key = self.modules[module_name].key
        U = read_finite(self.source, key, dtype)
        norms = torch.linalg.vector_norm(U, dim=0)
        if bool((norms == 0).any()):
            raise _degenerate("has a column of zeros, which no reflection belongs to", self, key)
        U = U / norms
        H = torch.eye(len(U), dtype=dtype, device=U.device)
        if self.orthogonalised:
            U = self._orthogonal(U, key)
            return (H - 2 * U @ U.mT)[None]
        for column in U.unbind(1):
            H -= 2 * torch.outer(H @ column, column)
        return H[None]

    def _orthogonal(self, U: torch.Tensor, key: str) -> torch.Tensor:
        """Orthogonalise unit columns one after the other."""
        import torch

        done: list[torch.Tensor] = []
        for column in U.unbind(1):
            left = column
            for other in done:
                left = left - (other @ left) * other
            length = torch.linalg.vector_norm(left)
            if float(length) < _DEPENDENT:
                raise _degenerate("has linearly dependent columns under apply_GS", self, key)
            done.append(left / length)
        return torch.stack(done, 1)

    def skew(self, module_name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense generator [1, n, n]; see ``RotationAdapter.skew``.

        Raises:
            AdapterError: H is a reflection or a half-turn.
            NumericalError: H has an eigenvalue near -1, or the tensor is not finite.
        """
        from orthomerge.linalg import inverse_cayley

        problem = reflection_problem(self, module_name)
        if problem is not None:
            raise problem
        return inverse_cayley(self.blocks(module_name, dtype))


def reflection_problem(adapter: RotationAdapter, module_name: str) -> AdapterError | None:
    """Return why a module has no generator in the Lie algebra, from its headers alone.

    ``det H = (-1)^r``; and ``I - 2 U U^T`` with orthonormal U has r eigenvalues -1, for every r.
    """
    if not isinstance(adapter, HraAdapter):
        return None
    count = adapter.reflections(module_name)
    if adapter.orthogonalised:
        problem = "orthogonalised reflections (apply_GS) are half-turns, where the Cayley map ends"
    elif count % 2:
        problem = "an odd number of reflections is no rotation"
    else:
        return None
    return AdapterError(
        problem,
        file=adapter.origin,
        tensor=adapter.modules[module_name].key,
        expected="an even number of reflections, apply_GS false",
        found=f"{count} reflections, apply_GS {str(adapter.orthogonalised).lower()}",
        remedy="Use --method orthomerge-decoupled with --base.",
    )


def _degenerate(problem: str, adapter: HraAdapter, key: str) -> NumericalError:
    return NumericalError(
        problem,
        file=adapter.origin,
        tensor=key,
        remedy="PEFT would compute noise or NaN from it; leave the adapter out.",
    )


def _module(name: str, infos: Mapping[str, TensorInfo], origin: str) -> OftModule:
    u = infos["hra_u"]
    if len(u.shape) != 2 or 0 in u.shape:
        raise malformed(origin, u, "is not a list of reflections", "[n, r]", list(u.shape))
    return OftModule(name, u.name, "linear", 1, u.shape[0], False, u.dtype, "reflections")
