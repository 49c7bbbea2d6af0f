"""LoRA adapters: the two factors of each module, with the scale folded in and never multiplied out.

What they do to a base weight, DoRA's magnitudes among it, is in ``lora_updates``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.contents import DAMAGED, build_modules, malformed, read_contents
from orthomerge.adapters.lora_settings import lora_alpha, lora_problems, lora_scale
from orthomerge.adapters.lora_styles import LoraStyle
from orthomerge.adapters.rotated import TensorSource, read_finite
from orthomerge.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["LoraAdapter", "LoraKind", "LoraModule", "check_factors", "one_per_feature"]

LoraKind = Literal["linear", "conv", "embedding"]
_A, _B, _EMBEDDING_A, _EMBEDDING_B, _BIAS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_B.bias",
)
_MAGNITUDES = ("lora_magnitude_vector.weight", "lora_magnitude_vector")
_PARAMETERS = (_A, _B, _EMBEDDING_A, _EMBEDDING_B, _BIAS, *_MAGNITUDES)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted module, from its tensors' headers.

    Attributes:
        name: Module path in the base model, as the adapter's format writes it.
        kind: "linear" (also layers that store the transposed weight), "conv" or "embedding".
        rank: r, from the tensors' shapes.
        alpha: The config's, or the file's, alpha for this module.
        scale: Factor of B A: alpha / r, or alpha / sqrt(r) for rsLoRA.
        rows: Rows o of the change: output features, or the vocabulary of an embedding.
        shape: Shape of one row of the change: [n], or [c, kh, kw] of a convolution.
        a_key: Name of ``lora_A`` in the adapter.
        b_key: Name of ``lora_B``.
        magnitude_key: Name of DoRA's magnitudes, if it has them.
        bias_key: Name of the trained bias of B, if it has one.
        dtype: As stored, in the spelling of the safetensors format.
        alpha_key: Name of the tensor that holds alpha, in formats without a config.
        values_key: Name of AdaLoRA's singular values, which stand between the factors.
    """

    name: str
    kind: LoraKind
    rank: int
    alpha: float
    scale: float
    rows: int
    shape: tuple[int, ...]
    a_key: str
    b_key: str
    magnitude_key: str | None
    bias_key: str | None
    dtype: str
    alpha_key: str | None = None
    values_key: str | None = None

    @property
    def weight_keys(self) -> tuple[str, ...]:
        """Tensors of the adapter that change the module's weight."""
        more = (self.values_key, self.magnitude_key)
        return (self.a_key, self.b_key, *(key for key in more if key is not None))

    @property
    def keys(self) -> tuple[str, ...]:
        """Every tensor of the adapter that belongs to the module."""
        return (*self.weight_keys, *(() if self.bias_key is None else (self.bias_key,)))


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter, ``W = W0 + scale B A``, or with DoRA ``W = m (W0 + scale B A) / norms``.

    Attributes:
        origin: Where it came from, as the user wrote it.
        config: Its ``adapter_config.json``; empty where the format has none.
        modules: Adapted modules, by module path.
        others: Whole tensors that replace the base's: base tensor name -> name in the adapter.
        base_copies: Base weights of targeted embeddings that PEFT saved along, likewise.
        style: How its tensors are named. Kohya's module names are not paths: their dots are lost.

    References:
        LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353.
    """

    origin: str
    config: AdapterConfig
    modules: dict[str, LoraModule]
    others: dict[str, str]
    base_copies: dict[str, str]
    source: TensorSource = field(repr=False, compare=False)
    style: LoraStyle = "peft"

    @classmethod
    def from_checkpoint(cls, checkpoint: TensorSource, config: AdapterConfig) -> LoraAdapter:
        """Recognise a LoRA adapter of PEFT's from its headers.

        Raises:
            AdapterError: It is a variant that is no fixed change of a weight, or malformed.
            ProblemsError: Several of these, one per kind of problem.
        """
        origin = checkpoint.origin
        contents = read_contents(checkpoint.tensors, origin, _PARAMETERS, "LoRA")
        # Settings explain odd tensors, so their problems come first.
        settings = {error.problem: error for error in lora_problems(config)}
        contents.problems = {**settings, **contents.problems}
        modules = build_modules(
            contents, lambda name, infos: _module(name, infos, config, origin), origin, "LoRA"
        )
        return cls(origin, config, modules, contents.others, contents.base_copies, checkpoint)

    @property
    def dora(self) -> bool:
        """Whether any module has DoRA's magnitudes."""
        return any(module.magnitude_key for module in self.modules.values())

    @property
    def description(self) -> str:
        """What it is, in words."""
        ranks = sorted({module.rank for module in self.modules.values()})
        span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        rs = ", rsLoRA" if self.config.value("use_rslora", bool, False) else ""
        style = "" if self.style == "peft" else f", {self.style}"
        kind = "AdaLoRA" if any(m.values_key for m in self.modules.values()) else "LoRA"
        return f"{kind} adapter (rank {span}{rs}{', DoRA' if self.dora else ''}{style})"

    def bias(self, module_name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the change of the module's bias, scale folded in, or None."""
        module = self.modules[module_name]
        if module.bias_key is None:
            return None
        return module.scale * read_finite(self.source, module.bias_key, dtype)

    def factors(self, module_name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B [o, r], A [r, n]) with the scale in B: the change of the weight is B A.

        A convolution's change is [o, c kh kw]; an embedding's is [vocabulary, dimension]. Layers
        that store the transposed weight (``Conv1D``) are not turned here: o are output features.

        Args:
            module_name: A key of ``modules``.
            dtype: Dtype to compute in, float32 or float64.

        Raises:
            NumericalError: A factor is not finite.
        """
        module = self.modules[module_name]
        A = read_finite(self.source, module.a_key, dtype)
        B = read_finite(self.source, module.b_key, dtype)
        if module.kind == "embedding":
            return module.scale * A.mT, B.mT
        rank = module.rank
        if module.values_key is not None:
            A = A * read_finite(self.source, module.values_key, dtype).reshape(rank, 1)
        return module.scale * B.reshape(module.rows, rank), A.reshape(rank, -1)

    def magnitude(self, module_name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Return DoRA's magnitudes m as a vector, or None."""
        key = self.modules[module_name].magnitude_key
        return None if key is None else read_finite(self.source, key, dtype).reshape(-1)


def _module(
    name: str, infos: Mapping[str, TensorInfo], config: AdapterConfig, origin: str
) -> LoraModule:
    embedding = _EMBEDDING_A in infos or _EMBEDDING_B in infos
    wanted = (_EMBEDDING_A, _EMBEDDING_B) if embedding else (_A, _B)
    first = next(iter(infos.values()))
    linear_too = embedding and (_A in infos or _B in infos)
    if linear_too or any(one not in infos for one in wanted):
        raise malformed(
            origin, first, "one factor of a module is missing", " and ".join(wanted), list(infos)
        )
    A, B = (infos[one] for one in wanted)
    check_factors(A, B, origin, embedding=embedding)
    magnitudes = [infos[one] for one in _MAGNITUDES if one in infos]
    for info in magnitudes:
        one_per_feature(info, B.shape[0], "magnitude", origin)
    _check_flag(config, "use_dora", bool(magnitudes), A, origin)
    if not embedding:
        _check_flag(config, "lora_bias", _BIAS in infos, A, origin)
    rank = A.shape[0]
    convolution = len(A.shape) > 2
    return LoraModule(
        name=name,
        kind="embedding" if embedding else "conv" if convolution else "linear",
        rank=rank,
        alpha=lora_alpha(config, name),
        scale=lora_scale(config, name, rank),
        rows=A.shape[1] if embedding else B.shape[0],
        shape=(B.shape[0],) if embedding else A.shape[1:],
        a_key=A.name,
        b_key=B.name,
        magnitude_key=magnitudes[0].name if magnitudes else None,
        bias_key=infos[_BIAS].name if _BIAS in infos else None,
        dtype=A.dtype,
    )


def check_factors(
    A: TensorInfo, B: TensorInfo, origin: str, *, embedding: bool = False, remedy: str = DAMAGED
) -> None:
    """Refuse headers that are not those of two factors of one rank.

    Raises:
        AdapterError: They are not.
    """
    axes = len(A.shape)
    same = axes == len(B.shape) and axes >= 2 and (axes == 2 or not embedding)
    if not same or 0 in A.shape or 0 in B.shape or any(size != 1 for size in B.shape[2:]):
        raise malformed(
            origin,
            A,
            "these are not the two factors of a low-rank change",
            "A [r, n] and B [o, r], of a convolution A [r, c, kh, kw] and B [o, r, 1, 1]",
            f"{list(A.shape)} and {list(B.shape)}",
            remedy,
        )
    if A.shape[0] != B.shape[1]:
        raise malformed(origin, A, "the factors' ranks differ", B.shape[1], A.shape[0], remedy)


def one_per_feature(
    info: TensorInfo, features: int, what: str, origin: str, *, remedy: str = DAMAGED
) -> None:
    """Refuse a vector that has not one value per output feature.

    Raises:
        AdapterError: It has not.
    """
    if info.numel != features:
        problem = f"is not one {what} per feature"
        raise malformed(origin, info, problem, features, list(info.shape), remedy)


def _check_flag(
    config: AdapterConfig, flag: str, found: bool, info: TensorInfo, origin: str
) -> None:
    if config.value(flag, bool, False) != found:
        raise AdapterError(
            f"the config's {flag} contradicts the tensors",
            file=origin,
            tensor=info.name,
            expected=f"{flag} {str(found).lower()}",
            found=str(not found).lower(),
            remedy="Put the adapter_config.json that belongs to this adapter beside it.",
        )
