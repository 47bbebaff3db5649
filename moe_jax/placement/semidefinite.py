"""The most affinity that any placement can keep: one semidefinite relaxation of all layers.

Axes: L layers, E experts, M devices, s slots, W layers of a clique, C cliques of n nodes, N entries
of the flat vector (layout.py).

A placement is a 0/1 matrix X over all (layer, expert), X = 1 where two share a device. Its entries
are wanted (`weight_N`) within layers, as co-activation is, and from a layer to the next, as
transitions are. Only these enter, so by the completion theorem of chordal graphs (Grone et al.
1984) X may be any matrix whose *cliques*, pairs of adjacent layers, are each positive semidefinite
and agree where they overlap. Every clique of a placement is 1/M + B R B', B spanning the complement
of its layers' indicators, 0 <= R <= W s, trace R = W s (M - 1) (the set S; Donath and Hoffman 1973,
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

import functools
import math
import time
from typing import Protocol, runtime_checkable

import numpy as np

from moe_jax.placement.cuts import Cuts, Loads, Triangles
from moe_jax.placement.layout import Groups

RHO = 0.05  # penalty of disagreement, over the largest weight
OVER = 1.6  # relaxation
FIRST_CUTS, CUTS_EVERY = 60, 40  # steps
CUTS = 200  # triangles added per clique
CHECK_EVERY = 20
STALE = 1e-5  # relative improvement over STALE_STEPS below which the search ends
STALE_STEPS = 200
FEW = 20  # steps below which the bound by rows is the better one


def most_kept(
    groups: Groups, weight_N: np.ndarray, deadline: float, steps: int = 3000
) -> np.ndarray:
    """float64: upper limits of weight_N @ x_N over all placements within the caps.

    One entry per layer where layers are independent, else one for all of them together.

    Args:
      groups: sizes, devices and caps.
      weight_N: at least 0; an affinity within a layer has half its weight on (e, f), half on
        (f, e).
      deadline: time.monotonic() after which refining stops. Where less than FEW steps fit it does
        not begin, as they would gain nothing.
      steps: most steps.
    """
    most_A = by_rows(groups, weight_N)
    if groups.devices == 1 or not weight_N.any():
        return most_A
    if time.monotonic() + few_seconds(groups) > deadline:
        return most_A
    kept_A = -least(Relaxation(groups, weight_N), deadline, steps)
    return np.minimum(kept_A + 1e-12 * np.abs(most_A), most_A)


def few_seconds(groups: Groups) -> float:
    """About how long FEW steps take: their eigenvalues, measured once for one clique."""
    layout = groups.layout
    size = layout.width * (layout.experts - 1)
    random_nn = np.random.default_rng(0).random((size, size))
    started = time.monotonic()
    np.linalg.eigh(random_nn + random_nn.T)
    return FEW * (layout.pairs or layout.layers) * (time.monotonic() - started)


def by_rows(groups: Groups, weight_N: np.ndarray) -> np.ndarray:
    """The bound of the head of this file with T = 0 and y = 0: every expert's best companions."""
    g_LEE, others = groups.layout.within(groups.layout.symmetric(weight_N)), groups.slots - 1
    own_L = np.trace(g_LEE, axis1=1, axis2=2)
    if others:
        off_LEE = np.where(np.eye(groups.layout.experts, dtype=bool), -np.inf, g_LEE)
        own_L = own_L + np.sort(off_LEE, axis=2)[:, :, -others:].sum(axis=(1, 2))
    if groups.layout.width == 1:
        return own_L
    return np.array([own_L.sum() + _across(groups, weight_N)])


def _across(groups: Groups, rest_N: np.ndarray) -> float:
    """Most that 0/1 rows, or columns, from a layer to the next can have: s entries each."""
    o_LEE, slots = groups.layout.across(rest_N), groups.slots
    row_L = np.sort(o_LEE, axis=2)[:, :, -slots:].sum(axis=(1, 2))
    column_L = np.sort(o_LEE, axis=1)[:, -slots:].sum(axis=(1, 2))
    return float(np.minimum(row_L, column_L).sum())


@runtime_checkable  # for type checks while tests run
class Running(Protocol):
    """A relaxation on its way: `Relaxation`, or that of copies_relax.py.

    Attributes:
      weight_N: what is wanted together; may be changed between steps.
    """

    weight_N: np.ndarray

    def step(self) -> None: ...

    def separate(self) -> None:
        """Adds violated inequalities."""

    def clique_Cnn(self) -> np.ndarray: ...

    def bound_A(self) -> np.ndarray:
        """Most of weight_N @ x_N."""


@runtime_checkable  # for type checks while tests run
class Adapt(Protocol):
    """Changes the weights of a running relaxation; see contact_bound.py.

    Attributes:
      every: steps between two changes.
    """

    every: int

    def __call__(self, run: Running) -> np.ndarray:
        """Gives `run` new weights; returns the level_A that belongs to them."""


