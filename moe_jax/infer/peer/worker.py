"""transformers in a process of its own: reads one JSON object a line, answers one a line.

Run as a file, by an interpreter that has torch and transformers and need not have anything else of
ours. Between two questions it waits for its input and computes nothing, so whoever asks has the
cores to itself.

    {"do": "load", "folder": DIR, "threads": N}     the model, float32
    {"do": "use", "experts": NAME, "cache": NAME}   how experts are computed, which cache
    {"do": "prefill", "tokens": [[...]]}            seconds until the next tokens are there
    {"do": "decode", "tokens": [[...]], "steps": N} greedy: seconds a step, after the first token
    {"do": "generate", "tokens": [[...]], "new": N} `generate`, greedy, of prompts of any lengths:
                                                    seconds until the first tokens are chosen
"""

import json
import os
import sys
import time
from typing import Any

import torch
import transformers


class Peer:
    """One model."""

    def __init__(self) -> None:
        self.model: Any = None
        self.cache = "dynamic"

    def load(self, folder, threads):
        torch.set_num_threads(threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        self.model = model.eval()
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def use(self, experts, cache):
        self.model.set_experts_implementation(experts)
        self.cache = cache
        return {}

    def prefill(self, tokens):
        token_BS = torch.tensor(tokens)
        started = time.perf_counter()
        logits_BV, _ = self._prompt(token_BS, token_BS.shape[1])
        logits_BV.argmax(-1).tolist()
        return {"seconds": time.perf_counter() - started}

    def decode(self, tokens, steps):
        token_BS = torch.tensor(tokens)
        length = token_BS.shape[1]
        experts = self.model.config._experts_implementation
        self.model.set_experts_implementation("eager")  # a prompt in "batched_mm" takes gigabytes
        logits_BV, cache = self._prompt(token_BS, length + steps + 1)
        self.model.set_experts_implementation(experts)
        chosen_B = logits_BV.argmax(-1)
        found = [chosen_B]
        started = time.perf_counter()
        for step in range(steps):
            out = self.model(
                chosen_B[:, None],
                past_key_values=cache,
                use_cache=True,
                cache_position=torch.tensor([length + step]),
                position_ids=torch.full((len(tokens), 1), length + step),
            )
            chosen_B = out.logits[:, -1].argmax(-1)
            found.append(chosen_B)
        seconds = time.perf_counter() - started
        return {"seconds": seconds / steps, "tokens": torch.stack(found, dim=1).tolist()}

    def generate(self, tokens, new):
        started, length, first = time.perf_counter(), max(map(len, tokens)), []
        token_BS = torch.tensor([[0] * (length - len(row)) + row for row in tokens])
        real_BS = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in tokens])

        def watch(_, logits_BV):
            first.append(time.perf_counter() - started)
            return logits_BV

        self.model.generate(
            token_BS,
            attention_mask=real_BS,
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[watch],
        )
        return {"first": first[0]}

    def _prompt(self, token_BS, capacity):
        cache = transformers.DynamicCache(config=self.model.config)
        if self.cache == "static":
            cache = transformers.StaticCache(config=self.model.config, max_cache_len=capacity)
        out = self.model(token_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], cache


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a package prints is no answer
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    peer = Peer()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            with torch.inference_mode():
                answer = getattr(peer, asked.pop("do"))(**asked)
        except Exception as error:  # told to whoever asked; the next question may go well
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
