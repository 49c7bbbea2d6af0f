"""Turn the turns of a chat, as data files write them, into messages.

Read are OpenAI's ``role``/``content`` and ShareGPT's ``from``/``value``; templates are elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from orthomerge.unlearning.data.rows import Message

__all__ = ["messages_from"]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
_STYLES = (("role", "content"), ("from", "value"))
_REFUSED = {"tool_calls", "function_call"}


def messages_from(value: object) -> tuple[tuple[Message, ...], list[str], set[str]]:
    """Return the messages, what is wrong with the others, and the keys that were not read.

    A list of objects is read, the same as JSON text, and one object of lists, which is how some
    tables store it. ``weight: 0`` on an assistant's turn takes it out of the loss.
    """
    turns = _turns(value)
    if turns is None:
        return (), [f"its messages are not a list of objects, but {type(value).__name__}"], set()
    messages: list[Message] = []
    problems: list[str] = []
    unread: set[str] = set()
    for place, turn in enumerate(turns, start=1):
        message, problem = _message(turn, unread)
        if problem is not None:
            problems.append(f"turn {place} {problem}")
        elif message is not None:
            messages.append(message)
    return tuple(messages), problems, unread


def _turns(value: object) -> list[Mapping[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, Mapping):
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        lengths = {len(column) for column in columns.values()}
        if len(columns) < len(value) or len(lengths) != 1:
            return None
        return [
            dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
        ]
    if isinstance(value, list | tuple) and all(isinstance(turn, Mapping) for turn in value):
        return list(value)
    return None


def _message(turn: Mapping[str, Any], unread: set[str]) -> tuple[Message | None, str | None]:
    given = {key: item for key, item in turn.items() if item is not None}
    style = next((style for style in _STYLES if set(style) <= set(given)), None)
    calls = sorted(_REFUSED & set(given))
    if calls:
        return None, f"calls tools ('{calls[0]}'), which no mask covers; take the row out"
    if style is None:
        keys = ", ".join(map(str, given)) or "none"
        return None, f"has neither role and content nor from and value (keys: {keys})"
    role, content = _role(given[style[0]]), _content(given[style[1]])
    if role is None:
        return None, f"has the role {given[style[0]]!r} (known: {', '.join(_ROLES)})"
    if content is None:
        return None, "has no text as its content; only text can be used"
    scored = True
    if "weight" in given:
        if given["weight"] not in (0, 1):
            return None, f"has the weight {given['weight']!r}, neither 0 nor 1"
        scored = bool(given["weight"])
    unread.update(set(given) - {*style, "weight"})
    return Message(role, content, scored), None


def _role(value: object) -> str | None:
    return _ROLES.get(value.strip().lower()) if isinstance(value, str) else None


def _content(value: object) -> str | None:
    """Return text, also where it comes in parts ``{"type": "text", "text": …}``."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value:
        return None
    parts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in value
    ]
    return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
