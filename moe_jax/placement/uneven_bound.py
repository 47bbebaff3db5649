"""Fewest contacts of tokens with nodes of different sizes: a semidefinite relaxation by size.

Axes: L layers, E experts, B sizes that nodes have, Q distinct sets of a layer, K experts of a set.

Of the N_b nodes with room for s_b experts, p_be = 1 where e is on one of them, and X_b,ef = 1 where
e and f share one. Y_b = [[N_b, p_b'], [p_b, X_b]] = sum over these nodes of (1, y) (1, y)' is
positive semidefinite, has the trace N_b (1 + s_b), and Y_b (-s_b; 1) = 0. A node with k > 0 of a
token's experts is one contact, and for every whole m > 0
    1 >= 2 k / (m + 1)  -  2 (pairs of k) / (m (m + 1))      (equal at k = m and m + 1;
Dawson and Sankoff 1967), also at k = 0. So a token's contacts with nodes of size b are at least
    2 / (m + 1) sum p_be  -  2 / (m (m + 1)) sum X_b,ef,        m chosen per set and size.
What is left is linear: cost_be p_be less gain_b,ef X_b,ef, summed up.

**Why the bound holds, whatever the solver did.** As in copies_relax.py: for all symmetric T_b the
gain less cost is at most N_b (1 + s_b) largest eigenvalues of T_b (on the complement of (-s_b; 1))
plus the most that the rest can be, where an expert on a node of size b has s_b - 1 companions: one
assignment problem of experts to places. The choices are mixed as in contact_bound.py.
"""

import time

import numpy as np
from scipy import optimize

from moe_jax.placement import semidefinite
from moe_jax.placement.contact_bound import TokenSets

STEPS = 600
CHOICES = 2  # a choice and a bound have to fit in so many times, and FEW steps
FEW = 40
ROUNDING = 1e-12  # of sums, over what they count


def fewest_L(
    sets: list[TokenSets],
    experts: int,
    size_N: np.ndarray,
    weight_N: np.ndarray,
    deadline: float,
) -> np.ndarray:
    """float64 [L]: least of sum_n weight_n (contacts with node n); 0 where there is no time.

    Args:
      sets: of every layer; node `experts` is none.
      experts: E.
      size_N: experts of every node.
      weight_N: of a contact with each node, at least 0; nodes of a size count as the cheapest one.
      deadline: of time.monotonic().
    """
    nothing_L = np.zeros(len(sets))
    size_B, number_B = np.unique(size_N, return_counts=True)
    cost_B = np.array([weight_N[size_N == size].min() for size in size_B], float)
    if time.monotonic() >= deadline or not cost_B.any():
        return nothing_L
    run = _Relaxation(len(sets), experts, size_B, number_B)
    choices = _Choices(sets, run, cost_B)
    started = time.monotonic()
    choices(run)
    run.bound_A()
    spent = time.monotonic()
    run.step()
    needed = CHOICES * (spent - started) + FEW * (time.monotonic() - spent)
    if time.monotonic() + needed > deadline:
        return nothing_L
    found_L = semidefinite.least(run, deadline, STEPS, choices)
    counted_L = np.array([one.weight_Q.sum() for one in sets]) * cost_B.sum()
    return np.maximum(found_L - ROUNDING * counted_L, 0.0)


