"""What one answer is asked to be, and what of it is there so far. Plain Python."""

import codecs
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from moe_jax.errors import Refused
from moe_jax.infer.serving.packing import TOP

MAX_STOPS, MAX_STOP_LEN = 16, 256


@dataclasses.dataclass(frozen=True)
class Options:
    """How an answer is made. Raises `Refused` for what cannot be.

    Attributes:
      max_tokens: of the answer.
      temperature: 0, or less than `sampling.LEAST_TEMPERATURE`, = greedy; otherwise logits are
        divided by it.
      top_p: mass of the nucleus (arXiv 1904.09751); 1 = everything.
      top_k: so many of the most likely tokens; 0 = all.
      seed: of the draws; the same seed, prompt and choice give the same answer, whatever else runs.
      choice: number of this answer among those to one prompt.
      stop: the text ends before the first of these strings.
      logprobs: so many of the most likely tokens are reported for each token; None = nothing is.
      ignore_end: go on after tokens that end a text.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    choice: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self):
        def within(field: str, low: float, high: float, fix: str) -> None:
            value = getattr(self, field)
            if not low <= value <= high:  # nor is NaN
                raise Refused(field, value, f"must lie in [{low:g}, {high:g}]", fix)

        if self.max_tokens < 1:
            raise Refused("max_tokens", self.max_tokens, "must be at least 1", "use 16")
        within("temperature", 0, 100, "0 = greedy, 1 = as the model says")
        if not (0 < self.top_p <= 1):
            raise Refused("top_p", self.top_p, "must lie in (0, 1]", "1 keeps every token")
        within("top_k", 0, 2**31 - 1, "0 keeps every token")
        within("seed", 0, 2**31 - 1, "use 0")
        if self.logprobs is not None:
            within("logprobs", 0, TOP, "leave it out")
        if len(self.stop) > MAX_STOPS:
            raise Refused("stop", len(self.stop), f"at most {MAX_STOPS} strings", "give fewer")
        for stop in self.stop:
            if not 0 < len(stop) <= MAX_STOP_LEN:
                rule = f"must have 1 to {MAX_STOP_LEN} characters"
                raise Refused("stop", stop, rule, "leave it out or shorten it")


@dataclasses.dataclass(frozen=True)
class Likely:
    """Attributes:
    logprob: of the token that was chosen, natural logarithm.
    top: the most likely tokens and their logprobs, descending.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Part:
    """What one step adds to an answer.

    Attributes:
      token: the new token; None in a last part without one.
      text: what is certain now; a character or a stop string may take several tokens.
      likely: if it was asked for.
      finish: None = more will come; "stop", "length", "cancelled" or "failed".
    """

    token: int | None
    text: str
    likely: Likely | None
    finish: str | None


Deliver = Callable[[Part], None]


@runtime_checkable
class Writes(Protocol):
    """What an answer needs of text.py's `Text`."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""

    def stream(
        self, prompt: Sequence[int], write: Callable[[bytes], object], *, ignore_end: bool = False
    ) -> Callable[[int | None], None]:
        """Writes the prompt; the result is called with every token that follows, None at the end.

        What follows a token of `ends` is written only with `ignore_end`.
        """


class Answer:
    """Tokens in, text out: whole characters, and nothing that may turn out to be a stop string."""

    def __init__(self, text: Writes, prompt: Sequence[int], options: Options):
        self.tokens: list[int] = []
        self._ends = frozenset() if options.ignore_end else text.ends
        self._options = options
        self._bytes: list[bytes] = []
        self._follow = text.stream(prompt, self._bytes.append, ignore_end=options.ignore_end)
        self._bytes.clear()
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._held = ""

    def add(self, token: int) -> tuple[str, str | None]:
        """(text that is certain now, why the answer is finished or None)."""
        self.tokens.append(token)
        finish = None
        if token in self._ends:
            finish = "stop"
        else:
            self._follow(token)
            if len(self.tokens) >= self._options.max_tokens:
                finish = "length"
        if finish:
            self._follow(None)
        text = self._held + self._decode(b"".join(self._bytes), finish is not None)
        self._bytes.clear()
        first = min((at for s in self._options.stop if (at := text.find(s)) >= 0), default=-1)
        if first >= 0:
            return text[:first], "stop"
        if finish:
            return text, finish
        keep = max((_overlap(text, stop) for stop in self._options.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string may begin with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
