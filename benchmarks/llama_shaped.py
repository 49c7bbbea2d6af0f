"""Write Llama-shaped bf16 checkpoints: a base and fine-tunes of it, as Hugging Face folders.

The weights are random, so the models are good for timing and rounding and for nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generated import generated_folder

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DATA", "SHAPES", "LlamaShape", "generate", "model_names"]

DATA = Path(__file__).resolve().parent / "data"

_VERSION = 1
_SHARDS = 4
_BLOCK = 1 << 22  # elements drawn at a time; bounds the memory
_WEIGHT_STD = 0.02
_NORM_STD = 0.1
_RELATIVE_DELTA = 0.02  # RMS of a fine-tune's change, relative to the weights' RMS
_DELTA_SPREAD = 0.3  # sigma of the log-normal factor that varies it from tensor to tensor


@dataclass(frozen=True)
class LlamaShape:
    """Dimensions of a Llama with as many key-value heads as heads and an untied output head."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int

    @property
    def parameter_count(self) -> int:
        """``2VH + L(4H² + 3HI + 2H) + H``."""
        H, I, L, V = self.hidden, self.intermediate, self.layers, self.vocabulary  # noqa: E741
        return 2 * V * H + L * (4 * H * H + 3 * H * I + 2 * H) + H

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor, in the order of the files."""
        H, inner, V = self.hidden, self.intermediate, self.vocabulary
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (H,)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                shapes[f"{prefix}self_attn.{name}.weight"] = (H, H)
            shapes[prefix + "post_attention_layernorm.weight"] = (H,)
            shapes[prefix + "mlp.gate_proj.weight"] = (inner, H)
            shapes[prefix + "mlp.up_proj.weight"] = (inner, H)
            shapes[prefix + "mlp.down_proj.weight"] = (H, inner)
        return shapes | {"model.norm.weight": (H,), "lm_head.weight": (V, H)}


SHAPES = {
    "tiny": LlamaShape(hidden=64, intermediate=176, layers=2, heads=4, vocabulary=512),
    "medium": LlamaShape(hidden=512, intermediate=1408, layers=12, heads=8, vocabulary=16000),
    "full": LlamaShape(hidden=1024, intermediate=2816, layers=24, heads=16, vocabulary=32000),
}


def model_names(fine_tunes: int) -> list[str]:
    """Return the folder names: the base first."""
    return ["base", *(f"fine-tune-{i + 1}" for i in range(fine_tunes))]


def generate(folder: Path, shape: LlamaShape, *, fine_tunes: int = 2, seed: int = 0) -> bool:
    """Write the base and its fine-tunes below ``folder``, unless they are there already.

    A fine-tune is ``bf16(W_0 + D)`` with Gaussian D of about 2 % of W_0's RMS. One pass writes all.

    Args:
        folder: Where the model folders go; replaced if a former run made it.
        shape: Dimensions.
        fine_tunes: How many.
        seed: Same seed, same bytes.

    Returns:
        Whether anything had to be written.

    Raises:
        FileExistsError: ``folder`` holds something this program did not write.
    """
    facts = {"version": _VERSION, "seed": seed, "fine_tunes": fine_tunes, "shape": asdict(shape)}
    names = model_names(fine_tunes)
    with generated_folder(folder, facts) as missing:
        if missing:
            for name in names:
                _write_small_files(folder / name, shape)
            for number, tensors in enumerate(_shards(shape), start=1):
                _write_shard([folder / name / _shard_name(number) for name in names], tensors, seed)
    return missing


def _shard_name(number: int) -> str:
    return f"model-{number:05d}-of-{_SHARDS:05d}.safetensors"


def _shards(shape: LlamaShape) -> list[dict[str, tuple[int, ...]]]:
    """Return the tensors of each file: about a quarter of the bytes in each."""
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(_SHARDS)]
    before = 0
    for name, dims in shape.tensors().items():
        shards[before * _SHARDS // shape.parameter_count][name] = dims
        before += math.prod(dims)
    return shards


def _write_shard(paths: list[Path], tensors: dict[str, tuple[int, ...]], seed: int) -> None:
    header = _header(tensors)
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for file in files:
            file.write(header)
        for name, dims in tensors.items():
            for blocks in _draw(name, dims, len(paths), seed):
                for file, block in zip(files, blocks, strict=True):
                    file.write(block.data)


def _header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dims in tensors.items():
        end = begin + 2 * math.prod(dims)
        entries[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _draw(
    name: str, dims: tuple[int, ...], models: int, seed: int
) -> Iterator[list[np.ndarray[Any, np.dtype[np.uint8]]]]:
    """Yield a tensor's bytes piece by piece: one piece per model, the base first."""
    import torch

    def stream(model: int) -> torch.Generator:
        digest = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def rounded(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return values.to(torch.bfloat16).view(torch.uint8).numpy()

    mean, std = (1.0, _NORM_STD) if len(dims) == 1 else (0.0, _WEIGHT_STD)
    first, *others = [stream(model) for model in range(models)]
    spread = [torch.randn((), generator=other).item() for other in others]
    steps = [_RELATIVE_DELTA * math.hypot(mean, std) * math.exp(_DELTA_SPREAD * s) for s in spread]
    size = math.prod(dims)
    for start in range(0, size, _BLOCK):
        block = torch.empty(min(_BLOCK, size - start))
        base = block.normal_(mean, std, generator=first).to(torch.bfloat16)
        tuned = [
            torch.empty_like(block).normal_(0.0, step, generator=other).add_(base)
            for step, other in zip(steps, others, strict=True)
        ]
        yield [rounded(base), *map(rounded, tuned)]


def _write_small_files(folder: Path, shape: LlamaShape) -> None:
    """Write the config, the index and a tokenizer of whole words."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "word": 3}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    shards = enumerate(_shards(shape), start=1)
    index = {
        "metadata": {"total_size": 2 * shape.parameter_count},
        "weight_map": {name: _shard_name(number) for number, shard in shards for name in shard},
    }
    documents: dict[str, Any] = {
        "config.json": _config(shape),
        "model.safetensors.index.json": index,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
    }
    folder.mkdir()
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")


def _config(shape: LlamaShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/data/llama-SCALE")
    parser.add_argument("--scale", choices=SHAPES, default="full")
    parser.add_argument("--fine-tunes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.out or DATA / f"llama-{options.scale}"
    shape = SHAPES[options.scale]
    written = generate(folder, shape, fine_tunes=options.fine_tunes, seed=options.seed)
    size = 2e-6 * shape.parameter_count
    state = "written" if written else "there already"
    print(f"{options.fine_tunes + 1} models of {size:.1f} MB in {folder}: {state}")


if __name__ == "__main__":
    main()
