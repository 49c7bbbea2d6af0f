"""AdaLoRA adapters: low-rank factors with singular values between them, read as exact LoRA factors.

How the ranks were chosen in the training plays no part: what is stored is what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orthomerge.adapters.config import AdapterConfig
from orthomerge.adapters.contents import build_modules, malformed, read_contents
from orthomerge.adapters.lora import LoraAdapter, LoraModule, check_factors
from orthomerge.adapters.lora_settings import lora_problems
from orthomerge.adapters.rotated import TensorSource
from orthomerge.errors import AdapterError

if TYPE_CHECKING:
    from orthomerge.checkpoints.header import TensorInfo

__all__ = ["read_adalora"]

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_INITIAL_RANK = 12  # PEFT's default
_GUARD = 1e-5  # what PEFT adds to the rank it divides by


def read_adalora(checkpoint: TensorSource, config: AdapterConfig) -> LoraAdapter:
    """Recognise an AdaLoRA adapter from its headers.

    The change of a weight is ``alpha / (init_r + 1e-5) B diag(E) A``: PEFT keeps dividing by the
    rank that the training began with, whatever was pruned since. Modules that were pruned to rank
    0 change nothing and are left out.

    Args:
        checkpoint: The adapter.
        config: Its ``adapter_config.json``.

    Raises:
        AdapterError: It is a variant that is no fixed change of a weight, or malformed.
        ProblemsError: Several of these, one per kind of problem.

    References:
        AdaLoRA, arXiv:2303.10512, eq. 3; the scale is PEFT's.
    """
    origin = checkpoint.origin
    contents = read_contents(checkpoint.tensors, origin, (_A, _B, _E), "AdaLoRA")
    settings = {error.problem: error for error in lora_problems(config)}
    contents.problems = {**settings, **contents.problems}
    contents.parameters = {
        name: infos for name, infos in contents.parameters.items() if not _pruned(infos)
    }
    alpha = config.value("lora_alpha", float, 8.0)
    initial = config.value("init_r", int, _INITIAL_RANK)
    if initial < 1:
        raise AdapterError(
            "init_r must be 1 or more",
            file=config.path,
            found=initial,
            remedy="Give the folder that PeftModel.save_pretrained wrote.",
        )
    modules = build_modules(
        contents,
        lambda name, infos: _module(name, infos, alpha, initial, origin),
        origin,
        "AdaLoRA",
    )
    return LoraAdapter(origin, config, modules, contents.others, contents.base_copies, checkpoint)


def _pruned(infos: Mapping[str, TensorInfo]) -> bool:
    """Return whether nothing is left of a module."""
    ranks = {_A: 0, _B: 1, _E: 0}
    return len(infos) == len(ranks) and all(
        len(info.shape) == 2 and info.shape[ranks[part]] == 0 for part, info in infos.items()
    )


def _module(
    name: str, infos: Mapping[str, TensorInfo], alpha: float, initial: int, origin: str
) -> LoraModule:
    if len(infos) < 3:
        first = next(iter(infos.values()))
        wanted = f"{_A}, {_B} and {_E}"
        raise malformed(
            origin, first, "a part of an AdaLoRA module is missing", wanted, list(infos)
        )
    A, B, E = infos[_A], infos[_B], infos[_E]
    check_factors(A, B, origin, embedding=True)  # matrices, of convolutions too
    rank = A.shape[0]
    if E.shape != (rank, 1):
        raise malformed(origin, E, "is not one singular value per rank", [rank, 1], list(E.shape))
    return LoraModule(
        name=name,
        kind="linear",
        rank=rank,
        alpha=alpha if alpha > 0 else float(rank),
        scale=(alpha if alpha > 0 else float(rank)) / (initial + _GUARD),
        rows=B.shape[0],
        shape=A.shape[1:],
        a_key=A.name,
        b_key=B.name,
        magnitude_key=None,
        bias_key=None,
        dtype=A.dtype,
        values_key=E.name,
    )
