"""The columns that text comes in: plain, conversations of several makes, and pairs of a question and its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

TEXTS = ("text", "content")
CONVERSATIONS = ("messages", "conversations", "conversation")
PAIRS = (  # what is asked, what further belongs to that, and what is answered
    ("instruction", "input", ("output", "response")),
    ("prompt", "", ("completion", "response", "chosen")),
    ("question", "context", ("answer", "response")),
)
COLUMNS = ("input_ids", *TEXTS, *CONVERSATIONS, *(asked for asked, _, _ in PAIRS))  # in order of preference
ROLES: Mapping[str, str] = MappingProxyType(  # ShareGPT's names, and some others'
    {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bot": "assistant", "model": "assistant",
     "function_call": "assistant", "observation": "tool", "function_response": "tool"}
)  # fmt: skip


def conversation(value: list[Any]) -> list[dict[str, Any]] | None:
    """Messages with roles and contents as chat templates want them; None for what is no list of messages."""
    if not all(isinstance(message, dict) and ("role" in message or "from" in message) for message in value):
        return None
    return [_message(message) for message in value]


def pair(record: Mapping[str, Any], asked: str) -> list[dict[str, Any]] | None:
    """The question of a record and its answer as two messages; None where either is missing."""
    beside, answers = next((beside, answers) for column, beside, answers in PAIRS if column == asked)
    question, answer = record.get(asked), next((record[name] for name in answers if record.get(name)), None)
    if isinstance(question, list) and isinstance(answer, list):  # both are messages already
        return conversation([*question, *answer])
    if not (isinstance(question, str) and isinstance(answer, str) and question.strip()):
        return None
    more = record.get(beside)
    whole = f"{question}\n\n{more}" if isinstance(more, str) and more.strip() else question
    return [{"role": "user", "content": whole}, {"role": "assistant", "content": answer}]


def tools(record: Mapping[str, Any]) -> list[Any] | None:
    """The tools that a conversation may call, also where they are JSON in a string."""
    found = _parsed(record.get("tools"))
    return found if isinstance(found, list) and found else None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content", message.get("value"))
    if role is None:
        role = ROLES.get(str(message["from"]), message["from"])
    made = {name: value for name, value in message.items() if name not in ("from", "value", "tool_calls") and value is not None}
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    return {**made, "role": role, "content": _content(content)} | ({"tool_calls": calls} if calls else {})


def _content(content: Any) -> Any:
    """A content as text: the texts of its parts, and nothing where a message only calls tools."""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content if part)
    return "" if content is None else content


def _call(call: Any) -> Any:
    """A call whose arguments are an object, as templates want it, and not JSON in a string."""
    if isinstance(call, dict) and isinstance(function := call.get("function"), dict) and "arguments" in function:
        return {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
    return call


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value
