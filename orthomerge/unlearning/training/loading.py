"""Load a causal language model and its tokenizer, and put a fresh adapter on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orthomerge.errors import CheckpointError, OrthoMergeError, RecipeError
from orthomerge.unlearning.training.settings import AdapterSettings, TrainSettings

__all__ = [
    "check_model_folder",
    "device_of",
    "load_model",
    "load_tokenizer",
    "precision_of",
    "with_adapter",
]


def check_model_folder(model: str) -> OrthoMergeError | None:
    """Return what is wrong with where a model is said to be; hub names are not looked up."""
    folder = Path(model)
    if not folder.exists():
        if model.count("/") == 1 and not model.startswith((".", "/")):
            return None  # a hub name: transformers looks it up
        return CheckpointError(
            "there is no such model", file=model, remedy="Name a folder, or org/name on the hub."
        )
    if (folder / "adapter_config.json").is_file():
        return CheckpointError(
            "is an adapter, and unlearning starts from a whole model",
            file=model,
            remedy="Merge it into its base first: orthomerge merge ADAPTER --base BASE -o OUT.",
        )
    if not (folder / "config.json").is_file():
        return CheckpointError(
            "is no model folder: it has no config.json",
            file=model,
            remedy="Unlearning runs the model, so it needs the folder that transformers loads.",
        )
    return _check_config(folder / "config.json")


def _check_config(path: Path) -> OrthoMergeError | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        return CheckpointError(f"cannot be read: {_first_line(error)}", file=path)
    if not isinstance(found, dict):
        return CheckpointError("is no model's configuration", file=path, expected="an object")
    return None


def load_tokenizer(model: str) -> Any:
    """Return the model's tokenizer.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"its tokenizer cannot be loaded: {_first_line(error)}",
            file=model,
            remedy="The folder needs the tokenizer's files beside config.json.",
        ) from error


def load_model(model: str, adapter: AdapterSettings, train: TrainSettings) -> Any:
    """Return the model: in fp32 where it is trained itself or runs on a CPU, else as stored.

    Raises:
        CheckpointError: transformers cannot load it as a causal language model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    stored = adapter.kind != "full" and device_of(train) != "cpu" and precision_of(train) != "fp32"
    try:
        loaded, facts = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto" if stored else torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be loaded as a causal language model: {_first_line(error)}",
            file=model,
            remedy="See what the folder holds with: orthomerge inspect",
        ) from error
    missing = sorted(facts["missing_keys"])
    if missing:  # transformers has drawn them at random
        raise CheckpointError(
            f"lacks {len(missing)} of the tensors of its architecture",
            file=model,
            tensor=missing[0],
            remedy="Is it the right config.json, and are all shards there? See: orthomerge inspect",
        )
    return loaded


def with_adapter(model: Any, adapter: AdapterSettings) -> Any:
    """Wrap a model with a fresh adapter that changes nothing yet; only the adapter trains.

    Raises:
        RecipeError: No module of the model is among the targets, or PEFT refuses the settings.
    """
    if adapter.kind == "full":
        return model
    from peft import LoraConfig, OFTConfig, get_peft_model

    targets = adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets)
    config = (
        LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        if adapter.kind == "lora"
        else OFTConfig(
            oft_block_size=adapter.block_size,
            target_modules=targets,
            use_cayley_neumann=False,
            task_type="CAUSAL_LM",
        )
    )
    try:
        return get_peft_model(model, config)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"PEFT cannot make the {adapter.kind} adapter: {_first_line(error)}",
            remedy="Check adapter.targets, adapter.rank and adapter.block_size.",
        ) from error


def device_of(train: TrainSettings) -> str:
    """Return the device's kind: ``cpu`` or ``cuda``.

    Raises:
        RecipeError: A CUDA device is asked for and there is none.
    """
    import torch

    if train.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = train.device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise RecipeError("there is no CUDA device", found=train.device, remedy="Use cpu or auto.")
    number = train.device.partition(":")[2] or "0"
    if number != "0":
        raise RecipeError(
            "the Trainer of transformers always takes the first CUDA device it sees",
            found=train.device,
            remedy=f"Set train.device to cuda, and CUDA_VISIBLE_DEVICES={number} around the run.",
        )
    return kind


def precision_of(train: TrainSettings) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        RecipeError: fp16 is asked for on a CPU.
    """
    if train.precision == "fp16" and device_of(train) == "cpu":
        raise RecipeError(
            "fp16 needs a GPU", found="a CPU", remedy="Set train.precision to fp32 or bf16."
        )
    if train.precision != "auto":
        return train.precision
    import torch

    good = device_of(train) == "cuda" and torch.cuda.is_bf16_supported()
    return "bf16" if good else "fp32"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
