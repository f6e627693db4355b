"""Chats: rendered as transformers renders them, encoded with the tokens that a template writes, refused where they are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.calibration.chat import ChatTemplate, find_chat_template, messages_of
from llmq.calibration.mixture import WeightedSource
from llmq.calibration.recorder import InputRecorder
from llmq.errors import TextError
from llmq.files import sha256_text
from llmq.model.tokenizer import Tokenizer, load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant!') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system + '\\n' if system is defined and loop.first else '') + message['content'] | trim }}
        {{- ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
SETTINGS = """
{% for message in messages %}
    {% if loop.index > 2 %}
        {% break %}
    {% endif %}
    {{ message | tojson }}
    {% if message.role == 'assistant' %}
        {% generation %}said: {{ message.content }}{% endgeneration %}
    {% endif %}
{% endfor %}
{{ tools | tojson(indent=2) if tools else 'no tools' }}
"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "settings": SETTINGS}
CHAT = [
    {"role": "system", "content": "  be brief  "},
    {"role": "user", "content": "wo ist der Fluß ?"},
    {"role": "assistant", "content": 'north <of> the "town" .'},
]


@pytest.fixture(scope="module")
def tokenizer(wt2_8m: Path) -> Tokenizer:
    return load_tokenizer(wt2_8m)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, [{"name": "größe", "arguments": {"x": 1}}]])
def test_chats_are_rendered_as_transformers_does(tokenizer: Tokenizer, name: str, tools: Any) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template([CHAT], tools=tools, chat_template=TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    assert ChatTemplate(TEMPLATES[name], "t").render(CHAT, tokenizer, what="row 1", tools=tools) == expected[0]


def test_what_a_template_writes_as_special_tokens_becomes_these(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(LLAMA2, "t")
    text = template.render(CHAT[1:], tokenizer, what="row 1")
    assert text.startswith("<s>[INST] wo ist")
    assert text.endswith("</s>")
    ids = template.encode(text, tokenizer)
    inside = tokenizer.encode(text.removeprefix("<s>").removesuffix("</s>"))
    assert ids == [tokenizer.bos_id, *inside, tokenizer.eos_id]
    assert template.encode("plain", tokenizer) == [tokenizer.bos_id, *tokenizer.encode("plain")]  # one BOS, whoever writes it
    assert template.encode("a</s><s>b", tokenizer) == [
        tokenizer.bos_id,
        *tokenizer.encode("a"),
        tokenizer.eos_id,
        tokenizer.bos_id,
        *tokenizer.encode("b"),
    ]


def test_the_date_is_the_same_on_every_day(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", "t")
    assert template.render(CHAT, tokenizer, what="row 1") == "26 Jul 2024"


def test_the_template_is_found_beside_the_tokenizer(wt2_8m: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((wt2_8m / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(TextError, match=r"no chat template .* --chat-template FILE"):
        find_chat_template(tokenizer)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>"}))
    with pytest.raises(TextError, match="no chat template"):
        find_chat_template(tokenizer)
    config.write_text(json.dumps({"chat_template": CHATML}))
    found = find_chat_template(tokenizer)
    assert (found.source, found.sha256, found.origin) == (CHATML, sha256_text(CHATML), "tokenizer_config.json")
    config.write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]})
    )
    assert find_chat_template(tokenizer).source == "y"
    config.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "x"}]}))
    with pytest.raises(TextError, match="no chat template called 'default'"):
        find_chat_template(tokenizer)
    (tmp_path / "chat_template.jinja").write_text(LLAMA2)
    assert find_chat_template(tokenizer).source == LLAMA2  # the file of its own comes first
    other = tmp_path / "other.jinja"
    other.write_text(CHATML)
    assert find_chat_template(tokenizer, str(other)).source == CHATML
    other.write_text(json.dumps({"other": 1}))
    with pytest.raises(TextError, match="holds no chat template"):
        find_chat_template(tokenizer, str(other))
    with pytest.raises(TextError, match="cannot read chat template"):
        find_chat_template(tokenizer, str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for %}", "is not a template"),
        ("{{ messages[0].missing.deeper }}", "cannot render row 7"),
        ("{{ messages[9]['role'] + 1 }}", "cannot render row 7"),
        ("{{ raise_exception('roles must alternate') }}", "cannot render row 7: roles must alternate"),
        ("{{ messages.append(1) }}", "does what no template may"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does what no template may"),
    ],
)
def test_templates_that_are_broken_or_refuse(tokenizer: Tokenizer, source: str, said: str) -> None:
    with pytest.raises(TextError, match=said):
        ChatTemplate(source, "t").render(CHAT, tokenizer, what="row 7")


