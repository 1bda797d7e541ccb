from __future__ import annotations

import gc
import os
import re
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_level, save
from transformers import PreTrainedTokenizerFast

from pie_async.chat_options import ChatOptions
from pie_async.errors import InvalidRequest, ModelError
from pie_async.model.chat_template import ChatTemplate
from pie_async.model.confined_template import ConfinedTemplate
from pie_async.model.tokenizer import Tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "<|end|>"}

# Each exercises the constructs that one family's templates are built from.
INSTRUCTION_PAIRS = """
{%- if messages[0]['role'] == 'system' %}
    {%- set rest = messages[1:] %}
    {%- set preface = '[SYS]' + messages[0]['content'].strip() + '[/SYS]' %}
{%- else %}
    {%- set rest = messages %}
    {%- set preface = false %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if loop.index0 == 0 and preface != false %}
        {%- set content = preface ~ message['content'] %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[ASK] ' + content.strip() + ' [/ASK]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + content.strip() + ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}
"""

HEADERS = """
{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system\\n\\nDate: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{ "<|end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'calls' in message) %}
        {{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|end|>' }}
    {%- elif message.calls is defined and message.calls is iterable %}
        {{- message.calls[0] | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n\\n' }}
{%- endif %}
"""

DEFAULT_SYSTEM = """{% if messages[0]['role'] != 'system' %}
{{ '<|start|>system\\nBe kind.<|end|>\\n' }}
{% endif %}
{% for message in messages %}
  {% if loop.first and message.role == "system" %}
{{ message.content }}
  {% elif loop.last %}
last: {{ message.content | upper }}
  {% else %}
{{'<|start|>' ~ message.role ~ '\\n' ~ message['content'] ~ '<|end|>' ~ '\\n'}}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"""

