"""Bodies of requests -> prompts and options. Whatever is wrong is refused by the field's name.

The fields are those of OpenAI's API, `top_k` and `ignore_eos` added. A field that would change the
answer and is not supported may only be what it is by default; one that is not known is refused.
"""

import dataclasses
import difflib
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.errors import Refused
from moe_jax.infer.serving.packing import TOP
from moe_jax.infer.serving.request import Options

MAX_CHOICES = 16
MAX_PROMPTS = 64
_DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI's

_COMMON = {
    *("model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream"),
    *("stream_options", "ignore_eos", "logprobs"),
    *("user", "metadata", "store"),  # not read: nothing of the answer depends on them
}
_COMPLETION = {*_COMMON, "prompt"}
_CHAT = {*_COMMON, "messages", "max_completion_tokens", "top_logprobs"}
# field -> the values that it may have, all of which mean that it is not used.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
_UNUSED_OF_STREAM: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one request of HTTP asks for.

    Attributes:
      prompts: tokens.
      jobs: prompt and options of every answer, all choices of the first prompt first.
      stream, usage: parts as they come; a last part with the numbers of tokens.
    """

    prompts: list[list[int]]
    jobs: list[tuple[list[int], Options]]
    stream: bool
    usage: bool


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object."""

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("body", body[:40], f"must be UTF-8 ({error})", "encode it") from None
    try:
        plain = json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        rule = f"must be JSON ({type(error).__name__}: {error})"
        raise Refused("body", text[:40], rule, "send a JSON object") from None
    if not isinstance(plain, dict):
        raise Refused("body", type(plain).__name__, "must be an object", "send {...}")
    return plain


def completion(body: dict[str, Any], encode: Callable[[str], list[int]]) -> Asked:
    """/v1/completions"""
    _check_names(body, _COMPLETION, _UNUSED)
    prompts = _prompts(body.get("prompt"), encode)
    max_tokens = _whole(body, "max_tokens", _DEFAULT_MAX_TOKENS)
    logprobs = None if body.get("logprobs") is None else _whole(body, "logprobs", 0)
    return _asked(body, prompts, max_tokens, logprobs)


def chat(
    body: dict[str, Any],
    encode: Callable[[list[dict[str, str]]], list[int]],
    context: int,
) -> Asked:
    """/v1/chat/completions; without max_tokens an answer may fill the context."""
    _check_names(body, _CHAT, _UNUSED)
    prompt = encode(_messages(body.get("messages")))
    default = _whole(body, "max_tokens", max(1, context - len(prompt)))
    max_tokens = _whole(body, "max_completion_tokens", default)
    wanted, top = _truth(body, "logprobs"), _whole(body, "top_logprobs", 0)
    if top and not wanted:
        raise Refused("top_logprobs", top, "needs logprobs = true", "set it")
    if not 0 <= top <= TOP:
        raise Refused("top_logprobs", top, f"must lie in [0, {TOP}]", "use 5")
    return _asked(body, [prompt], max_tokens, top if wanted else None)


def _asked(
    body: dict[str, Any], prompts: list[list[int]], max_tokens: int, logprobs: int | None
) -> Asked:
    choices = _whole(body, "n", 1)
    if not 1 <= choices <= MAX_CHOICES:
        raise Refused("n", choices, f"must lie in [1, {MAX_CHOICES}]", "use 1")
    options = Options(
        max_tokens=max_tokens,
        temperature=_real(body, "temperature", 1.0),
        top_p=_real(body, "top_p", 1.0),
        top_k=0 if body.get("top_k") == -1 else _whole(body, "top_k", 0),  # -1: as vLLM has it
        seed=_whole(body, "seed", 0),
        stop=_stops(body.get("stop")),
        logprobs=logprobs,
        ignore_end=_truth(body, "ignore_eos"),
    )
    stream = _truth(body, "stream")
    usage = _usage(body.get("stream_options"), stream)
    jobs = []
    for prompt in prompts:
        # Without a seed each prompt has one of its own: prompts may be equal.
        seed = options.seed if body.get("seed") is not None else secrets.randbelow(2**31)
        jobs += [
            (prompt, dataclasses.replace(options, seed=seed, choice=choice))
            for choice in range(choices)
        ]
    return Asked(prompts, jobs, stream, usage)


