"""Made traces: planted ones, whose best placement is known, and ones that behave like real ones.

Axes: T tokens, L layers, E experts, K experts per token, G planted clusters.
"""

import numpy as np

from moe_jax.errors import Refused
from moe_jax.routing.trace import Trace


def planted(
    *,
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    num_clusters: int,
    stay: float,
    seed: int,
    num_sequences: int = 16,
) -> tuple[Trace, np.ndarray]:
    """Top-1 traces whose layers are cut into clusters at random; returns also cluster_LE.

    With probability `stay` a token goes on in its cluster, else to a cluster drawn uniformly; the
    expert inside the cluster is uniform. So on num_clusters devices the planted placement keeps
    stay + (1 - stay) / G of the transitions, and with enough tokens no other placement keeps more.
    """
    if num_experts % num_clusters:
        raise Refused(
            "num_clusters", num_clusters, f"divides the {num_experts} experts", "Change either"
        )
    rng = np.random.default_rng(seed)
    size = num_experts // num_clusters
    cluster_LE = np.stack(
        [rng.permutation(np.repeat(np.arange(num_clusters), size)) for _ in range(num_layers)]
    )
    members_LGS = np.argsort(cluster_LE, axis=1, kind="stable").reshape(num_layers, -1, size)
    cluster_T = rng.integers(num_clusters, size=num_tokens)
    ids_TLK: np.ndarray = np.empty((num_tokens, num_layers, 1), _id_type(num_experts))
    for layer in range(num_layers):
        if layer:
            moves_T = rng.random(num_tokens) >= stay
            cluster_T = np.where(moves_T, rng.integers(num_clusters, size=num_tokens), cluster_T)
        pick_T = rng.integers(size, size=num_tokens)
        ids_TLK[:, layer, 0] = members_LGS[layer, cluster_T, pick_T]
    return _trace(ids_TLK, num_experts, num_sequences, "planted"), cluster_LE


def realistic(
    *,
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    seed: int,
    num_classes: int = 32,
    zipf: float = 1.0,
    affinity: float = 0.93,
    popularity: float = 0.2,
    num_sequences: int = 64,
) -> Trace:
    """Traces with shared topics; the defaults resemble gpt-oss-20b (load CV .71, locality .567).

    Token class c ~ Zipf(num_classes, zipf); score[l, e] = popularity b[l, e] + affinity U[l, c, e]
    + sqrt(1 - affinity^2) noise, all standard normal; the top_k scores are the token's experts.
    """
    rng = np.random.default_rng(seed)
    weight_C = (1.0 + np.arange(num_classes)) ** -zipf
    class_T = rng.choice(num_classes, size=num_tokens, p=weight_C / weight_C.sum())
    noise = float(np.sqrt(1 - affinity**2))
    ids_TLK: np.ndarray = np.empty((num_tokens, num_layers, top_k), _id_type(num_experts))
    for layer in range(num_layers):
        base_CE = popularity * rng.standard_normal(num_experts)
        base_CE = base_CE + affinity * rng.standard_normal((num_classes, num_experts))
        score_TE = base_CE[class_T] + noise * rng.standard_normal((num_tokens, num_experts))
        top_TK = np.argpartition(-score_TE, top_k - 1, axis=1)[:, :top_k]
        order_TK = np.argsort(-np.take_along_axis(score_TE, top_TK, 1), axis=1)
        ids_TLK[:, layer] = np.take_along_axis(top_TK, order_TK, 1)
    return _trace(ids_TLK, num_experts, num_sequences, "synthetic, classes shared by all layers")


def _trace(ids_TLK: np.ndarray, num_experts: int, num_sequences: int, corpus: str) -> Trace:
    pieces = np.array_split(np.arange(len(ids_TLK)), num_sequences)
    seq_len = np.array([len(piece) for piece in pieces if len(piece)], np.int32)
    return Trace(ids_TLK, num_experts, seq_len, model="synthetic", corpus=corpus)


def _id_type(num_experts: int) -> type:
    return np.uint8 if num_experts <= 255 else np.uint16