REASONING = """
{%- set ns = namespace(is_searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.is_searching and message.role == "user" and message.content is string and
           not (message.content.startswith('<reply>') and message.content.endswith('</reply>')) %}
        {%- set ns.is_searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or (not loop.last and thought)) %}
            {{- '<|start|>' + message.role + '\\n<think>' + thought.strip('\\n') + '</think>' }}
        {%- endif %}
        {{- content + '<|end|>\\n' }}
    {%- else %}
        {{- '<|start|>' + message.role + '\\n' + content + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

MACROS = """
{%- macro header(role, tail='\\n') %}{{ '<|start|>' ~ role ~ tail }}{% endmacro -%}
{%- for group in messages | groupby('role') %}{{ group.grouper }};{% endfor -%}
{%- for message in messages if message.role != 'system' -%}
    {%- if message.content == 'skip' %}{% continue %}{% endif %}
    {{- header(message.role) }}{% generation %}{{ message.content }}{% endgeneration %}
    {%- if message.content == 'halt' %}{% break %}{% endif %}
{%- else -%}
    nobody
{%- endfor %}
{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto',
'user') | list | length }} {{ messages[-1].content[2:5] }} {{ messages[0].get('x', 'none') }}
{{ messages | tojson }} {{ messages[0] }} {{ [true, none, 1.5, 'q'] }} {{ none }} {{ true }}
{% for key, value in messages[0].items() %}{{ key }}={{ value }} {% endfor %}
{{ 'a-b'.replace('-', ' ').title() }} {{ messages[0].content.upper()[:3] }} {{ 7 // 2 }} {{ 7 / 2 }}
{#- a comment -#}
   {% if messages | length > 1 %}
   many
   {% endif %}
"""

TEMPLATES = {
    "instruction pairs": INSTRUCTION_PAIRS,
    "headers": HEADERS,
    "default system": DEFAULT_SYSTEM,
    "reasoning": REASONING,
    "macros": MACROS,
}


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


CHATS = {
    "one question": [message("user", "  What is 1 < 2 & 'so' \"on\"? ")],
    "system first": [message("system", " Be brief.\n"), message("user", "Hi")],
    "long": [
        message("system", "Sys"),
        message("user", "halt"),
        message("assistant", "<think>\nhm, é\n</think>\n\nanswer </think> twice"),
        message("user", "<reply>x</reply>"),
        message("assistant", "fine\n"),
        message("user", "skip"),
    ],
    "ends with the assistant": [
        message("user", "q"),
        message("assistant", "<think>a</think>\nb"),
    ],
    "unusual text": [
        message("user", "{{ bos_token }}{% raw %} 😀\u2028\t日本\\n"),
        message("assistant", ""),
    ],
}


@pytest.fixture(scope="module")
def peer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), **TOKENS)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_equals_that_of_transformers(
    template: str, chat: str, add_generation_prompt: bool, peer: PreTrainedTokenizerFast
) -> None:
    expected = peer.apply_chat_template(
        CHATS[chat],
        chat_template=TEMPLATES[template],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    mine = ChatTemplate(TEMPLATES[template], TOKENS, path=Path("test"))
    assert mine.render(CHATS[chat], add_generation_prompt=add_generation_prompt) == expected


CALLING = """{%- if tools %}{{- '<tools>' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- endif %}{%- for message in messages %}
    {%- if message.role == 'tool' %}{{- '<response>' + message.content + '</response>' }}
    {%- elif message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}
        {%- endfor %}
    {%- else %}{{- message.role + ': ' + message.content }}{%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}
{%- endif %}"""
"""What templates of Qwen and Llama read, in short."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells <it> & more",
            "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Köln"]}}},
        },
    }
]
CALLED = [
    message("user", "Weather?"),
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c", "type": "function",
             "function": {"name": "weather", "arguments": {"city": "Köln", "n": [1, None]}}}
        ],
    },
    {"role": "tool", "content": "rain", "tool_call_id": "c"},
]  # fmt: skip


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_tools_and_calls_are_rendered_as_by_transformers(
    variables: dict[str, bool], peer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expected = peer.apply_chat_template(
        CALLED, chat_template=CALLING, tools=TOOLS, tokenize=False, **variables
    )
    save(byte_level(), tmp_path, tokenizer_config=TOKENS | {"chat_template": CALLING})
    tokenizer = Tokenizer.from_directory(tmp_path)
    options = ChatOptions(tools=tuple(TOOLS), variables=variables)
    assert tokenizer.render_chat(CALLED, options=options) == expected
    assert "<tools>" not in tokenizer.render_chat(CALLED)


def test_what_spells_a_control_token_in_a_tool_or_a_call_stays_text(tmp_path: Path) -> None:
    save(byte_level(), tmp_path, tokenizer_config=TOKENS | {"chat_template": CALLING})
    tokenizer = Tokenizer.from_directory(tmp_path)
    control = byte_level().token_to_id("<s>")
    function = {"name": "weather", "description": "<s> in a tool"}
    options = ChatOptions(tools=({"type": "function", "function": function},))
    call = {"function": {"name": "weather", "arguments": {"city": "<s> in a call"}}}
    chat = [message("user", "a"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    tokens = tokenizer.encode_chat(chat, options=options)
    assert control not in tokens
    assert tokenizer.decode(tokens).count("<s> in a") == 2
    assert control in tokenizer.encode("<s>", add_special_tokens=False)


@pytest.mark.parametrize("chat", CHATS)
def test_chat_tokens_equal_those_of_transformers(
    chat: str, peer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save(byte_level(), tmp_path, tokenizer_config=TOKENS | {"chat_template": REASONING})
    expected = peer.apply_chat_template(
        CHATS[chat], chat_template=REASONING, add_generation_prompt=True, return_dict=False
    )
    assert Tokenizer.from_directory(tmp_path).encode_chat(CHATS[chat]) == expected


def test_what_transformers_saves_is_found_and_rendered_alike(
    peer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    peer.chat_template = HEADERS
    peer.save_pretrained(tmp_path)
    expected = peer.apply_chat_template(CHATS["long"], tokenize=False)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.render_chat(CHATS["long"], add_generation_prompt=False) == expected


def render(source: str, content: str = "x") -> str:
    return ChatTemplate(source, TOKENS, path=Path("test")).render([message("user", content)])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{% for i in range(99) %}{{ f(x) }}{% endfor %}{% endmacro %}{{ f(1) }}",
        "{{ 'a' * 4000000000 }}",
        "{{ range(4000000000) | list }}",
    ],
)
def test_a_template_without_end_is_an_error_and_no_hang(source: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        render(source)
    assert refused.value.param == "messages"


ENDLESS = {
    "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}{{ ns.s }}": "memory",
    "{% set s = 'x' %}" + "{% set s = s ~ s %}" * 40 + "{{ s | length }}": "memory",
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set s = 'x' %}"
    + "{% set s = f(s) %}" * 40: "memory",
    "{% for i in range(9999) %}{{ range(99999) | list | sum }}{% endfor %}": "more than 2 s",
}


@pytest.mark.parametrize("source", ENDLESS)
def test_what_fills_memory_or_never_ends_in_native_code_is_refused(source: str) -> None:
    template = ConfinedTemplate(source, TOKENS, path=Path("test"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):  # its process is started again
        with pytest.raises(InvalidRequest, match=ENDLESS[source]) as refused:
            template.render([message("user", "x")])
        assert refused.value.param == "messages"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_a_confined_template_renders_and_refuses_as_the_template_does() -> None:
    confined = ConfinedTemplate(MACROS, TOKENS, path=Path("test"))
    template = ChatTemplate(MACROS, TOKENS, path=Path("test"))
    for chat in CHATS.values():
        assert confined.render(chat) == template.render(chat)
    refusing = ConfinedTemplate("{{ raise_exception('not this') }}", TOKENS, path=Path("test"))
    with pytest.raises(InvalidRequest, match="not this"):
        refusing.render(CHATS["long"])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% if %}", "is not valid"),
        ("{{ 2 * }}", "is not valid"),
        ("{{ 'a' * 99999999 }}" * 99, "memory"),  # computed when it is compiled
        ("x" * 300_000, "has 300000 characters"),
    ],
)
def test_a_confined_template_is_checked_before_it_is_used(source: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        ConfinedTemplate(source, {}, path=Path("here/chat_template.jinja"))


def test_the_process_of_a_template_ends_with_it_and_is_replaced_when_it_dies() -> None:
    template = ConfinedTemplate("{{ messages[0].content }}", {}, path=Path("test"))
    assert template.render([message("user", "a")]) == "a"
    first = template._child._process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert template.render([message("user", "b")]) == "b"
    second = template._child._process
    del template
    gc.collect()
    assert second.returncode == -signal.SIGKILL


def test_a_template_may_refuse_messages_in_its_own_words() -> None:
    with pytest.raises(InvalidRequest, match="no such role: user"):
        render("{{ raise_exception('no such role: ' + messages[0].role) }}")


@pytest.mark.parametrize(
    "source", ["{{ messages[3].content }}", "{{ nothing.at.all }}", "{{ messages.content + 1 }}"]
)
def test_a_template_that_fails_on_these_messages_refuses_them(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template cannot render"):
        render(source)


def test_a_malformed_template_is_a_damaged_model() -> None:
    with pytest.raises(ModelError, match=r"here/chat_template\.jinja is not valid"):
        ChatTemplate("{% if %}", {}, path=Path("here/chat_template.jinja"))


def test_templates_reach_no_python_objects_and_no_files() -> None:
    assert render("{{ messages[0].__class__ }}{{ messages[0].content.__class__ }}") == ""
    with pytest.raises(InvalidRequest):
        render("{% include '/etc/hostname' %}")


def test_templates_can_ask_for_the_date() -> None:
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", render("{{ strftime_now('%Y-%m-%d') }}"))


def test_one_template_renders_in_several_threads_at_once() -> None:
    template = ChatTemplate(REASONING, TOKENS, path=Path("test"))
    chats = [[message("user", f"q{index}")] for index in range(40)]
    with ThreadPoolExecutor(4) as pool:
        rendered = list(pool.map(template.render, chats))
    assert rendered == [template.render(chat) for chat in chats]