class _Relaxation:
    """The state of the method: X_b with p_b on its diagonal, and scaled multipliers.

    Attributes:
      weight_N: gain_BLEE; cost_BLE: see the head of this file.
    """

    def __init__(self, layers: int, experts: int, size_B: np.ndarray, number_B: np.ndarray):
        self.size_B, self.number_B = size_B.astype(int), number_B.astype(float)
        self._bases = [_complement(experts, int(size)) for size in self.size_B]
        self.weight_N = np.zeros((len(size_B), layers, experts, experts))
        self.cost_BLE = np.zeros((len(size_B), layers, experts))
        chance_B = self.number_B * self.size_B / experts
        near_B = chance_B * (self.size_B - 1) / max(experts - 1, 1)
        self._own = np.arange(experts)
        self._x_BLEE = np.zeros_like(self.weight_N) + near_B[:, None, None, None]
        self._x_BLEE[:, :, self._own, self._own] = chance_B[:, None, None]
        self._scaled = np.zeros_like(self._big(self._x_BLEE))
        self.rho = 1.0

    def clique_Cnn(self) -> np.ndarray:
        """[B, L, E, E]: X_b, with p_b on the diagonal, at present."""
        return self._x_BLEE

    def separate(self) -> None:
        """No inequalities are added."""

    def step(self) -> None:
        z = self._big(self._x_BLEE)
        near = np.empty_like(z)
        for b, basis in enumerate(self._bases):
            inside = basis.T @ (z[b] - self._scaled[b]) @ basis
            value_Ln, vector = np.linalg.eigh((inside + inside.transpose(0, 2, 1)) / 2)
            trace = self.number_B[b] * (1 + self.size_B[b])
            value_Ln = semidefinite.capped_simplex(value_Ln, trace, trace)
            vector = basis @ vector
            near[b] = (vector * value_Ln[:, None, :]) @ vector.transpose(0, 2, 1)
        over = semidefinite.OVER
        y = over * near + (1 - over) * z + self._scaled
        x_BLEE = np.clip(y[:, :, 1:, 1:] + self.weight_N / self.rho, 0.0, 1.0)
        diagonal_BLE = np.einsum("blee->ble", y[:, :, 1:, 1:]) + y[:, :, 0, 1:] + y[:, :, 1:, 0]
        place_BLE = (diagonal_BLE - self.cost_BLE / self.rho) / 3
        place_LEB = np.moveaxis(place_BLE, 0, 2)
        flat_XB = semidefinite.capped_simplex(place_LEB.reshape(-1, len(z)), 1.0, 1.0)
        place_BLE = np.moveaxis(flat_XB.reshape(place_LEB.shape), 2, 0)
        x_BLEE[:, :, self._own, self._own] = place_BLE
        self._x_BLEE = x_BLEE
        self._scaled = y - self._big(x_BLEE)

    def bound_A(self) -> np.ndarray:
        """The most of gain less cost, by layer, for T = -rho U."""
        t = -self.rho * (self._scaled + self._scaled.transpose(0, 1, 3, 2)) / 2
        total_L = np.zeros(t.shape[1])
        worth_BLE = np.zeros_like(self.cost_BLE)
        for b, basis in enumerate(self._bases):
            inside = basis.T @ t[b] @ basis
            largest_L = np.linalg.eigvalsh((inside + inside.transpose(0, 2, 1)) / 2)[:, -1]
            rounding_L = 10 * t.shape[2] * np.finfo(float).eps * np.abs(t[b]).sum(axis=(1, 2))
            trace = self.number_B[b] * (1 + self.size_B[b])
            total_L += trace * (largest_L + rounding_L) - self.number_B[b] * t[b][:, 0, 0]
            rest_LEE = self.weight_N[b] - t[b][:, 1:, 1:]
            own_LE = -np.einsum("lee->le", t[b][:, 1:, 1:]) - 2 * t[b][:, 0, 1:]
            rest_LEE[:, self._own, self._own] = -np.inf
            others = self.size_B[b] - 1
            best_LE = np.sort(rest_LEE, axis=2)[:, :, len(self._own) - others :].sum(axis=2)
            worth_BLE[b] = own_LE - self.cost_BLE[b] + best_LE
        places = np.repeat(np.arange(len(t)), (self.number_B * self.size_B).astype(int))
        for layer in range(t.shape[1]):
            worth_EP = worth_BLE[places, layer].T
            at = optimize.linear_sum_assignment(worth_EP, maximize=True)
            total_L[layer] += worth_EP[at].sum()
        return total_L

    def _big(self, x_BLEE: np.ndarray) -> np.ndarray:
        """[B, L, 1 + E, 1 + E]: Y_b."""
        place_BLE = np.einsum("blee->ble", x_BLEE)
        y = np.pad(x_BLEE, ((0, 0), (0, 0), (1, 0), (1, 0)))
        y[:, :, 0, 1:] = y[:, :, 1:, 0] = place_BLE
        y[:, :, 0, 0] = self.number_B[:, None]
        return y


