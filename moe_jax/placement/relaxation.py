"""The most affinity that any placement can keep: one semidefinite relaxation of all layers.

Axes: L layers, E experts, M devices, s = E / M slots, W layers of a clique (2 where layers are tied
to the next, else 1), n = W E, C cliques, N entries of the flat vector (cuts.py).

A placement is a 0/1 matrix X over all (layer, expert), X = 1 where two share a device. Its entries
are wanted within layers (`within_LEE`: co-activation) and from a layer to the next (`across_LEE`:
transitions). Only these enter, so by the completion theorem of chordal graphs (Grone et al. 1984)
X may be any matrix whose *cliques*, pairs of adjacent layers, are each positive semidefinite and
agree where they overlap. Every clique of a placement is 1/M + B R B', B spanning the complement of
its layers' indicators, 0 <= R <= W s, trace R = W s (M - 1) (the set S; Donath and Hoffman 1973,
Rendl and Wolkowicz 1995). Every entry is in [0, 1], every row of a layer sums to s, and the
inequalities of cuts.py hold.

**Why the bound holds, whatever the solver did.** For all symmetric T_c and multipliers y >= 0 of
inequalities A x <= b the affinity w x of a placement is
    sum_c <T_c, X_c>  +  (w - sum_c T_c - y A) x  +  y A x
      <= sum_c max over S of <T_c, .>  +  max over rows that sum to s of (...) x  +  y b.
The first maximum is an eigenvalue sum, the second a sum of largest entries: both exact. Rounding of
the eigenvalues, a few n eps norm(T), is added ten times over.

**How T and y are found.** Alternating direction method of multipliers between S (projection by
eigenvalues) and the box, over-relaxed; T are its scaled multipliers; y follow by Jacobi ascent.
"""

import dataclasses
import functools
import math
import time
from typing import Protocol, runtime_checkable

import numpy as np

from moe_jax.placement.cuts import Cuts, Layout, Loads, Triangles

RHO = 0.05  # penalty of disagreement, over the largest weight
OVER = 1.6  # relaxation
FIRST_CUTS, CUTS_EVERY = 60, 40  # steps
CUTS = 200  # triangles added per clique
CHECK_EVERY = 20
STALE = 1e-5  # relative improvement over STALE_STEPS below which the search ends
STALE_STEPS = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Affinity:
    """What is to be kept together.

    Attributes:
      within_LEE: float64, symmetric, zero diagonal: gained once when e and f share a device.
      across_LEE: float64 [L - 1, E, E]: gained when e of l and f of l + 1 do; None: nothing.
      devices: M.
      load_LE: float64.
      cap_L: largest load of a device; inf where there is none.
    """

    within_LEE: np.ndarray
    across_LEE: np.ndarray | None
    devices: int
    load_LE: np.ndarray
    cap_L: np.ndarray

    @functools.cached_property
    def layout(self) -> Layout:
        layers, experts = self.within_LEE.shape[:2]
        return Layout(layers, experts, 1 if self.across_LEE is None else 2)

    @functools.cached_property
    def weight_N(self) -> np.ndarray:
        across_LEE = np.empty((0, 1, 1)) if self.across_LEE is None else self.across_LEE
        return self.layout.flat(self.within_LEE / 2, across_LEE)

    @property
    def total_A(self) -> np.ndarray:
        """All there is; by layer where layers are independent."""
        within_L = self.within_LEE.sum(axis=(1, 2)) / 2
        if self.across_LEE is None:
            return within_L
        return np.array([within_L.sum() + self.across_LEE.sum()])


def most_kept(affinity: Affinity, deadline: float, steps: int = 3000) -> np.ndarray:
    """float64: upper limits of the affinity that any placement within the caps keeps.

    One entry per layer where layers are independent, else one for all of them together.

    Args:
      affinity: what is wanted; on one device all of it is kept.
      deadline: time.monotonic() after which refining stops (one step is always done).
      steps: most steps.
    """
    most_A = affinity.total_A
    if affinity.devices == 1 or not affinity.weight_N.any():
        return most_A
    kept_A = -least(Relaxation(affinity), deadline, steps)
    return np.minimum(kept_A + 1e-12 * most_A, most_A)


@runtime_checkable  # for type checks while tests run
class Adapt(Protocol):
    """Changes the weights of a running relaxation; see contact_bound.py.

    Attributes:
      every: steps between two changes.
    """

    every: int

    def __call__(self, run: "Relaxation") -> np.ndarray:
        """Gives `run` new weights; returns the level_A that belongs to them."""


