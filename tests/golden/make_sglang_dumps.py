"""Writes sglang_per_token.pt and sglang_stat.pt beside itself, as SGLang's recorder dumps them.

Needs torch, which nothing else here does: python tests/golden/make_sglang_dumps.py
(the committed files: torch 2.13.0).
"""

import pathlib

import torch

HERE = pathlib.Path(__file__).parent
# The recorder keeps eight experts per token for every model; here there are two. Layer 0 is dense.
buffer_LTK = torch.full((3, 40, 8), -1, dtype=torch.int32)
buffer_LTK[1, :3, :2] = torch.tensor([[3, 0], [1, 2], [0, 1]], dtype=torch.int32)
buffer_LTK[2, :3, :2] = torch.tensor([[2, 1], [0, 3], [4, 0]], dtype=torch.int32)


def record(number: int, tokens: int, lens: list[int] | None) -> dict:
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": list(range(7, 7 + tokens)),
        "positions": list(range(tokens)),
        "extend_seq_lens": lens,
        "forward_mode": 1,
        "topk_ids_of_layer": buffer_LTK[:, :tokens, :].clone().cpu(),
        "misc_objects": [],
        "global_physical_count": torch.zeros((3, 5), dtype=torch.int32),
    }


torch.save(
    {
        "records": [record(0, 3, [1, 2]), record(1, 0, None), record(2, 2, None)],
        "last_physical_to_logical_map": torch.tensor(
            [[0, 1, 2, 3, 4], [3, 2, 1, 0, 4], [4, 0, 1, 2, 3]]
        ),
    },
    HERE / "sglang_per_token.pt",
)
torch.save(
    {
        "rank": 0,
        "logical_count": torch.arange(24, dtype=torch.int32).reshape(2, 3, 4),
        "average_utilization_rate_over_window": None,
    },
    HERE / "sglang_stat.pt",
)
