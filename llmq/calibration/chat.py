"""Chats as the model was trained to read them: the messages of a row, rendered with the tokenizer's chat template.

A template is a program in Jinja that comes with the model. It runs in Jinja's immutable sandbox: it can read the messages and
build a text, and nothing else. Templates are written for the environment of Hugging Face transformers, whose names and settings
are provided: blocks are trimmed, `{% break %}`, `{% continue %}` and `{% generation %}` exist, and so do `raise_exception`,
`strftime_now` and `tojson`. The date is always the same one, so that equal chats make equal tokens on every day.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmq.errors import TextError
from llmq.files import sha256_text
from llmq.model.tokenizer import Tokenizer

CHAT_KEYS = ("messages", "conversations")
"""Columns in which a row may hold a chat, in this order."""
TODAY = datetime(2024, 7, 26, tzinfo=UTC)
"""What `strftime_now` tells a template: the day that Llama 3's templates name where they cannot ask for one."""

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Speakers of the `from`/`value` form, and the roles that templates know."""


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks what a model said, for training; the text inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and where it was read from."""

    source: str
    origin: str

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the template's text."""
        return sha256_text(self.source)

    @cached_property
    def _compiled(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = TODAY.strftime
        try:
            return environment.from_string(self.source)
        except TemplateError as error:
            raise TextError(
                f"chat template {self.origin} is not a template: {error}; name another with --chat-template."
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, what: str, tools: Any = None) -> str:
        """Write a chat as one text.

        Args:
            messages: each with `role` and `content`.
            tokenizer: whose BOS and EOS the template may write.
            what: the chat's name, for the message.
            tools: a row's `tools`, for templates that list them.

        Raises:
            TextError: the template is broken, or refuses this chat.
        """
        try:
            return self._compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=False,
                bos_token=tokenizer.bos_token or "",
                eos_token=tokenizer.eos_token or "",
            )
        except SecurityError as error:
            raise TextError(f"chat template {self.origin} does what no template may: {error}; do not use it.") from error
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise TextError(
                f"chat template {self.origin} cannot render {what}: {str(error).strip().rstrip('.')}; mend the row, or name "
                "another template with --chat-template."
            ) from error

    def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Return the tokens of a rendered text, with one BOS before it where the tokenizer has one.

        What the template writes as BOS and EOS becomes these tokens, whatever the kind of tokenizer.
        """
        ids = _encode_special(text, tokenizer)
        bos = tokenizer.bos_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def find_chat_template(tokenizer: Tokenizer, named: str | None = None) -> ChatTemplate:
    """Find the template that is named, else the one beside the tokenizer.

    Beside a tokenizer, chat_template.jinja comes before the `chat_template` of tokenizer_config.json; of several templates in
    one file it is the one called `default`.

    Args:
        tokenizer: of the model.
        named: a file that holds a template, or a JSON file with a `chat_template`.

    Raises:
        TextError: there is none, or the file cannot be read.
    """
    if named is not None:
        return _read_template(Path(named), required=True)
    folder = tokenizer.path.parent
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and (found := _read_template(path, required=False)).source:
            return found
    raise TextError(
        f"tokenizer {tokenizer.path} has no chat template (neither chat_template.jinja nor a chat_template in "
        "tokenizer_config.json is beside it); name one with --chat-template FILE."
    )


def _read_template(path: Path, *, required: bool) -> ChatTemplate:
    """Read a template; without one in a JSON file its source is empty, unless it is required."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read chat template {path}: {error}; name a UTF-8 file.") from error
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if isinstance(data, dict):
        text = _chosen(data.get("chat_template") or "", path)
    if required and not text.strip():
        raise TextError(f"{path} holds no chat template; name a Jinja file, or a JSON file with a `chat_template`.")
    return ChatTemplate(text, path.name)


def _chosen(value: Any, path: Path) -> str:
    """Return one template of what `chat_template` holds: a text, or a list of named ones."""
    if isinstance(value, str):
        return value
    named = (
        {each.get("name"): each.get("template") for each in value if isinstance(each, dict)} if isinstance(value, list) else {}
    )
    if not isinstance(named.get("default"), str):
        raise TextError(f"{path} has no chat template called 'default'; name a file with one by --chat-template FILE.")
    return str(named["default"])


def messages_of(value: Any, what: str) -> list[dict[str, Any]]:
    """Return a chat's messages with `role` and `content`, from either form in which rows hold them.

    Args:
        value: a list of `{"role", "content"}`, or of `{"from", "value"}` with speakers such as human and gpt.
        what: the row's name, for the message.

    Raises:
        TextError: it is something else, or a speaker is unknown.
    """
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise TextError(f"{what} is not a chat: a list of messages, each with role and content, is expected.")
    return [_message(each, f"message {number} of {what}") for number, each in enumerate(value, start=1)]


def _message(message: dict[str, Any], what: str) -> dict[str, Any]:
    if "role" in message:
        return {**message, "content": _content(message.get("content"), what)}
    speaker = message.get("from")
    if speaker is None or "value" not in message:
        raise TextError(
            f"{what} has {', '.join(sorted(message)) or 'nothing'}; role and content, or from and value, are expected."
        )
    if str(speaker).lower() not in _ROLES:
        raise TextError(f"{what} is from {speaker!r}; known speakers are {', '.join(_ROLES)}.")
    return {"role": _ROLES[str(speaker).lower()], "content": _content(message["value"], what)}


def _content(content: Any, what: str) -> str:
    """Return a message's text: as it is, or the texts of its parts; '' of a message that only calls tools."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise TextError(f"{what} holds {type(content).__name__} that is not text; leave rows with pictures or sound out.")


def _encode_special(text: str, tokenizer: Tokenizer) -> list[int]:
    if tokenizer.kind != "sentencepiece":
        return tokenizer.encode(text)  # these know the spelling of special tokens themselves
    ids: list[int] = []
    special = {tokenizer.bos_token: tokenizer.bos_id, tokenizer.eos_token: tokenizer.eos_id}
    spelled = {spelling: token for spelling, token in special.items() if spelling is not None and token is not None}
    while text:
        start, spelling = min(((text.find(each), each) for each in spelled if each in text), default=(len(text), ""))
        ids += tokenizer.encode(text[:start]) if start else []
        if spelling:
            ids.append(spelled[spelling])
        text = text[start + len(spelling) :]
    return ids


def _raise(message: str) -> str:
    raise TemplateError(message)


def _to_json(value: Any, **how: Any) -> str:
    """`tojson` as transformers has it: not escaped for HTML, and with its letters as they are."""
    allowed: dict[str, Callable[[Any], Any]] = {"indent": int, "sort_keys": bool, "ensure_ascii": bool}
    chosen = {key: convert(how[key]) for key, convert in allowed.items() if how.get(key) is not None}
    return json.dumps(value, **{"ensure_ascii": False, **chosen})
