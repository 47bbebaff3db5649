"""Which experts share devices when experts have copies: one semidefinite relaxation.

Axes: L layers, E experts, M devices, P slots, s = P / M slots of a device, W layers of a clique, C
cliques of n = W E nodes, N entries of the flat vector (layout.py), R copies of an expert.

A device with the experts y (0/1, s of every layer) adds y y' to Z: Z_ij counts the devices that
hold both i and j, and its diagonal r the copies, P in every layer. Two experts can serve a token
on one device only if Z_ij >= 1, so what is gained is
    sum_N together_N min(1, x_N)  -  sum_N apart_N x_N  +  sum_LE copies_LE r_LE,
x being Z layer by layer and, with W = 2, from a layer to the next; together_N and apart_N are at
least 0. Of every clique Y = [[M, r'], [r, Z]] = sum over devices of (1, y) (1, y)' is positive
semidefinite, has the trace M + W P, and Y v = 0 for v = (-s; indicator of a layer): rows of Z sum
to s r. Without copies this is semidefinite.py's relaxation.

**Why the bound holds, whatever the solver did.** For all symmetric T_c the gain is at most
    sum_c (M + W P) x (largest eigenvalue of T_c on the complement of the v)
plus the most that gain - sum_c <T_c, Y_c> can be over counts of copies and whole rows: an expert
with r copies has (s - 1) r companions in its layer and s r in the next one, at most r of each
expert, of which the first counts `together`. That is a sum of largest numbers for every r, and the
copies of all experts are the P - E steps in r that add most. Both are exact up to rounding, which
is added ten times over. Any choice of T is valid; it is found as in semidefinite.py.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np

from moe_jax.placement import semidefinite
from moe_jax.placement.layout import Layout

LARGEST = 2**25  # numbers that a bound sorts
ROUNDING = 1e-12  # of sums, over what they count
FEW = 60  # steps below which there is no gain
STEPS = 600


@dataclasses.dataclass(frozen=True, eq=False)
class Gain:
    """What sharing devices is worth; see the head of this file.

    Attributes:
      together_N, apart_N: at least 0; within a layer half on (e, f), half on (f, e), 0 on (e, e).
      copies_LE: of every copy.
    """

    together_N: np.ndarray
    apart_N: np.ndarray
    copies_LE: np.ndarray

    @classmethod
    def of_together(cls, layout: Layout, together_N: np.ndarray) -> "Gain":
        """Nothing but what is together counts."""
        nothing_LE = np.zeros((layout.layers, layout.experts))
        return cls(together_N, np.zeros(layout.size), nothing_LE)


def affordable(run: "Relaxation", seconds: float) -> bool:
    """A few steps and two bounds fit into the time, as measured on one of each."""
    if seconds <= 0 or run.cells > LARGEST:
        return False
    started = time.monotonic()
    run.bound_A()
    bounded = time.monotonic()
    run.step()
    needed = 2 * (bounded - started) + FEW * (time.monotonic() - bounded)
    return time.monotonic() - started + needed < seconds


class Relaxation:
    """The state of the method: x in the box, U the scaled multipliers of every clique.

    Attributes:
      gain: what sharing is worth; `change` it between steps.
      weight_N: its `together_N`, for semidefinite.least.
    """

    def __init__(self, layout: Layout, devices: int, num_slots: int, gain: Gain):
        self.layout, self.gain, self.weight_N = layout, gain, gain.together_N
        self._devices, self._num_slots = devices, num_slots
        self._slots = num_slots // devices
        self._trace = devices + layout.width * num_slots
        self._basis = _complement(layout.experts, layout.width, self._slots)
        self._own_N = layout.flat(
            np.tile(np.eye(layout.experts), (layout.layers, 1, 1)),
            np.zeros((layout.pairs, layout.experts, layout.experts)),
        ).astype(bool)
        self._x_N = self._chance_N()
        self._scaled_Cnn = np.zeros_like(self._cliques(self._x_N))
        self._count_N, _ = self._collected(np.ones_like(self._scaled_Cnn))
        self._rho = semidefinite.RHO * float(np.abs(gain.together_N).max(initial=0.0))

    @property
    def cells(self) -> int:
        """Numbers that a bound sorts."""
        most, experts = self._most_copies, self.layout.experts
        return self.layout.layers * self.layout.width * experts**2 * most * (most + 1) // 2

    @property
    def _most_copies(self) -> int:
        return min(self._devices, self._num_slots - self.layout.experts + 1)

    def _chance_N(self) -> np.ndarray:
        """Every expert with as many copies, anywhere."""
        layout, copies = self.layout, self._num_slots / self.layout.experts
        near = copies * (self._slots - 1) / max(layout.experts - 1, 1)
        square = (layout.experts, layout.experts)
        x_N = layout.flat(
            np.full((layout.layers, *square), near),
            np.full((layout.pairs, *square), copies * self._slots / layout.experts),
        )
        return np.where(self._own_N, copies, x_N)

    def clique_Cnn(self) -> np.ndarray:
        """[C, n, n]: Z of every clique, at present."""
        return self.layout.cliques(self._x_N)

    def change(self, gain: Gain) -> None:
        self.gain, self.weight_N = gain, gain.together_N

    def start(self, gain: Gain) -> None:
        """Another gain, and a penalty that suits it."""
        self.change(gain)
        self._rho = semidefinite.RHO * float(np.abs(gain.together_N).max(initial=0.0))

    def separate(self) -> None:
        """No inequalities are added: triangles were found to gain nothing."""

    def step(self) -> None:
        if not self._rho:
            return
        z_Cnn = self._cliques(self._x_N)
        inside = self._basis.T @ (z_Cnn - self._scaled_Cnn) @ self._basis
        value_Cn, vector = np.linalg.eigh((inside + inside.transpose(0, 2, 1)) / 2)
        value_Cn = semidefinite.capped_simplex(value_Cn, self._trace, self._trace)
        vector = self._basis @ vector
        near_Cnn = (vector * value_Cn[:, None, :]) @ vector.transpose(0, 2, 1)
        over = semidefinite.OVER
        y_Cnn = over * near_Cnn + (1 - over) * z_Cnn + self._scaled_Cnn
        collected_N, _ = self._collected(y_Cnn)
        stiff_N = self._rho * self._count_N
        free_N = self.layout.symmetric(collected_N) / self._count_N - self.gain.apart_N / stiff_N
        pulled_N = free_N + self.gain.together_N / stiff_N
        # what is together once gains nothing by being together again
        x_N = np.where(pulled_N <= 1, pulled_N, np.maximum(free_N, 1.0))
        copies_N = free_N + self._on_own(self.gain.copies_LE) / stiff_N
        x_N = np.where(self._own_N, np.maximum(copies_N, 1.0), np.maximum(x_N, 0.0))
        self._x_N = np.minimum(x_N, self._devices)
        self._scaled_Cnn = y_Cnn - self._cliques(self._x_N)

    def bound_A(self) -> np.ndarray:
        """The bound of the head of this file, for T = -rho U."""
        t_Cnn = -self._rho * (self._scaled_Cnn + self._scaled_Cnn.transpose(0, 2, 1)) / 2
        collected_N, first_C = self._collected(t_Cnn)
        inside = self._basis.T @ t_Cnn @ self._basis
        largest_C = np.linalg.eigvalsh((inside + inside.transpose(0, 2, 1)) / 2)[:, -1]
        sums_C = np.abs(t_Cnn).sum(axis=(1, 2))
        rounding_C = 10 * t_Cnn.shape[1] * np.finfo(float).eps * sums_C
        spectral_C = self._trace * (largest_C + rounding_C) - first_C
        rest_N = -self.layout.symmetric(collected_N) - self.gain.apart_N
        within_LER = self._within_LER(rest_N)
        if self.layout.width == 1:
            return spectral_C + np.array([self._most(gain_ER) for gain_ER in within_LER])
        # what is kept across belongs to the layer before, to the one after, or half to each
        before_LER, after_LER = np.zeros_like(within_LER), np.zeros_like(within_LER)
        rest_LEE, keep_LEE = self.layout.across(rest_N), self.layout.across(self.gain.together_N)
        for layer, (rest_EE, keep_EE) in enumerate(zip(rest_LEE, keep_LEE, strict=True)):
            before_LER[layer] = self._filled_ER(rest_EE, keep_EE, self._slots)
            after_LER[layer + 1] = self._filled_ER(rest_EE.T, keep_EE.T, self._slots)
        sums = [
            sum(
                self._most(gain_ER)
                for gain_ER in within_LER + share * before_LER + (1 - share) * after_LER
            )
            for share in (0.0, 0.5, 1.0)
        ]
        return np.array([spectral_C.sum() + min(sums)])

    def _cliques(self, x_N: np.ndarray) -> np.ndarray:
        """[C, 1 + n, 1 + n]: Y of every clique."""
        z_Cnn = self.layout.cliques(x_N)
        y_Cnn = np.empty((len(z_Cnn), z_Cnn.shape[1] + 1, z_Cnn.shape[1] + 1))
        y_Cnn[:, 1:, 1:], y_Cnn[:, 0, 0] = z_Cnn, self._devices
        y_Cnn[:, 0, 1:] = y_Cnn[:, 1:, 0] = np.einsum("cnn->cn", z_Cnn)
        return y_Cnn

    def _collected(self, y_Cnn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The adjoint of `_cliques`: [N], and what the corners add, by clique."""
        z_Cnn, own = y_Cnn[:, 1:, 1:].copy(), np.arange(y_Cnn.shape[1] - 1)
        z_Cnn[:, own, own] += y_Cnn[:, 0, 1:] + y_Cnn[:, 1:, 0]
        return self.layout.collected(z_Cnn), self._devices * y_Cnn[:, 0, 0]

    def _on_own(self, value_LE: np.ndarray) -> np.ndarray:
        own_N = np.zeros(self.layout.size)
        own_N[self._own_N] = value_LE.ravel()
        return own_N

    def _within_LER(self, rest_N: np.ndarray) -> np.ndarray:
        """Most that an expert's own row can gain within its layer, by its copies."""
        rest_LEE = self.layout.within(rest_N)
        keep_LEE = self.layout.within(self.layout.symmetric(self.gain.together_N))
        own_LE = np.einsum("lee->le", rest_LEE) + self.gain.copies_LE
        off_LEE = np.where(np.eye(self.layout.experts, dtype=bool), -np.inf, rest_LEE)
        found = [
            self._filled_ER(rest_EE, keep_EE, self._slots - 1)
            for rest_EE, keep_EE in zip(off_LEE, keep_LEE, strict=True)
        ]
        return np.stack(found) + own_LE[:, :, None] * np.arange(1, self._most_copies + 1)

    def _filled_ER(self, rest_EE: np.ndarray, keep_EE: np.ndarray, each: int) -> np.ndarray:
        """Most that a row gains with each x r companions, r of an expert at most, by r."""
        found = np.zeros((len(rest_EE), self._most_copies))
        for copies in range(1, self._most_copies + 1 if each else 1):
            wide_EX = np.concatenate([rest_EE + keep_EE] + [rest_EE] * (copies - 1), axis=1)
            found[:, copies - 1] = np.sort(wide_EX, axis=1)[:, -each * copies :].sum(axis=1)
        return found

    def _most(self, gain_ER: np.ndarray) -> float:
        """One copy of every expert, and the P - E steps that add most."""
        more = np.sort(np.diff(gain_ER, axis=1).ravel())[::-1]
        spare = self._num_slots - self.layout.experts
        return float(gain_ER[:, 0].sum() + more[:spare].sum())