def least(run: "Relaxation", deadline: float, steps: int, adapt: Adapt | None = None) -> np.ndarray:
    """The best lower bound met of level_A - (affinity kept); level_A is 0 without adapt."""
    level_A = np.zeros(1) if adapt is None else adapt(run)
    best_A, marked = level_A - run.bound_A(), -math.inf
    for step in range(1, steps + 1):
        run.step()
        late = time.monotonic() >= deadline
        if late or step == steps or step % CHECK_EVERY == 0 or step & (step - 1) == 0:
            best_A = np.maximum(best_A, level_A - run.bound_A())
        if late:
            break
        if step >= FIRST_CUTS and (step - FIRST_CUTS) % CUTS_EVERY == 0:
            run.separate()
        if adapt is not None and step % adapt.every == 0:
            level_A = adapt(run)
        if step % STALE_STEPS == 0:
            if best_A.sum() < marked + STALE * abs(marked):
                break
            marked = float(best_A.sum())
    return best_A


class Relaxation:
    """The state of the method: x in the box, U the scaled multipliers of every clique.

    Attributes:
      weight_N: w; may be changed between steps.
    """

    def __init__(self, affinity: Affinity, weight_N: np.ndarray | None = None):
        layout = affinity.layout
        self.layout = layout
        self._devices, self._slots = affinity.devices, layout.experts // affinity.devices
        self.weight_N = affinity.weight_N if weight_N is None else weight_N
        self._rho = RHO * float(np.abs(self.weight_N).max())
        self._basis = complement(layout.experts, layout.width)
        self.triangles = Triangles(layout, np.random.default_rng(0))
        loads = Loads(layout, affinity.load_LE, affinity.cap_L, affinity.devices)
        self._cuts: list[Cuts] = [self.triangles, loads] if loads.binds else [self.triangles]
        self._can_LEE = ~loads.apart_LEE if loads.binds else np.ones_like(loads.apart_LEE)
        same_EE = np.eye(layout.experts, dtype=bool)
        zeros_LEE = np.zeros((layout.pairs, layout.experts, layout.experts))
        lower_LEE = np.broadcast_to(same_EE, self._can_LEE.shape).astype(float)
        upper_LEE = (self._can_LEE | same_EE).astype(float)
        self._lower_N = layout.flat(lower_LEE, zeros_LEE)
        self._upper_N = layout.flat(upper_LEE, zeros_LEE + 1)
        apart = (self._slots - 1) / max(layout.experts - 1, 1)
        self._x_N = np.clip(
            layout.flat(np.full(self._can_LEE.shape, apart), zeros_LEE + 1 / self._devices),
            self._lower_N,
            self._upper_N,
        )
        self._scaled_Cnn = np.zeros_like(layout.cliques(self._x_N))
        self._weights()

    def _weights(self) -> None:
        """How stiff every entry is, and how far its force reaches."""
        self._stiff_N = self._rho * self.layout.count_N
        self._spread_N = np.sum([cut.degree_N for cut in self._cuts], axis=0) / self._stiff_N
        self.layout.within(self._spread_N)[:] /= 2  # (e, f) and (f, e) share it

    def separate(self) -> None:
        self.triangles.separate(self._x_N, CUTS * len(self._scaled_Cnn))
        self._weights()

    def clique_Cnn(self) -> np.ndarray:
        """[C, n, n]: how much (layer, expert) pairs of every clique are together, at present."""
        return self.layout.cliques(self._x_N)

    def step(self) -> None:
        z_Cnn = self.layout.cliques(self._x_N)
        x_Cnn = self._projected(z_Cnn - self._scaled_Cnn)
        y_Cnn = OVER * x_Cnn + (1 - OVER) * z_Cnn + self._scaled_Cnn
        mean_N = self.layout.symmetric(self.layout.collected(y_Cnn)) / self.layout.count_N
        free_N = mean_N + self.weight_N / self._stiff_N
        x_N = self._boxed(free_N)
        for cut in self._cuts:
            cut.ascend(x_N, self._spread_N)
        self._x_N = self._boxed(free_N)
        self._scaled_Cnn = y_Cnn - self.layout.cliques(self._x_N)

    def _boxed(self, free_N: np.ndarray) -> np.ndarray:
        force_N = np.sum([cut.force_N() for cut in self._cuts], axis=0)
        return np.clip(free_N - force_N / self._stiff_N, self._lower_N, self._upper_N)

    def _projected(self, x_Cnn: np.ndarray) -> np.ndarray:
        """The nearest matrices of S."""
        inside = self._basis.T @ x_Cnn @ self._basis
        value_Cn, vector = np.linalg.eigh((inside + inside.transpose(0, 2, 1)) / 2)
        level = self.layout.width * self._slots
        value_Cn = _capped_simplex(value_Cn, level, level * (self._devices - 1))
        vector = self._basis @ vector
        return 1 / self._devices + (vector * value_Cn[:, None, :]) @ vector.transpose(0, 2, 1)

    def bound_A(self) -> np.ndarray:
        """The bound of the head of this file, for T = -rho U and the present y."""
        t_Cnn = -self._rho * (self._scaled_Cnn + self._scaled_Cnn.transpose(0, 2, 1)) / 2
        rest_N = self.weight_N - self.layout.collected(t_Cnn)
        for cut in self._cuts:
            rest_N = rest_N - cut.force_N()
        spectral_C, rows_L = self._spectral_C(t_Cnn), self._of_rows_L(rest_N)
        constant_L = np.sum([cut.constant_L for cut in self._cuts], axis=0)
        if self.layout.width == 1:
            return spectral_C + rows_L + constant_L
        o_LEE = self.layout.across(rest_N)
        row_L = np.sort(o_LEE, axis=2)[:, :, -self._slots :].sum(axis=(1, 2))
        column_L = np.sort(o_LEE, axis=1)[:, -self._slots :].sum(axis=(1, 2))
        across = np.minimum(row_L, column_L).sum()
        return np.array([spectral_C.sum() + rows_L.sum() + constant_L.sum() + across])

    def _spectral_C(self, t_Cnn: np.ndarray) -> np.ndarray:
        """The largest <T, X> over S."""
        inside = self._basis.T @ t_Cnn @ self._basis
        value_Cn = np.linalg.eigvalsh((inside + inside.transpose(0, 2, 1)) / 2)
        top, size = self._devices - 1, t_Cnn.shape[1]
        rounding_C = 10 * size * np.finfo(float).eps * np.abs(t_Cnn).sum(axis=(1, 2))
        largest_C = value_Cn[:, -top:].sum(axis=1) + top * rounding_C
        level = self.layout.width * self._slots
        return t_Cnn.sum(axis=(1, 2)) / self._devices + level * largest_C

    def _of_rows_L(self, rest_N: np.ndarray) -> np.ndarray:
        """Most that 0/1 rows within layers can have: an expert itself and s - 1 others."""
        g_LEE = self.layout.within(self.layout.symmetric(rest_N))
        own_L, others = np.trace(g_LEE, axis1=1, axis2=2), self._slots - 1
        if not others:
            return own_L
        can_LEE = self._can_LEE & ~np.eye(self.layout.experts, dtype=bool)
        best_LEK = np.sort(np.where(can_LEE, g_LEE, -np.inf), axis=2)[:, :, -others:]
        # where conflicts leave fewer than s - 1 others no placement exists: anything is a bound
        return own_L + np.where(np.isfinite(best_LEK), best_LEK, 0.0).sum(axis=(1, 2))


