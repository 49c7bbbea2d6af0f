"""What surrounds the weights in a model folder: config, tokenizer, generation settings, tied names.

Decides which files an output inherits from its donor and rewrites the dtype in config.json, so
that it says what is on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orthomerge.errors import CheckpointError

__all__ = ["config_with_dtype", "inherited_files", "is_tied", "read_config", "tied_alias"]

_INHERITED = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "spiece.model",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "LICENSE*",
)
_DTYPE_KEYS = ("dtype", "torch_dtype")

# Output heads and the input embeddings they can be tied to, by the end of the tensor's name.
_HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "output.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "shared.weight",
)


def read_config(folder: Path | None) -> dict[str, Any] | None:
    """Return config.json of a model folder, or None where there is none.

    Raises:
        CheckpointError: It cannot be read or is not a JSON object.
    """
    path = folder / "config.json" if folder else None
    if path is None or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON: {error}", file=path) from error
    if not isinstance(config, dict):
        raise CheckpointError("must be a JSON object", file=path)
    return config


def inherited_files(folder: Path) -> dict[str, Path]:
    """Return the files, beside weights and config.json, that an output takes over: name to path."""
    found = {
        path.name: path
        for pattern in _INHERITED
        for path in folder.glob(pattern)
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt")
    }
    return dict(sorted(found.items()))


def config_with_dtype(config: Mapping[str, Any], dtype: str) -> str:
    """Return config.json's text with every dtype entry set to ``dtype`` (e.g. ``bfloat16``).

    Nested configurations (text and vision parts) are changed too.
    """

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: dtype if key in _DTYPE_KEYS and isinstance(item, str) else changed(item)
                for key, item in value.items()
            }
        return value

    updated = changed(dict(config))
    if not any(isinstance(updated.get(key), str) for key in _DTYPE_KEYS):  # none, or null
        updated["torch_dtype" if "torch_dtype" in updated else "dtype"] = dtype
    return json.dumps(updated, indent=2, ensure_ascii=False) + "\n"


def is_tied(config: Mapping[str, Any] | None) -> bool:
    """Return whether a config ties the output head to the input embeddings."""
    if config is None:
        return False
    own = config.get("tie_word_embeddings")
    nested = config.get("text_config")
    if own is None and isinstance(nested, dict):
        own = nested.get("tie_word_embeddings")
    return bool(own)


def tied_alias(names: Iterable[str]) -> tuple[str, str] | None:
    """Return (head, embedding): which output head can be an alias of which input embedding.

    The head need not be among ``names``; then its name is the usual ``lm_head.weight``. None if
    the embedding cannot be told unambiguously.
    """
    known = list(names)
    embeddings = [name for name in known if name.endswith(_EMBEDDINGS)]
    heads = [name for name in known if name in _HEADS or name.endswith(_HEADS[:3])]
    if len(embeddings) != 1 or len(heads) > 1:
        return None
    return (heads[0] if heads else "lm_head.weight"), embeddings[0]
