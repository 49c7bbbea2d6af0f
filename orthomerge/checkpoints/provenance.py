"""Write down how an output was made: ``orthomerge.json`` and the model card.

Everything is a function of the settings and the inputs' content. There is no date and no duration
in it, so that repeating a merge gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from orthomerge.checkpoints.json_text import json_text

__all__ = ["PROVENANCE_NAME", "model_card", "provenance_json", "read_provenance"]

PROVENANCE_NAME = "orthomerge.json"


def provenance_json(content: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """Return the text of the provenance record."""
    return json_text(content, indent=indent)


def read_provenance(text: str) -> dict[str, Any] | None:
    """Return a provenance record, or None if the text is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and "orthomerge" in content else None


def model_card(
    name: str,
    method: str,
    reference: str,
    sources: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    *,
    adapter: bool = False,
) -> str:
    """Return a model card with the metadata the Hub understands.

    Args:
        name: Name of the output.
        method: Method id.
        reference: Where the method comes from.
        sources: One mapping per source with ``role``, ``origin`` and ``digest``.
        recipe: The settings.
        adapter: The output is a PEFT adapter.
    """
    origins = [source["origin"] for source in sources]
    hub_names = [o[3:].partition("@")[0] for o in origins if o.startswith("hf:")]
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "tags": list(dict.fromkeys(["merge", "orthomerge", method])),
    }
    if hub_names:
        front["base_model"] = hub_names
        front["base_model_relation"] = "merge"
    rows = "\n".join(
        f"| {s['role']} | `{s['origin']}` | `{s['digest'] or 'not read'}` |" for s in sources
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# {name}\n\n"
        f"Merged with orthomerge, method **{method}** ({reference}).\n\n"
        f"| role | source | content digest |\n|---|---|---|\n{rows}\n\n"
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```\n"
    )