def _capped_simplex(value_Cn: np.ndarray, level: float, total: float) -> np.ndarray:
    """The nearest rows with entries in [0, level] that sum to `total`."""
    low_C, high_C = value_Cn.min(axis=1) - level, value_Cn.max(axis=1)
    shift_C = (low_C + high_C) / 2
    for _ in range(30):  # Newton, bracketed: piecewise linear, so a few steps are exact
        kept_Cn = np.clip(value_Cn - shift_C[:, None], 0, level)
        over_C = kept_Cn.sum(axis=1) - total
        if (np.abs(over_C) <= 1e-12 * total).all():
            break
        low_C = np.where(over_C > 0, shift_C, low_C)
        high_C = np.where(over_C > 0, high_C, shift_C)
        free_C = ((kept_Cn > 0) & (kept_Cn < level)).sum(axis=1)
        shift_C = shift_C + over_C / np.maximum(free_C, 1)
        inside_C = (shift_C > low_C) & (shift_C < high_C)
        shift_C = np.where(inside_C, shift_C, (low_C + high_C) / 2)
    return np.clip(value_Cn - shift_C[:, None], 0, level)


@functools.lru_cache(maxsize=8)
def complement(experts: int, width: int) -> np.ndarray:
    """Orthonormal columns that span what is orthogonal to every layer's indicator."""
    ones = np.ones((experts, 1)) / math.sqrt(experts)
    full, _ = np.linalg.qr(np.concatenate([ones, np.eye(experts)[:, : experts - 1]], axis=1))
    return np.kron(np.eye(width), full[:, 1:])