def test_both_forms_of_a_chat_are_the_same_messages() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "GPT", "value": "a"}]
    roles = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert messages_of(turns, "row 1") == messages_of(roles, "row 1") == roles
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert messages_of(parts, "row 1") == [{"role": "user", "content": "ab"}]
    calls = [{"role": "assistant", "content": None, "tool_calls": [1]}]
    assert messages_of(calls, "row 1") == [{"role": "assistant", "content": "", "tool_calls": [1]}]


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([], "row 3 is not a chat"),
        (["hello"], "row 3 is not a chat"),
        ([{"speaker": "x"}], "message 1 of row 3 has speaker; role and content"),
        ([{"from": "human", "value": "x"}, {"from": "narrator", "value": "x"}], "message 2 of row 3 is from 'narrator'"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 1 of row 3 holds list that is not text"),
        ([{"role": "user", "content": 5}], "message 1 of row 3 holds int that is not text"),
    ],
)
def test_rows_that_hold_no_chat(chat: list[Any], said: str) -> None:
    with pytest.raises(TextError, match=said):
        messages_of(chat, "row 3")


def test_rows_of_chats_become_windows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows, turns, template = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "t.jinja"
    template.write_text(LLAMA2)
    chats = [[{"role": "user", "content": f"q {i} ?"}, {"role": "assistant", "content": f"it is {i} ."}] for i in range(40)]
    rows.write_text("\n".join(json.dumps({"messages": chat, "id": i}) for i, chat in enumerate(chats)))
    spoken = [[{"from": "human", "value": c[0]["content"]}, {"from": "gpt", "value": c[1]["content"]}] for c in chats]
    turns.write_text("\n".join(json.dumps({"conversations": chat}) for chat in spoken))
    with pytest.raises(TextError, match="--chat-template FILE"):
        InputRecorder(tokenizer, windows=4, length=32).record_sources([WeightedSource(str(rows))])
    recorder = InputRecorder(tokenizer, windows=4, length=32, chat_template=str(template))
    recorded, spoken_set = (recorder.record_sources([WeightedSource(str(path))]) for path in (rows, turns))
    assert torch.equal(recorded.tokens, spoken_set.tokens)
    (part,) = recorded.info.parts
    assert (recorded.info.kind, part.kind, part.template_sha256) == ("chat", "chat", sha256_text(LLAMA2))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    found = ChatTemplate(LLAMA2, "t")
    stream = [token for index in order for token in found.encode(found.render(chats[index], tokenizer, what="row"), tokenizer)]
    assert recorded.tokens.flatten().tolist() == stream[: 4 * 32]
    template.write_text(CHATML)
    other = recorder.record_sources([WeightedSource(str(rows))])
    assert other.info.parts[0].template_sha256 != part.template_sha256
    assert not torch.equal(other.tokens, recorded.tokens)
    named = recorder.record_dataset([{"dialogue": chat} for chat in chats], column="dialogue")  # a column that holds chats
    assert torch.equal(named.tokens, other.tokens)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "first"}]}))
    template.write_text(LLAMA2)
    with pytest.raises(TextError, match=r"cannot render row 1 of dataset bad\.jsonl: Conversation roles must alternate"):
        recorder.record_sources([WeightedSource(str(tmp_path / "bad.jsonl"))])
