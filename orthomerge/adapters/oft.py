"""OFT adapters as PEFT 0.16 and later write them: packed skew blocks, read into one convention.

Here an adapter's tensors are recognised and turned into canonical skew matrices A, for which the
effective weight is ``W0 Cayley(A)``; applying them is in ``effective``, writing in ``export``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.convention import Kind, OftConvention, canonical_sign
from orthomerge.adapters.keys import PREFIX, strip_prefix
from orthomerge.errors import AdapterError, NumericalError, OrthoMergeError, combined
from orthomerge.linalg.triangular import block_size

if TYPE_CHECKING:
    import torch

    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["OftAdapter", "OftModule", "TensorSource", "oft_key"]

_PARAMETERS: dict[str, Kind] = {"oft_R": "linear", "oft_embedding_R": "embedding"}
_FLOATS = ("F16", "BF16", "F32", "F64")
_OLD_PARAMETERS = ("oft_r", "oft_s")
# Prefixes of the parameters of other adapter kinds.
_FOREIGN = re.compile(
    r"(?:ada)?lora_|boft_|hra_|ia3_|vera_|hada_|lokr_|vblora_|ln_tuning_|fourierft_"
)
_SUPPORTED = "oft_R.weight or oft_embedding_R.weight, as PEFT 0.16 and later save them"


class TensorSource(Protocol):
    """What an adapter is read from; every opened checkpoint is one."""

    @property
    def origin(self) -> str:
        """Where it came from, as the user wrote it."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, by name."""

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor."""


def oft_key(module: str, kind: Kind) -> str:
    """Return the name under which PEFT stores a module's rotation.

    >>> oft_key("encoder.query", "linear")
    'base_model.model.encoder.query.oft_R.weight'
    """
    parameter = next(name for name, other in _PARAMETERS.items() if other == kind)
    return f"{PREFIX}{module}.{parameter}.weight"


@dataclass(frozen=True, slots=True)
class OftModule:
    """One rotated module, from its tensor's header.

    Attributes:
        name: Module path in the base model.
        key: The tensor's name in the adapter.
        kind: "embedding", or "linear" for linear and convolution layers.
        num_blocks: Blocks as stored; 1 when ``shared``.
        block_size: From the tensor's shape: PEFT adjusts the config's value layer by layer.
        shared: The one stored block stands for all blocks on the diagonal.
        dtype: As stored, in the spelling of the safetensors format.
    """

    name: str
    key: str
    kind: Kind
    num_blocks: int
    block_size: int
    shared: bool
    dtype: str


@dataclass(frozen=True)
class OftAdapter:
    """An OFT adapter: what it rotates, how, and which other tensors it carries.

    Attributes:
        origin: Where it came from, as the user wrote it.
        config: Its ``adapter_config.json``.
        convention: How its numbers are meant.
        modules: Rotated modules, by module path.
        others: Whole tensors that replace the base's (``modules_to_save``, trained biases):
            base tensor name -> name in the adapter.
        base_copies: Unrotated weights of targeted embeddings (input or output) that PEFT saved
            along, to which the rotation still applies: base tensor name -> name in the adapter.
    """

    origin: str
    config: AdapterConfig
    convention: OftConvention
    modules: dict[str, OftModule]
    others: dict[str, str]
    base_copies: dict[str, str]
    source: TensorSource = field(repr=False, compare=False)

    @classmethod
    def from_checkpoint(cls, checkpoint: TensorSource, config: AdapterConfig) -> OftAdapter:
        """Recognise an OFT adapter from its headers.

        Raises:
            AdapterError: It is another kind of adapter, of an unsupported layout, or malformed.
            ProblemsError: Several of these, one per kind of problem.
        """
        if config.peft_type != "OFT":
            raise AdapterError(
                f"is a {config.peft_type} adapter",
                file=config.path,
                expected="peft_type OFT",
                remedy="Merge adapters of one kind, or merge them into the base with PEFT first.",
            )
        convention = OftConvention.from_config(config)
        shared = config.value("block_share", bool, False)
        modules: dict[str, OftModule] = {}
        others: dict[str, str] = {}
        copies: dict[str, str] = {}
        problems: dict[str, OrthoMergeError] = {}
        for key, info in checkpoint.tensors.items():
            try:
                name = strip_prefix(key, file=checkpoint.origin)
                module = _module(name, info, shared, checkpoint.origin)
                if module is not None and module.name in modules:
                    raise AdapterError(
                        "rotates a module that another tensor rotates, too",
                        file=checkpoint.origin,
                        tensor=key,
                    )
                if module is not None:
                    modules[module.name] = module
                elif name.endswith(".base_layer.weight"):
                    copies[name.replace(".base_layer.", ".")] = key
                else:
                    others[name.replace(".base_layer.", ".")] = key
            except OrthoMergeError as error:
                problems.setdefault(error.problem, error)
        if not modules and not problems:
            problems[""] = AdapterError(
                "holds no OFT tensors", file=checkpoint.origin, expected=_SUPPORTED
            )
        if problems:
            found = list(problems.values())
            raise combined(found)
        return cls(checkpoint.origin, config, convention, modules, others, copies, checkpoint)

    def skew(self, module_name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read a module's canonical skew blocks A, with ``W_eff = W0 Cayley(A)``.

        Args:
            module_name: A key of ``modules``.
            dtype: Dtype to compute in, float32 or float64.

        Returns:
            A [nb, b, b] with nb blocks as stored. With ``coft`` they are projected as PEFT does
            before every use: ``Q <- Q min(1, eps / (sqrt(nb) ||Q||_F))``, block by block.

        Raises:
            NumericalError: The tensor is not finite.
        """
        from orthomerge.linalg import frobenius, unpack_skew

        module = self.modules[module_name]
        Q = unpack_skew(self.source.read(module.key).to(dtype))
        if not bool(Q.isfinite().all()):
            raise NumericalError(
                "holds NaN or infinite values",
                file=self.origin,
                tensor=module.key,
                remedy="Its training diverged or the file is damaged; leave the adapter out.",
            )
        if self.config.value("coft", bool, False):
            radius = self.config.value("eps", float, 6e-5) / module.num_blocks**0.5
            norms = frobenius(Q)
            factors = (radius / norms).where(norms > radius, 1.0)
            Q = Q * factors[:, None, None].to(dtype)
        return canonical_sign(module.kind, self.convention) * Q


