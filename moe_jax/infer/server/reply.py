"""Parts of answers -> the objects of OpenAI's API."""

import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any

from moe_jax.errors import Refused
from moe_jax.infer.serving.request import Likely, Part

_LEAST = -9999.0  # JSON has no infinity, and no NaN


def error(status: int, refused: Refused) -> dict[str, Any]:
    """A refusal, in OpenAI's words and in ours."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": str(refused),
            "type": kind,
            "param": refused.field.encode("utf-8", "backslashreplace").decode(),
            "code": status,
            "value": _short(refused.value),
            "rule": refused.rule,
            "fix": refused.fix,
        }
    }


def _short(value: object) -> str:
    try:
        shown = value if isinstance(value, str) else repr(value)
    except RecursionError:
        shown = type(value).__name__
    shown = shown.encode("utf-8", errors="replace").decode()
    return shown if len(shown) <= 200 else shown[:200] + "..."


@dataclasses.dataclass
class Choice:
    """One answer as it grows."""

    index: int
    text: str = ""
    num_tokens: int = 0
    finish: str | None = None
    tokens: list[tuple[int, Likely]] = dataclasses.field(default_factory=list)

    def add(self, part: Part) -> None:
        self.text += part.text
        self.num_tokens += part.token is not None
        self.finish = part.finish or self.finish
        if part.token is not None and part.likely is not None:
            self.tokens.append((part.token, part.likely))


class Reply:
    """The objects of one request.

    Args:
      chat: of /v1/chat/completions, otherwise of /v1/completions.
      model: its name.
      prompt_tokens: of all prompts.
      piece: what one token adds to a text.
    """

    def __init__(
        self, *, chat: bool, model: str, prompt_tokens: int, piece: Callable[[int], bytes]
    ):
        self._chat, self._prompt_tokens, self._piece = chat, prompt_tokens, piece
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def _object(self, name: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {**self._head, "object": name, "choices": choices, **more}

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """An answer at once."""
        shown = []
        for choice in choices:
            one: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish}
            if self._chat:
                one["message"] = {"role": "assistant", "content": choice.text}
            else:
                one["text"] = choice.text
            one["logprobs"] = self._logprobs(choice.tokens)
            shown.append(one)
        name = "chat.completion" if self._chat else "text_completion"
        return self._object(name, shown, usage=self._usage(choices))

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream of a chat begins with."""
        if not self._chat:
            return None
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}}, None)

    def part(self, index: int, part: Part) -> dict[str, Any] | None:
        """What a part adds; None where there is nothing to say yet."""
        tokens = [(part.token, part.likely)] if part.token is not None and part.likely else []
        if not part.text and not part.finish and not tokens:
            return None
        if self._chat:
            one: dict[str, Any] = {"delta": {"content": part.text} if part.text else {}}
        else:
            one = {"text": part.text}
        one |= {"index": index, "logprobs": self._logprobs(tokens)}
        return self._chunk(one, part.finish)

    def last(self, choices: list[Choice]) -> dict[str, Any]:
        """The numbers of tokens, after a stream."""
        return self._object(self._chunk_name, [], usage=self._usage(choices))

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, choice: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return self._object(self._chunk_name, [{**choice, "finish_reason": finish}])

    def _usage(self, choices: list[Choice]) -> dict[str, int]:
        made = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }

    def _logprobs(self, tokens: list[tuple[int, Likely]]) -> dict[str, Any] | None:
        if not tokens:
            return None
        if self._chat:
            return {"content": [
                {**self._one(token, likely.logprob),
                 "top_logprobs": [self._one(*pair) for pair in likely.top]}
                for token, likely in tokens
            ]}  # fmt: skip
        return {
            "tokens": [_shown(self._piece(token)) for token, _ in tokens],
            "token_logprobs": [_finite(likely.logprob) for _, likely in tokens],
            "top_logprobs": [self._top(likely) for _, likely in tokens],
        }

    def _top(self, likely: Likely) -> dict[str, float]:
        """Of tokens that look the same the most likely one counts."""
        found: dict[str, float] = {}
        for token, logprob in likely.top:
            found.setdefault(_shown(self._piece(token)), _finite(logprob))
        return found

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._piece(token)
        return {"token": _shown(piece), "logprob": _finite(logprob), "bytes": list(piece)}


def _finite(logprob: float) -> float:
    """`_LEAST` in place of what is less, or no number."""
    return logprob if logprob > _LEAST else _LEAST


def _shown(piece: bytes) -> str:
    """A token as text; as OpenAI shows it where it is none."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
