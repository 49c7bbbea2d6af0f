"""What a merged LoRA adapter will hold: the tensors of each module by its rank, and the config.

Headers only; how many ranks each module gets is decided in ``planning`` or ``settling``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from orthomerge.adapters.lora_export import lora_config, lora_key
from orthomerge.checkpoints.header import TensorInfo
from orthomerge.merging.lora_modules import JoinedLora
from orthomerge.merging.ranks import RankRule

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
    """

    modules: Mapping[str, JoinedLora]
    dtypes: Mapping[str, str]
    bounds: Mapping[str, int]
    rule: RankRule | None = None
    settings: Mapping[str, str | bool | Collection[str] | None] = field(default_factory=dict)
    dora: bool = False

    @property
    def biased(self) -> bool:
        """Whether every module gets a bias of B, because some module of some adapter has one."""
        return any(module.biased for module in self.modules.values())

    def infos(self, name: str, rank: int) -> tuple[TensorInfo, ...]:
        """Return the stored tensors of one module: A, B and, if wanted, magnitudes or a bias."""
        module, dtype = self.modules[name], self.dtypes[name]
        A = (rank, *module.first.shape) if module.kind == "conv" else (rank, module.columns)
        B = (module.rows, rank, *[1] * len(module.kernel))
        infos = [
            TensorInfo(lora_key(name, "A", module.kind), dtype, A),
            TensorInfo(lora_key(name, "B", module.kind), dtype, B),
        ]
        if self.dora:
            m = (1, module.rows, *B[2:]) if module.kind == "conv" else (module.rows,)
            infos.append(TensorInfo(lora_key(name, "magnitude", module.kind), dtype, m))
        if self.biased and module.kind != "embedding":
            infos.append(TensorInfo(lora_key(name, "bias", module.kind), dtype, B[:1]))
        return tuple(infos)

    def cost(self, name: str) -> int:
        """Return how many parameters one more rank of a module costs."""
        return self.modules[name].rows + self.modules[name].columns

    def config_text(self, ranks: Mapping[str, int]) -> str:
        """Return the text of ``adapter_config.json``."""
        config = lora_config(
            ranks,
            dora=self.dora,
            lora_bias=self.biased,
            **self.settings,  # type: ignore[arg-type]
        )
        return json.dumps(config, indent=2) + "\n"
