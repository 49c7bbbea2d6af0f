"""Write LoRA adapters with the shapes of Llama-3.1-8B, as PEFT saves them.

The factors are random with decaying columns, and the adapters share a part of what they change, so
they are good for timing and for arithmetic and for nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from generated import generated_folder

if TYPE_CHECKING:
    import torch

__all__ = ["SHAPES", "LoraShape", "adapter_config", "adapter_names", "factors", "generate"]

_VERSION = 1
_PREFIX = "base_model.model."
_SHARED = 0.5  # share of an adapter's left factor that all adapters have in common
_DECAY = 8.0  # a column of B is half as long as the one this many places before it
_STD = 0.02


@dataclass(frozen=True)
class LoraShape:
    """Dimensions of a Llama with grouped key-value heads, and the rank of its adapters."""

    hidden: int
    intermediate: int
    keys: int
    layers: int
    rank: int = 16

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return the output and input features of every adapted layer, by module path."""
        H, inner, K = self.hidden, self.intermediate, self.keys
        one = {
            "self_attn.q_proj": (H, H),
            "self_attn.k_proj": (K, H),
            "self_attn.v_proj": (K, H),
            "self_attn.o_proj": (H, H),
            "mlp.gate_proj": (inner, H),
            "mlp.up_proj": (inner, H),
            "mlp.down_proj": (H, inner),
        }
        return {
            f"model.layers.{layer}.{name}": shape
            for layer in range(self.layers)
            for name, shape in one.items()
        }

    @property
    def parameter_count(self) -> int:
        """``r Σ (o + n)`` of one adapter."""
        return self.rank * sum(o + n for o, n in self.modules().values())


SHAPES = {
    "tiny": LoraShape(hidden=64, intermediate=176, keys=16, layers=2, rank=4),
    "layer": LoraShape(hidden=4096, intermediate=14336, keys=1024, layers=1),
    "full": LoraShape(hidden=4096, intermediate=14336, keys=1024, layers=32),
}


def adapter_names(count: int) -> list[str]:
    """Return the folder names."""
    return [f"adapter-{i + 1}" for i in range(count)]


def adapter_config(shape: LoraShape) -> dict[str, object]:
    """Return PEFT's ``adapter_config.json``, alpha equal to twice the rank."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "meta-llama/Llama-3.1-8B",
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": 2 * shape.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in shape.modules()}),
    }


def factors(
    name: str, shape: tuple[int, int], rank: int, model: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B [o, r] and A [r, n] of one module of one adapter, in float32."""
    import torch

    def drawn(what: str, *dims: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed}/{what}/{name}".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.randn(*dims, generator=stream)

    rows, columns = shape
    common, own = drawn("common", rows, rank), drawn(f"{model}/B", rows, rank)
    B = math.sqrt(_SHARED) * common + math.sqrt(1 - _SHARED) * own
    lengths = _STD * 2.0 ** (-torch.arange(rank) / _DECAY)
    return B * lengths, drawn(f"{model}/A", rank, columns) / math.sqrt(columns)


def generate(folder: Path, shape: LoraShape, *, adapters: int = 8, seed: int = 0) -> bool:
    """Write adapter folders below ``folder``, unless they are there already.

    Args:
        folder: Where they go; replaced if a former run made it.
        shape: Dimensions.
        adapters: How many.
        seed: Same seed, same bytes.

    Returns:
        Whether anything had to be written.

    Raises:
        FileExistsError: ``folder`` holds something this program did not write.
    """
    facts = {"version": _VERSION, "seed": seed, "adapters": adapters, "shape": asdict(shape)}
    with generated_folder(folder, facts) as missing:
        if missing:
            for model, name in enumerate(adapter_names(adapters)):
                _write(folder / name, shape, model, seed)
    return missing


def _write(folder: Path, shape: LoraShape, model: int, seed: int) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, dims in shape.modules().items():
        B, A = factors(name, dims, shape.rank, model, seed)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = B
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(shape), indent=2))


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter folders")
    parser.add_argument("--scale", choices=SHAPES, default="full")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.scale]
    generate(options.out, shape, adapters=options.adapters, seed=options.seed)


if __name__ == "__main__":
    main()
