"""Chat templates render here exactly as they do in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import byte_level, save

from onecast.runtime.tokenizer import Tokenizer

CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{% endif %}"""

LLAMA_3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}\
{% endfor %}"""

# Loop controls, namespaces, macros, tojson of what HTML would escape, generation blocks, names
# that are not defined.
EVERYTHING = """\
{%- macro tag(name) %}<{{ name }}>{% endmacro %}
{%- set ns = namespace(found=false, count=0) %}
{%- for message in messages %}
    {%- if message.content == 'skip' %}{% continue %}{% endif %}
    {%- if message.content == 'break' %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{ tag(message.role) }} {{ message | tojson }} {{ message | tojson(indent=2, sort_keys=true) }}
    {% if message.role == 'assistant' %}
        {%- generation %}{% set inside = 1 %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% endif %}
    {%- if message.name is defined %}{{ message.name }}{% endif %}
{% endfor %}
{{ ns.count }} {{ inside is defined }} {{ pad_token }}|{{ documents }}|{{ not_defined }}
    {# a comment #}
{% if add_generation_prompt %}
    go:
{% endif %}
"""

TEMPLATES = {"chatml": CHATML, "llama-3": LLAMA_3, "mistral": MISTRAL, "everything": EVERYTHING}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>you</b> & \"me\" 'é' 😀\n"}],
    [
        {"role": "user", "content": "  spaces  "},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and then?", "name": "Ann"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "skip"},
        {"role": "user", "content": "one"},
        {"role": "user", "content": "break"},
        {"role": "user", "content": "two"},
    ],
]


def write_model(directory: Path, template: Any, where: str) -> Tokenizer:
    save(byte_level(), directory)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "lstrip": False},
    }
    if where == "file":
        (directory / "chat_template.jinja").write_text(template)
        config["chat_template"] = "not this one"
    else:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(directory)


@pytest.mark.parametrize("where", ["config", "file"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_equal_those_of_transformers(name: str, where: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = write_model(tmp_path, TEMPLATES[name], where)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        if name == "mistral" and messages[0]["role"] != "user":
            with pytest.raises(ValueError, match="Conversation roles must alternate"):
                tokenizer.render_chat(messages)
            continue
        text = tokenizer.render_chat(messages)
        assert text == reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_of_several_templates_the_one_named_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "RAG"}, {"name": "default", "template": "{{ eos_token }}"}]
    tokenizer = write_model(tmp_path, named, "config")
    assert tokenizer.render_chat(CONVERSATIONS[0]) == "</s>"


def test_special_tokens_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ pad_token }}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert Tokenizer(tmp_path).render_chat(CONVERSATIONS[0]) == "<s>"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no\nlines') }}", "no lines$"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "too big"),
        ("{{ undefined.attribute }}", "is undefined"),
        ("{% include 'file' %}", "no loader"),
    ],
)
def test_a_template_that_fails_is_one_line_naming_the_file(
    template: str, why: str, tmp_path: Path
) -> None:
    tokenizer = write_model(tmp_path, template, "file")  # completions would work
    with pytest.raises(ValueError, match=why) as caught:
        tokenizer.render_chat(CONVERSATIONS[0])
    assert str(caught.value).startswith(f"{tmp_path / 'chat_template.jinja'}: ")
    assert "\n" not in str(caught.value)


def test_rendering_leaves_the_messages_as_they_were(tmp_path: Path) -> None:
    tokenizer = write_model(tmp_path, "{% set _ = messages[0].update(content='x') %}", "file")
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="is unsafe"):
        tokenizer.render_chat(messages)
    assert messages == [{"role": "user", "content": "hi"}]
