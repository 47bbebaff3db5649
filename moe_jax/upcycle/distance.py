"""How far the experts of a layer are from each other.

Axes: L layers, P physical experts, N numbers of one matrix of an expert, M
matrices.
"""

from collections.abc import Mapping

import numpy as np

from moe_jax.model.moe import MATRICES


def relative_L(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of each MoE layer: root mean square distance of an expert from the experts' mean, over the
    norm of that mean, its three matrices taken together. 0 = all experts are the same.

    Args:
      arrays: `MATRICES` by name, [L, P, ...].
    """
    squares_ML2 = np.array([[_squares(layer) for layer in arrays[name]] for name in MATRICES])
    apart_L, size_L = squares_ML2.sum(axis=0).T
    return np.sqrt(apart_L / size_L)


def _squares(weight_PXY: np.ndarray) -> tuple[float, float]:
    """Sum of squares from the mean, a mean over experts; and of the mean itself."""
    weight_PN = np.asarray(weight_PXY).reshape(len(weight_PXY), -1)
    mean_N = weight_PN.mean(axis=0, dtype=np.float64)
    apart = [float(np.square(expert_N - mean_N).sum()) for expert_N in weight_PN]
    return float(np.mean(apart)), float(np.square(mean_N).sum())