def _usage(options: Any, stream: bool) -> bool:
    """Of `stream_options`: whether the numbers of tokens are asked for."""
    field = "stream_options"
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _wrong_type(field, options, "an object")
    if not stream:
        raise Refused(field, options, "needs stream = true", "set it, or leave this out")
    _check_names(options, {"include_usage"}, _UNUSED_OF_STREAM, f"{field}.")
    return _truth(options, "include_usage", f"{field}.")


def _check_names(
    body: dict[str, Any], known: set[str], unused: dict[str, tuple[Any, ...]], where: str = ""
) -> None:
    for name, value in body.items():
        if name in known:
            continue
        field = where + name[:100]
        if name not in unused:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}" if near else "leave it out"
            raise Refused(field, value, "is not a field of this request", fix)
        same = (value == a and isinstance(value, bool) == isinstance(a, bool) for a in unused[name])
        if value is not None and not any(same):
            raise Refused(field, value, "is not supported", "leave it out")


def _check_silent(field: str, said: dict[str, Any], known: tuple[str, ...]) -> None:
    """Of fields that are not known none may say anything: it would go unheard."""
    for name, value in said.items():
        if name not in known and value:
            rule = f"is not supported, only {', '.join(known)} are"
            raise Refused(f"{field}.{name[:100]}", value, rule, "leave it out")


def _wrong_type(field: str, value: Any, kind: str) -> Refused:
    return Refused(field, value, f"must be {kind}, not {type(value).__name__}", "correct it")


def _whole(body: dict[str, Any], field: str, default: int) -> int:
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(field, value, "a whole number")
    return value


def _real(body: dict[str, Any], field: str, default: float) -> float:
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(field, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise Refused(field, value, "is too large a number", "use 1") from None


def _truth(body: dict[str, Any], field: str, where: str = "") -> bool:
    value = body.get(field)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong_type(where + field, value, "true or false")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _wrong_type("stop", value, "a string or a list of strings")
    return tuple(stops)


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(field, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(field, value, f"must be Unicode text ({error})", "correct it") from None
    return value


def _prompts(value: Any, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """A text, a list of texts, a list of tokens or a list of lists of tokens."""
    if value is None:
        raise Refused("prompt", None, "is required", "give a text")
    if isinstance(value, str):
        return [encode(_text("prompt", value))]
    if not isinstance(value, list):
        raise _wrong_type("prompt", value, "a text, tokens, or a list of either")
    if not value:
        raise Refused("prompt", value, "must not be empty", "give a text")
    if all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        return [value]
    if len(value) > MAX_PROMPTS:
        rule = f"at most {MAX_PROMPTS} prompts at once"
        raise Refused("prompt", len(value), rule, "send several requests")
    if all(isinstance(one, str) for one in value):
        return [encode(_text("prompt", one)) for one in value]
    if all(isinstance(one, list) and _are_tokens(one) for one in value):
        return value
    raise Refused("prompt", value, "must be a text, tokens, or a list of either", "correct it")


def _are_tokens(value: Sequence[Any]) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _messages(value: Any) -> list[dict[str, str]]:
    """role and text of each. `name` tells speakers apart for whoever reads the log: let go."""
    if not isinstance(value, list) or not value:
        raise Refused("messages", value, "must be a list of messages", "give one at least")
    messages = []
    for number, message in enumerate(value):
        field = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _wrong_type(field, message, "an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            rule = "must be 'system', 'developer', 'user' or 'assistant'"
            raise Refused(f"{field}.role", role, rule, "use 'user'")
        _check_silent(field, message, ("role", "content", "name"))
        if message.get("name") is not None:
            _text(f"{field}.name", message["name"])
        if isinstance(content, list):
            content = "".join(_part(f"{field}.content", part) for part in content)
        messages.append({"role": role, "content": _text(f"{field}.content", content)})
    return messages


def _part(field: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise Refused(field, part, "may have parts of type 'text' only", "send text")
    _check_silent(field, part, ("type", "text"))
    return _text(f"{field}.text", part.get("text"))