class _Choices:
    """Fictitious play of m, per set and size, against the relaxation; an `Adapt`."""

    def __init__(self, sets: list[TokenSets], run: _Relaxation, cost_B: np.ndarray):
        self.every = semidefinite.CHECK_EVERY
        self._sets, self._run, self._cost_B = sets, run, cost_B
        self._level_L = np.zeros(len(sets))
        self._count = 0

    def __call__(self, run) -> np.ndarray:
        """The cost of a contact is in `cost_BLE` and the gain in `weight_N`; the level is 0."""
        run, share = self._run, min(max(2 / (self._count + 1), 0.1), 1.0)
        self._count += 1
        gain, cost_BLE = np.zeros_like(run.weight_N), np.zeros_like(run.cost_BLE)
        for b, layer in np.ndindex(gain.shape[:2]):
            x_nn = run.clique_Cnn()[b, layer]
            _add(
                self._sets[layer], x_nn, float(self._cost_B[b]), gain[b, layer], cost_BLE[b, layer]
            )
        run.weight_N = (1 - share) * run.weight_N + share * gain
        run.cost_BLE = (1 - share) * run.cost_BLE + share * cost_BLE
        if self._count <= 2:
            run.rho = semidefinite.RHO * max(float(run.weight_N.max()), 1e-12)
        return self._level_L


def _add(one: TokenSets, x_nn: np.ndarray, cost: float, gain_nn, cost_n) -> None:
    """Adds the best m of every set: half of a pair's gain on (e, f), half on (f, e)."""
    node_QK, size = one.node_QK, len(x_nn)
    real_QK = node_QK < size
    x_QKK = np.pad(x_nn, (0, 1))[node_QK[:, :, None], node_QK[:, None, :]]
    here_Q = np.einsum("qkk->q", x_QKK)
    pairs_Q = (x_QKK.sum(axis=(1, 2)) - here_Q) / 2
    m_M1 = np.arange(1, node_QK.shape[1] + 1)[:, None]
    value_MQ = 2 * here_Q / (m_M1 + 1) - 2 * pairs_Q / (m_M1 * (m_M1 + 1))
    m_Q = value_MQ.argmax(axis=0) + 1.0
    each_QK = (cost * one.weight_Q * 2 / (m_Q + 1))[:, None] * real_QK
    cost_n += np.bincount(node_QK.ravel(), each_QK.ravel(), size + 1)[:size]
    pair_Q = cost * one.weight_Q / (m_Q * (m_Q + 1))
    cell_QKK = node_QK[:, :, None] * (size + 1) + node_QK[:, None, :]
    pair_QKK = np.broadcast_to(pair_Q[:, None, None], cell_QKK.shape)
    sums = np.bincount(cell_QKK.ravel(), pair_QKK.ravel(), (size + 1) ** 2)
    pair_nn = sums.reshape(size + 1, size + 1)[:size, :size]
    gain_nn += pair_nn * ~np.eye(size, dtype=bool)


def _complement(experts: int, size: int) -> np.ndarray:
    """Orthonormal columns that span what is orthogonal to (-s; 1)."""
    null = np.append(-float(size), np.ones(experts))[:, None]
    full, _ = np.linalg.qr(np.concatenate([null, np.eye(experts + 1)], axis=1))
    return full[:, 1 : experts + 1]
