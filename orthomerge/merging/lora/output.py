"""What a merged LoRA adapter will hold: the tensors of each module by its rank, and the config.

Headers only; how many ranks each module gets is decided in ``planning`` or ``settling``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from orthomerge.adapters.config import CONFIG_NAME
from orthomerge.adapters.lora_export import diffusers_metadata, lora_config
from orthomerge.adapters.lora_keys import lora_key
from orthomerge.adapters.lora_styles import LoraPart, LoraStyle
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.merging.lora.modules import JoinedLora
from orthomerge.merging.lora.ranks import RankRule

__all__ = ["LoraOutput"]


@dataclass(frozen=True)
class LoraOutput:
    """A merged LoRA adapter in the making.

    Attributes:
        modules: Its modules, by module path.
        dtypes: Stored dtype of each.
        bounds: Rank at which each is lossless, or the most that was asked for.
        rule: How ranks are chosen; None for lossless.
        settings: What the config says beside the ranks, see ``lora_config``.
        dora: Whether it gets DoRA's magnitudes.
        style: The format it is written in.
        names: What the format calls each module, by module path.
    """

    modules: Mapping[str, JoinedLora]
    dtypes: Mapping[str, str]
    bounds: Mapping[str, int]
    rule: RankRule | None = None
    settings: Mapping[str, str | bool | Collection[str] | None] = field(default_factory=dict)
    dora: bool = False
    style: LoraStyle = "peft"
    names: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def biased(self) -> bool:
        """Whether every module gets a bias of B, because some module of some adapter has one."""
        return any(module.biased for module in self.modules.values())

    def infos(self, name: str, rank: int) -> tuple[TensorInfo, ...]:
        """Return the stored tensors of one module, A first: as many as the format has."""
        module, dtype = self.modules[name], self.dtypes[name]
        A = (rank, *module.first.shape) if module.kind == "conv" else (rank, module.columns)
        B = (module.rows, rank, *[1] * len(module.kernel))
        shapes: dict[LoraPart, tuple[int, ...]] = {"A": A, "B": B}
        if self.dora:
            m = (1, module.rows, *B[2:]) if module.kind == "conv" else (module.rows,)
            shapes["magnitude"] = m
        if self.biased and module.kind != "embedding":
            shapes["bias"] = (module.rows,)
        if self.style == "kohya":
            shapes["alpha"] = ()
        written = self.names[name]
        return tuple(
            TensorInfo(
                lora_key(written, part, module.kind, style=self.style),
                "F32" if part == "alpha" else dtype,
                shape,
            )
            for part, shape in shapes.items()
        )

    @property
    def from_data(self) -> bool:
        """Whether the ranks depend on the merged values."""
        return self.rule is not None and self.rule.from_data

    def ranks(self, spectra: Mapping[str, Sequence[float]]) -> dict[str, int]:
        """Return the rank that each module is written with.

        Args:
            spectra: Singular values of each merged module, descending.

        Raises:
            RecipeError: The budget of parameters is too small for rank 1 everywhere.
        """
        if self.rule is None or not self.rule.from_data:
            return {name: self.bounds[name] for name in spectra}
        modules = [self.modules[name] for name in spectra]
        return self.rule.ranks(spectra, {m.name: m.rows + m.columns for m in modules})

    def files(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Return the small files beside the tensors: PEFT's config, nothing in other formats."""
        if self.style != "peft":
            return {}
        return {CONFIG_NAME: self._config_text(ranks)}

    def metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Return what the format keeps in the header of the file."""
        if self.style != "diffusers":
            return {}
        return diffusers_metadata({self.names[name]: rank for name, rank in ranks.items()})

    def _config_text(self, ranks: Mapping[str, int]) -> str:
        config = lora_config(
            {self.names[name]: rank for name, rank in ranks.items()},
            dora=self.dora,
            lora_bias=self.biased,
            **self.settings,  # type: ignore[arg-type]
        )
        return json.dumps(config, indent=2) + "\n"
