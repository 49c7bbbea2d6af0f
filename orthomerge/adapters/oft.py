"""OFT adapters as every PEFT writes them, read into one convention; packed blocks first of all.

Here an adapter's tensors are recognised and turned into canonical skew matrices A, for which the
effective weight is ``W0 Cayley(A)``; the layouts before PEFT 0.16 are in ``oft_layouts``, applying
is in ``effective``, writing in ``export``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.contents import build_modules, malformed, read_contents
from orthomerge.adapters.convention import EXACT, Kind, OftConvention, canonical_sign
from orthomerge.adapters.keys import PREFIX
from orthomerge.adapters.oft_layouts import OLD_PARAMETERS, full_module, full_skew
from orthomerge.adapters.rotated import (
    Layout,
    OftModule,
    RotationAdapter,
    TensorSource,
    read_finite,
)
from orthomerge.errors import AdapterError, NumericalError
from orthomerge.linalg.triangular import block_size

if TYPE_CHECKING:
    import torch

    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["OftAdapter", "OftModule", "TensorSource", "oft_key"]

_PARAMETERS: dict[str, Kind] = {"oft_R.weight": "linear", "oft_embedding_R.weight": "embedding"}


def oft_key(module: str, kind: Kind) -> str:
    """Return the name under which PEFT stores a module's rotation.

    >>> oft_key("encoder.query", "linear")
    'base_model.model.encoder.query.oft_R.weight'
    """
    parameter = next(name for name, other in _PARAMETERS.items() if other == kind)
    return f"{PREFIX}{module}.{parameter}"


@dataclass(frozen=True)
class OftAdapter(RotationAdapter):
    """An OFT adapter of any PEFT version; see ``RotationAdapter`` for its attributes."""

    @classmethod
    def from_checkpoint(cls, checkpoint: TensorSource, config: AdapterConfig) -> OftAdapter:
        """Recognise an OFT adapter from its headers.

        Raises:
            AdapterError: It is another kind of adapter, mixes layouts, or is malformed.
            ProblemsError: Several of these, one per kind of problem.
        """
        if config.peft_type != "OFT":
            raise AdapterError(
                f"is a {config.peft_type} adapter",
                file=config.path,
                expected="peft_type OFT",
                remedy="Merge adapters of one kind, or merge them into the base with PEFT first.",
            )
        origin = checkpoint.origin
        contents = read_contents(checkpoint.tensors, origin, (*_PARAMETERS, *OLD_PARAMETERS), "OFT")
        modules = build_modules(
            contents, lambda name, infos: _module(name, infos, config, origin), origin, "OFT"
        )
        _refuse_mixed(modules, origin)
        packed = next(iter(modules.values())).layout == "packed"
        convention = OftConvention.from_config(config) if packed else EXACT
        others, copies = contents.others, contents.base_copies
        return cls(origin, config, convention, modules, others, copies, checkpoint)

    @property
    def layout(self) -> Layout:
        """How its rotations are stored; one adapter has one layout."""
        return next(iter(self.modules.values())).layout

    @property
    def description(self) -> str:
        """What it is, in words."""
        if self.layout == "full":
            return "OFT adapter of PEFT 0.14 or 0.15 (full blocks and a scale)"
        if self.layout == "left":
            return "OFT adapter of PEFT before 0.14 (rotates output features)"
        if not self.convention.cayley_neumann:
            return "OFT adapter (packed, exact Cayley map)"
        version = ", of PEFT 0.16 or 0.17" if self.convention.legacy else ""
        return f"OFT adapter (packed, Cayley-Neumann series of {self.convention.terms}{version})"

    def skew(self, module_name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a module's canonical skew blocks; see ``RotationAdapter.skew``.

        With ``coft`` they are projected as PEFT does before every use:
        ``Q <- Q min(1, eps / (sqrt(nb) ||Q||_F))``, block by block.
        """
        from orthomerge.linalg import frobenius, unpack_skew

        module = self.modules[module_name]
        if module.layout != "packed":
            return full_skew(module, self.source, self.config, dtype)
        Q = unpack_skew(read_finite(self.source, module.key, dtype))
        if self.config.value("coft", bool, False):
            radius = self.config.value("eps", float, 6e-5) / module.num_blocks**0.5
            norms = frobenius(Q)
            factors = (radius / norms).where(norms > radius, 1.0)
            Q = Q * factors[:, None, None].to(dtype)
        return canonical_sign(module.kind, self.convention) * Q


def _module(
    name: str, infos: Mapping[str, TensorInfo], config: AdapterConfig, origin: str
) -> OftModule:
    """Recognise a module from the headers of its tensors."""
    if any(parameter in OLD_PARAMETERS for parameter in infos):
        if len({parameter in OLD_PARAMETERS for parameter in infos}) > 1:
            raise _mixed(next(iter(infos.values())), origin)
        return full_module(name, infos, config, origin)
    (parameter, info), *more = infos.items()
    if more:
        raise AdapterError(
            "rotates a module that another tensor rotates, too",
            file=origin,
            tensor=more[0][1].name,
            remedy="The adapter is damaged or was edited; save it again with PEFT.",
        )
    shared = config.value("block_share", bool, False)
    if len(info.shape) != 2 or info.shape[0] < 1:
        raise malformed(
            origin, info, "is not a list of packed blocks", "two axes", list(info.shape)
        )
    blocks, width = info.shape
    if shared and blocks != 1:
        raise malformed(origin, info, "has several blocks although block_share is set", 1, blocks)
    try:
        size = block_size(width)
    except NumericalError as error:
        raise malformed(
            origin, info, "is not packed skew blocks", "b(b-1)/2 columns", width
        ) from error
    return OftModule(name, info.name, _PARAMETERS[parameter], blocks, size, shared, info.dtype)


def _refuse_mixed(modules: Mapping[str, OftModule], origin: str) -> None:
    first = next(iter(modules.values()))
    for module in modules.values():
        if module.layout != first.layout:
            raise AdapterError(
                "mixes tensors of several PEFT versions' layouts",
                file=origin,
                tensor=module.key,
                expected=f"the layout of '{first.key}'",
                remedy="Save each adapter on its own, with the PEFT that trained it.",
            )


def _mixed(info: TensorInfo, origin: str) -> AdapterError:
    return malformed(origin, info, "one module has tensors of two layouts", "one of them", "both")
