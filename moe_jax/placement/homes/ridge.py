"""Ridge regression with several answers: few sequences, many features, the penalty cross-validated.

Axes: S sequences, F features, M answers (rows at each home).

Minimises sum_s weight_s |y_s - mean - (x_s - x mean) W|^2 + penalty |W|^2 in its dual form, S x S.
The penalty is the one of PENALTIES (times the mean squared size of a sequence's features) that
predicts best over FOLDS parts of the sequences, each from the others. The largest is so large that
next to nothing is left of W: where features say nothing, nobody is told apart.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

PENALTIES = tuple(10.0 ** (half / 2) for half in range(-8, 7))
FOLDS = 5
MOST = 2000  # sequences that are learned from
DIGITS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """answers = mean_M + x_F @ weight_FM."""

    mean_M: Float[np.ndarray, " M"]
    weight_FM: Float[np.ndarray, "F M"]

    def __call__(self, x_SF: Float[np.ndarray, "S F"]) -> Float[np.ndarray, "S M"]:
        return self.mean_M + x_SF @ self.weight_FM


def fit(
    x_SF: Float[np.ndarray, "S F"],
    y_SM: Float[np.ndarray, "S M"],
    weight_S: Float[np.ndarray, " S"],
    seed: int,
) -> Linear:
    """Learns, the penalty by cross-validation; coefficients have DIGITS digits, as in files."""
    rng = np.random.default_rng(seed)
    order_S = rng.permutation(len(x_SF))[:MOST]
    x_SF, y_SM, weight_S = x_SF[order_S], y_SM[order_S], weight_S[order_S]
    fold_S = np.arange(len(x_SF)) % FOLDS
    error_P = np.zeros(len(PENALTIES))
    for fold in range(FOLDS if len(x_SF) >= 2 * FOLDS else 0):
        left_S = fold_S == fold
        learned = _fits(x_SF[~left_S], y_SM[~left_S], weight_S[~left_S], PENALTIES)
        for p, linear in enumerate(learned):
            error_SM = linear(x_SF[left_S]) - y_SM[left_S]
            error_P[p] += (weight_S[left_S, None] * error_SM**2).sum()
    # of equals the most careful one
    best = len(PENALTIES) - 1 - int(error_P[::-1].argmin())
    linear = _fits(x_SF, y_SM, weight_S, PENALTIES[best : best + 1])[0]
    return Linear(rounded(linear.mean_M), rounded(linear.weight_FM))


def rounded(array: np.ndarray) -> np.ndarray:
    """To DIGITS significant digits."""
    size = np.where(array == 0, 1.0, np.abs(array))
    unit = 10.0 ** (DIGITS - 1 - np.floor(np.log10(size)))
    return np.round(array * unit) / unit


def _fits(x_SF, y_SM, weight_S, penalties) -> list[Linear]:
    share_S = weight_S / weight_S.sum()
    x_mean_F, y_mean_M = share_S @ x_SF, share_S @ y_SM
    root_S1 = np.sqrt(weight_S / weight_S.mean())[:, None]
    x_SF, y_SM = root_S1 * (x_SF - x_mean_F), root_S1 * (y_SM - y_mean_M)
    gram_SS = x_SF @ x_SF.T
    scale = max(float(np.trace(gram_SS)) / len(gram_SS), 1e-300)
    found = []
    for penalty in penalties:
        dual_SM = np.linalg.solve(gram_SS + penalty * scale * np.eye(len(gram_SS)), y_SM)
        weight_FM = x_SF.T @ dual_SM
        found.append(Linear(y_mean_M - x_mean_F @ weight_FM, weight_FM))
    return found