def _module(name: str, info: TensorInfo, shared: bool, origin: str) -> OftModule | None:
    """Return the rotated module that a tensor belongs to, or None for other tensors."""
    path, _, leaf = name.rpartition(".")
    module, _, parameter = path.rpartition(".")
    if leaf != "weight" or parameter not in _PARAMETERS:
        _refuse_foreign(name, info.name, origin)
        return None

    def malformed(problem: str, expected: object, found: object) -> AdapterError:
        return AdapterError(
            problem,
            file=origin,
            tensor=info.name,
            expected=expected,
            found=found,
            remedy="The adapter is damaged or was edited; save it again with PEFT.",
        )

    if info.dtype not in _FLOATS:
        raise malformed("has an unsupported dtype", ", ".join(_FLOATS), info.dtype)
    if len(info.shape) != 2 or info.shape[0] < 1:
        raise malformed("is not a list of packed blocks", "two axes", list(info.shape))
    blocks, width = info.shape
    if shared and blocks != 1:
        raise malformed("has several blocks although block_share is set", 1, blocks)
    try:
        size = block_size(width)
    except NumericalError as error:
        raise malformed("is not packed skew blocks", "b(b-1)/2 columns", width) from error
    return OftModule(module, info.name, _PARAMETERS[parameter], blocks, size, shared, info.dtype)


def _refuse_foreign(name: str, key: str, origin: str) -> None:
    # The parameter's name is the last part, or followed by ".weight" and the adapter's name.
    for part in name.split(".")[-3:]:
        if part in _OLD_PARAMETERS:
            problem = "is in the layout of PEFT before 0.16 (full matrices instead of packed ones)"
            remedy = "Merge it into its base with that PEFT, and merge the full models."
        elif part.startswith("oft_"):
            problem = "is no OFT parameter of a known layout"
            remedy = "Save the adapter with PeftModel.save_pretrained of PEFT 0.16 or later."
        elif foreign := _FOREIGN.match(part):
            problem = f"is a {foreign[0]}* parameter in an OFT adapter"
            remedy = "Save each adapter on its own."
        else:
            continue
        raise AdapterError(problem, file=origin, tensor=key, expected=_SUPPORTED, remedy=remedy)
