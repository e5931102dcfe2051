"""A prompt as the text that the model reads: chat template, system prompt, suffix."""

from __future__ import annotations

from typing import Any

from cures_ray.config import DataConfig
from cures_ray.messages import ConfigError

SLOT = "{prompt}"
Message = dict[str, str]


class Renderer:
    """Callable as ``render(prompt, where)``; ``prompt`` is a string or a list of {role, content} messages.

    ``data.template`` = auto: the tokenizer's chat template where it has one, else the text as it is; chat: the
    template; plain: contents joined by blank lines; any text with ``{prompt}`` in it: that text around the contents.

    Raises:
        ConfigError: ``data.template`` names nothing, or needs a chat template that the tokenizer lacks.
    """

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        wanted = config.template
        if wanted not in ("auto", "chat", "plain") and SLOT not in wanted:
            raise ConfigError(f"data.template = {wanted!r}: auto, chat, plain, or a text with {SLOT} in it")
        if wanted == "chat" and not tokenizer.chat_template:
            raise ConfigError("data.template = chat, but the tokenizer of model.path has no chat template; use plain")
        self._chat = wanted == "chat" or (wanted == "auto" and bool(tokenizer.chat_template))
        self._empty_system = self._find_empty_system() if self._chat and config.system_prompt == "" else ""

    def __call__(self, prompt: Any, where: str) -> str:
        """The rendered text. Raises ConfigError: no prompt, or a chat without a way to write it."""
        messages = self._messages(prompt, where)
        own_system = messages[0]["role"] == "system"
        system = self._config.system_prompt
        if system and not own_system:
            messages.insert(0, {"role": "system", "content": system})
        if self._chat:
            if system == "" and not own_system:
                return self._without_system(messages)
            return self._apply(messages)
        if self._config.template == "auto" and not isinstance(prompt, str):
            raise ConfigError(
                f"{where}: the prompt is a chat, but the tokenizer of model.path has no chat template; "
                "set data.template = plain, use plain strings as prompts, or a model with a template"
            )
        text = "\n\n".join(m["content"] for m in messages)
        return self._config.template.replace(SLOT, text) if SLOT in self._config.template else text

    def _messages(self, prompt: Any, where: str) -> list[Message]:
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt):
            messages = [{"role": m.get("role") or "user", "content": m["content"]} for m in prompt]
        else:
            raise ConfigError(
                f"{where}: the prompt must be a string or a list of {{role, content}} messages, "
                f"not {str(prompt)[:80]!r}"
            )
        if self._config.prompt_suffix:
            messages[-1]["content"] += self._config.prompt_suffix
        return messages

    def _apply(self, messages: list[Message], answer: bool = True) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)

    def _find_empty_system(self) -> str:
        """What the template writes for an empty system message alone; "" where it takes none."""
        try:
            return self._apply([{"role": "system", "content": ""}], answer=False)
        except Exception:  # templates raise what they like
            return ""

    def _without_system(self, messages: list[Message]) -> str:
        """``data.system_prompt`` = "": many templates put a default in front when a chat has no system message, so an
        empty one is rendered and its block is cut off. A template that takes no system message has no default."""
        block, begin = self._empty_system, self._tokenizer.bos_token or ""
        if not block:
            return self._apply(messages)
        text = self._apply([{"role": "system", "content": ""}, *messages])
        if not text.startswith(block):
            return text
        rest = text[len(block) :]
        return begin + rest if begin and block.startswith(begin) and not rest.startswith(begin) else rest