def least(run: Running, deadline: float, steps: int, adapt: Adapt | None = None) -> np.ndarray:
    """The best lower bound met of level_A - weight_N @ x_N; level_A is 0 without adapt.

    Args:
      run: fresh; one step of it is always made.
      deadline, steps: as for most_kept.
      adapt: changes the weights on the way.
    """
    level_A = np.zeros(1) if adapt is None else adapt(run)
    best_A, marked = level_A - run.bound_A(), -math.inf
    for step in range(1, steps + 1):
        run.step()
        late = time.monotonic() >= deadline
        if late or step == steps or step % CHECK_EVERY == 0 or step & (step - 1) == 0:
            best_A = np.fmax(best_A, level_A - run.bound_A())  # fmax: a nan proves nothing
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

    def __init__(self, groups: Groups, weight_N: np.ndarray):
        self._groups, self.weight_N = groups, weight_N
        self.layout = layout = groups.layout
        self._rho = RHO * float(np.abs(weight_N).max())
        self._basis = _complement(layout.experts, layout.width)
        self._triangles, loads = Triangles(layout, np.random.default_rng(0)), Loads(groups)
        self._cuts: list[Cuts] = [self._triangles, loads] if loads.binds else [self._triangles]
        same_EE = np.eye(layout.experts, dtype=bool)
        self._can_LEE = ~same_EE & ~(loads.apart_LEE & loads.binds)
        across_LEE = np.ones((layout.pairs, layout.experts, layout.experts))
        lower_LEE = np.broadcast_to(same_EE, self._can_LEE.shape).astype(float)
        self._lower_N = layout.flat(lower_LEE, 0 * across_LEE)
        self._upper_N = layout.flat(lower_LEE + self._can_LEE, across_LEE)
        self._x_N = np.clip(groups.chance_N, self._lower_N, self._upper_N)
        self._scaled_Cnn = np.zeros_like(self.clique_Cnn())
        self._weights()

    def _weights(self) -> None:
        """How stiff every entry is, and how far its force reaches."""
        self._stiff_N = self._rho * self.layout.count_N
        self._spread_N = np.sum([cut.degree_N for cut in self._cuts], axis=0) / self._stiff_N
        self.layout.within(self._spread_N)[:] /= 2  # (e, f) and (f, e) share it

    def separate(self) -> None:
        self._triangles.separate(self._x_N, CUTS * len(self._scaled_Cnn))
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
        level, devices = self._level, self._groups.devices
        value_Cn = capped_simplex(value_Cn, level, level * (devices - 1))
        vector = self._basis @ vector
        return 1 / devices + (vector * value_Cn[:, None, :]) @ vector.transpose(0, 2, 1)

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
        within = spectral_C.sum() + rows_L.sum() + constant_L.sum()
        return np.array([within + _across(self._groups, rest_N)])

    @property
    def _level(self) -> int:
        """W s: nodes of a clique on a device."""
        return self.layout.width * self._groups.slots

    def _spectral_C(self, t_Cnn: np.ndarray) -> np.ndarray:
        """The largest <T, X> over S."""
        inside = self._basis.T @ t_Cnn @ self._basis
        value_Cn = np.linalg.eigvalsh((inside + inside.transpose(0, 2, 1)) / 2)
        top, size = self._groups.devices - 1, t_Cnn.shape[1]
        rounding_C = 10 * size * np.finfo(float).eps * np.abs(t_Cnn).sum(axis=(1, 2))
        largest_C = value_Cn[:, -top:].sum(axis=1) + top * rounding_C
        return t_Cnn.sum(axis=(1, 2)) / self._groups.devices + self._level * largest_C

    def _of_rows_L(self, rest_N: np.ndarray) -> np.ndarray:
        """Most that 0/1 rows within layers can have: an expert itself and s - 1 others."""
        g_LEE = self.layout.within(self.layout.symmetric(rest_N))
        own_L, others = np.trace(g_LEE, axis1=1, axis2=2), self._groups.slots - 1
        if not others:
            return own_L
        best_LEK = np.sort(np.where(self._can_LEE, g_LEE, -np.inf), axis=2)[:, :, -others:]
        # where conflicts leave fewer than s - 1 others no placement exists: anything is a bound
        return own_L + np.where(np.isfinite(best_LEK), best_LEK, 0.0).sum(axis=(1, 2))


def capped_simplex(value_Cn: np.ndarray, level: float, total: float) -> np.ndarray:
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
def _complement(experts: int, width: int) -> np.ndarray:
    """Orthonormal columns that span what is orthogonal to every layer's indicator."""
    ones = np.ones((experts, 1)) / math.sqrt(experts)
    full, _ = np.linalg.qr(np.concatenate([ones, np.eye(experts)[:, : experts - 1]], axis=1))
    return np.kron(np.eye(width), full[:, 1:])