def most(
    layout: Layout,
    devices: int,
    num_slots: int,
    together_N: np.ndarray,
    deadline: float,
) -> float:
    """No placement with so many slots gains more; inf where there is no time for the relaxation."""
    run = Relaxation(layout, devices, num_slots, Gain.of_together(layout, together_N))
    if not affordable(run, deadline - time.monotonic()):
        return math.inf
    found = -float(semidefinite.least(run, deadline, STEPS).sum())
    return found + ROUNDING * float(together_N.sum())


def least(
    run: Relaxation, choose: Callable[[Relaxation], tuple[np.ndarray, Gain]], deadline: float
) -> np.ndarray | None:
    """float64 by layer: level less gain, for the best mixture of choices of both; None: no time.

    Sums of rounded numbers: the caller takes ROUNDING of what it counts off.

    Args:
      run: fresh.
      choose: the levels and the gain that are least at the present x.
      deadline: of time.monotonic().
    """
    started = time.monotonic()
    level_A, gain = choose(run)
    run.start(gain)
    chosen = time.monotonic() - started
    if not affordable(run, deadline - time.monotonic() - 2 * chosen):
        return None
    return semidefinite.least(run, deadline, STEPS, _Mixed(choose, level_A, gain))


class _Mixed:
    """Fictitious play: the choice for the present x is mixed into those so far; an `Adapt`."""

    def __init__(self, choose, level_A: np.ndarray, gain: Gain):
        self.every = semidefinite.CHECK_EVERY
        self._choose, self._level_A, self._gain = choose, level_A, gain
        self._count = 0

    def __call__(self, run) -> np.ndarray:
        if self._count:
            share = max(2 / (self._count + 1), 0.1)
            level_A, gain = self._choose(run)
            self._level_A = (1 - share) * self._level_A + share * level_A
            old, new = dataclasses.astuple(self._gain), dataclasses.astuple(gain)
            mixed = [(1 - share) * a + share * b for a, b in zip(old, new, strict=True)]
            self._gain = Gain(*mixed)
            run.change(self._gain)
        self._count += 1
        return self._level_A


def _complement(experts: int, width: int, slots: int) -> np.ndarray:
    """Orthonormal columns that span what is orthogonal to every (-s; indicator of a layer)."""
    null = np.zeros((1 + width * experts, width))
    null[0] = -slots
    for layer in range(width):
        null[1 + layer * experts : 1 + (layer + 1) * experts, layer] = 1.0
    full, _ = np.linalg.qr(np.concatenate([null, np.eye(len(null))], axis=1))
    return full[:, width : len(null)]
