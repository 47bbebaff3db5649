"""Makes tests/golden/hf/FAMILY/left.npz: what transformers says of prompts padded on the left.

    /tmp/reference/bin/python tests/golden/make_hf_left.py [FAMILY ...]     # see make_hf.py

The models are those that make_hf.py has made. Three prompts of different lengths are one batch,
padded on the left with token 0, with their attention mask, and continued by `generate`:

    prompt_N     int32 [S]       a prompt, without padding
    text_N       int32 [S + 64]  with its greedy continuation, cached
    rows_N       int32 [R]       positions of `logits_N`: the prompt's, and the last ones
    logits_N     float32 [R, V]

As there, prompts are tried until no choice of their texts is close.
"""

import sys

import numpy as np
import torch
import transformers
from make_hf import FAMILIES, HERE, NEW_TOKENS, run

LENGTHS = (9, 2, 5)
LAST = 4


def steady(model: torch.nn.Module, length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A prompt alone, with its text; no rounding can turn one of its choices."""
    for _ in range(1000):
        alone, margin = run(model, rng.integers(0, 256, length).tolist())
        if margin > 1:
            return alone
    raise SystemExit(f"every prompt of {length} tokens has a close choice")


def make(family: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / family, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rng = np.random.default_rng(1)
    alone = [steady(model, length, rng) for length in LENGTHS]
    width = max(LENGTHS)
    token_BS = torch.zeros((len(LENGTHS), width), dtype=torch.long)
    real_BS = torch.zeros_like(token_BS)
    for row, found in enumerate(alone):
        token_BS[row, width - len(found["prompt"]) :] = torch.from_numpy(found["prompt"])
        real_BS[row, width - len(found["prompt"]) :] = 1
    position_BS = (real_BS.cumsum(-1) - 1).clamp(min=0)
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None
    )
    with torch.no_grad():
        prompts = model(token_BS, attention_mask=real_BS, position_ids=position_BS)
        ran = model.generate(
            token_BS,
            attention_mask=real_BS,
            generation_config=settings,
            output_logits=True,
            return_dict_in_generate=True,
        )
    golden = {}
    for row, (length, found) in enumerate(zip(LENGTHS, alone, strict=True)):
        text = ran.sequences[row, width - length :].numpy().astype(np.int32)
        of_prompt = prompts.logits[row, width - length :].numpy()
        of_steps = np.stack([logits[row].numpy() for logits in ran.logits])
        last = np.arange(NEW_TOKENS - LAST, NEW_TOKENS)
        golden |= {
            f"prompt_{row}": found["prompt"],
            f"text_{row}": text,
            f"rows_{row}": np.r_[:length, length - 1 + last].astype(np.int32),
            f"logits_{row}": np.concatenate([of_prompt, of_steps[last]]),
        }
        off = np.abs(of_prompt - found["logits"][:length]).max() / np.ptp(of_prompt)
        same = "equal" if (text == found["text"]).all() else "DIFFERENT"
        print(f"{family}: {length} tokens, alone and padded: text {same}, logits within {off:.1e}")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    np.savez_compressed(HERE / family / "left.npz", made_with=np.array(versions), **golden)


if __name__ == "__main__":
    for name in sys.argv[1:] or FAMILIES:
        make(name)
