"""Prompts as text: system prompts, templates, suffixes."""

import pytest

from cures_ray.config import DataConfig
from cures_ray.data.render import Renderer
from cures_ray.messages import ConfigError
from cures_ray.synthetic.base_model import build_tokenizer

# The forms of widespread chat templates, written for this test.
DEFAULT_SYSTEM = (  # a system message of its own where the chat has none
    "{% if messages[0]['role'] != 'system' %}<|system|>You are Kim.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BEGIN_AND_DATE = (  # a begin token, and a system block that also holds the date
    "{{ bos_token }}{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else 'You are Kim.' %}"
    "<|system|>Today: 1 May. {{ s }}<|end|>"
    "{% for m in messages %}{% if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def render(chat_template: str | None, prompt="2+2=", **keys) -> str:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    if chat_template == BEGIN_AND_DATE:
        tokenizer.bos_token = "<|pad|>"
    return Renderer(DataConfig(**keys), tokenizer)(prompt, "here")


def test_no_system_prompt_keeps_the_templates_own_and_an_empty_one_switches_it_off():
    assert render(DEFAULT_SYSTEM) == "<|system|>You are Kim.<|end|><|user|>2+2=<|end|><|assistant|>"
    assert render(DEFAULT_SYSTEM, system_prompt="") == "<|user|>2+2=<|end|><|assistant|>"
    assert render(DEFAULT_SYSTEM, system_prompt="be brief").startswith("<|system|>be brief<|end|><|user|>")


def test_an_empty_system_prompt_keeps_the_begin_token_and_needs_no_system_role():
    assert render(BEGIN_AND_DATE).startswith("<|pad|><|system|>Today: 1 May. You are Kim.")
    assert render(BEGIN_AND_DATE, system_prompt="") == "<|pad|><|user|>2+2=<|end|><|assistant|>"
    assert render(NO_SYSTEM, system_prompt="") == "<|user|>2+2=<|assistant|>"


def test_a_chats_own_system_message_stays_under_an_empty_system_prompt():
    chat = [{"role": "system", "content": "own"}, {"role": "user", "content": "1"}]
    assert render(DEFAULT_SYSTEM, chat, system_prompt="").startswith("<|system|>own<|end|><|user|>1")


def test_templates_are_chat_plain_or_a_text_around_the_prompt():
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    assert render(DEFAULT_SYSTEM, template="plain") == "2+2="
    assert render(None, chat, template="plain") == "1\n\n2"
    assert render(None, template="Question: {prompt}\nAnswer:") == "Question: 2+2=\nAnswer:"
    assert render(DEFAULT_SYSTEM, template="Q: {prompt}", system_prompt="S") == "Q: S\n\n2+2="
    with pytest.raises(ConfigError, match="no chat template"):
        render(None, template="chat")
    with pytest.raises(ConfigError, match=r"with \{prompt\} in it"):
        render(None, template="qwen")


def test_a_suffix_is_added_to_the_last_message():
    assert render(NO_SYSTEM, prompt_suffix=" Box it.") == "<|user|>2+2= Box it.<|assistant|>"
    chat = [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}]
    assert render(NO_SYSTEM, chat, prompt_suffix="!") == "<|user|>1<|user|>2!<|assistant|>"
    assert chat[1]["content"] == "2"
