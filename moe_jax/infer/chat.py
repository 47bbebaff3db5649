"""Messages of a chat -> the tokens of a prompt, in the form that a model was trained on.

A checkpoint's chat template is a program (Jinja) that came with a file, so it is not run: it is
compared with those below, and what a known one would write is written here. A model with another
one, or with none, gets `plain`; whoever knows its form writes it on the client and sends it to
/v1/completions.

What people say is text alone: a special token spelled out in a message stays its characters and
ends nobody's turn.
"""

import dataclasses
import re
from collections.abc import Sequence

Messages = Sequence[dict[str, str]]


def plain(messages: Messages) -> str:
    """`role: text` a paragraph, and the beginning of the assistant's."""
    said = "".join(f"{message['role']}: {message['content']}\n\n" for message in messages)
    return f"{said}assistant:"


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a prompt: one special token by its name, or text that is nothing but text."""

    text: str
    control: bool = False


@dataclasses.dataclass(frozen=True)
class ChatML:
    """`<|im_start|>role`, a line break, the text, `<|im_end|>`, a line break, for each message.

    Attributes:
      system: what a chat begins with that has no system message of its own; None = nothing.
    """

    system: str | None = None
    begin: str = "<|im_start|>"
    end: str = "<|im_end|>"

    def parts(self, messages: Messages) -> list[Part]:
        """The messages, and the beginning of the assistant's answer."""
        messages = list(messages)
        begun = bool(messages) and messages[0]["role"] in ("system", "developer")
        if self.system is not None and not begun:
            messages = [{"role": "system", "content": self.system}, *messages]
        made = []
        for message in messages:
            role = {"developer": "system"}.get(message["role"], message["role"])
            made += [
                Part(self.begin, control=True),
                Part(f"{role}\n{message['content']}"),
                Part(self.end, control=True),
                Part("\n"),
            ]
        return [*made, Part(self.begin, control=True), Part("assistant\n")]


# ChatML as its templates say it, spaces and kinds of quotes apart; SmolLM2 and Qwen2 begin with a
# system message of their own, which is all that differs.
_SYSTEM = (
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n(SAID)"
    "<|im_end|>\n' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}(SYSTEM)?"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _pattern() -> re.Pattern[str]:
    system = re.escape(_squeezed(_SYSTEM)).replace(r"\(SAID\)", r"(?P<said>[^'{}\\]*)")
    whole = re.escape(_squeezed(_CHATML)).replace(r"\(SYSTEM\)\?", f"(?:{system})?")
    return re.compile(whole)


def _squeezed(template: str) -> str:
    """Without what means nothing: spaces inside of tags, and how a line break is written."""
    template = template.replace("\\n", "\n").replace('"', "'")
    template = re.sub(r"(\{[{%]-?)\s*", r"\1", template)
    return re.sub(r"\s*(-?[%}]\})", r"\1", template)


_KNOWN = _pattern()


def known(template: object) -> ChatML | None:
    """The form that a template writes; None where it is not one of those known here."""
    if not isinstance(template, str) or len(template) > 4096:
        return None
    found = _KNOWN.fullmatch(_squeezed(template.strip()))
    return ChatML(found["said"]) if found else None
