"""One layer with replicas as an integer program: slots, and shares of the copy rule `stay`.

Axes: E experts, M devices (of a copy; H: where a token is when the layer begins), N nodes.

With everything outside the layer fixed, the transitions that stay are linear in
- x[e, m]: expert e has a copy on device m (binary; at least one each, S slots on every device);
- b[e, n, m]: tokens of node n whose best expert is e, not at home on a copy, that copy m serves;
- o[e, m]: assignments of e other than best that copy m serves.

    maximise   sum stay[e, m] x + sum move[e, n, m] b - PENALTY * excess
    such that  sum_m b[e, n, m] + sum_{m in n} here[e, m] x[e, m] = sum_{m in n} here[e, m]
               sum_m o[e, m] = others[e];  b, o <= their sums * x
               sum_e (here x + sum_n b + o)[e, m] <= cap[m] + excess   for every m

A sub-problem frees a few experts; those that are fixed on one device are constants of the loads.
The program then has a few hundred binaries. The excess makes every program solvable.
"""

import dataclasses

import numpy as np
from scipy import optimize, sparse

from moe_jax.placement.nodes import Nodes

PENALTY = 20.0  # per token above the cap, in transitions
GAP = 3e-3  # relative, at which a program ends


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """What the rest of the model means for one layer.

    Attributes:
      here_EH: tokens by best expert and device.
      stay_EM: transitions kept, before and after the layer, by tokens that stay, if m has a copy.
      move_ENM: the same per token of node n that copy m serves.
      others_E: assignments that are not a token's best.
      slots: of a device.
      cap_M: largest load of each device.
    """

    here_EH: np.ndarray
    stay_EM: np.ndarray
    move_ENM: np.ndarray
    others_E: np.ndarray
    slots: int
    cap_M: np.ndarray

    @property
    def mean(self) -> float:
        """Load of a device, the program's unit; 1 where no token has an expert."""
        return float(self.here_EH.sum() + self.others_E.sum()) / self.here_EH.shape[1] or 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """Slots and flows of one layer.

    Attributes:
      holds_EM: bool.
      best_ENM, other_EM: tokens or assignments that each copy serves, whatever the home.
      value: what is maximised, fixed experts included.
      excess: load above the cap, in tokens.
      ended: the program came to its end; a faster machine finds nothing else.
    """

    holds_EM: np.ndarray
    best_ENM: np.ndarray
    other_EM: np.ndarray
    value: float
    excess: float
    ended: bool = True


def solve(
    given: Given, nodes: Nodes, holds_EM: np.ndarray, free_EM: np.ndarray, time_limit: float
) -> Answer | None:
    """The best slots that differ from `holds_EM` in `free_EM` only; None if none was found in time.

    Nothing free gives the best flows for these slots (a linear program).
    """
    size_NM = nodes.node_M[None, :] == np.arange(nodes.count)[:, None]
    active = np.flatnonzero(free_EM.any(axis=1) | (holds_EM.sum(axis=1) > 1))
    single_E = np.setdiff1d(np.arange(len(holds_EM)), active)
    fixed = _fixed(given, holds_EM, single_E, size_NM)
    if not len(active):
        excess = max(float((fixed.load_M - given.cap_M).max()), 0.0)
        value = fixed.value - PENALTY * excess
        return Answer(holds_EM, fixed.best_ENM, fixed.other_EM, value, excess)
    part = _Part(given, active, holds_EM, free_EM, size_NM, fixed.load_M)
    result = part.solved(time_limit)
    if result.x is None:
        return None
    x_am, b_anm, o_am = part.split(result.x)
    new_EM, best_ENM, other_EM = holds_EM.copy(), fixed.best_ENM, fixed.other_EM
    new_EM[active] = x_am > 0.5
    best_ENM[active], other_EM[active] = b_anm, o_am
    value = fixed.value - result.fun * given.mean
    excess = float(result.x[-1]) * given.mean
    return Answer(new_EM, best_ENM, other_EM, value, excess, result.status == 0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Fixed:
    load_M: np.ndarray
    best_ENM: np.ndarray
    other_EM: np.ndarray
    value: float


def _fixed(given: Given, holds_EM, single_E, size_NM) -> _Fixed:
    """Experts on one device for certain: all their tokens go there."""
    experts, devices = holds_EM.shape
    best_ENM = np.zeros((experts, len(size_NM), devices))
    other_EM, on_E = np.zeros((experts, devices)), holds_EM.argmax(axis=1)
    device = on_E[single_E]
    moving_eN = (given.here_EH[single_E] * ~holds_EM[single_E]) @ size_NM.T
    best_ENM[single_E, :, device] = moving_eN
    other_EM[single_E, device] = given.others_E[single_E]
    here_e = given.here_EH[single_E, device]
    load_e = here_e + moving_eN.sum(axis=1) + given.others_E[single_E]
    value = given.stay_EM[single_E, device].sum()
    value += (given.move_ENM[single_E, :, device] * moving_eN).sum()
    return _Fixed(
        np.bincount(device, weights=load_e, minlength=devices), best_ENM, other_EM, float(value)
    )


class _Part:
    """The program over the active experts, everything in units of the mean load."""

    def __init__(self, given: Given, active, holds_EM, free_EM, size_NM, load_M):
        self._given, self._size_NM = given, size_NM
        self._here = given.here_EH[active] / given.mean
        self._others = given.others_E[active] / given.mean
        self._active, self._load = active, load_M / given.mean
        self._low = np.where(free_EM[active], 0.0, holds_EM[active])
        self._high = np.where(free_EM[active], 1.0, holds_EM[active])
        self._room = given.slots - np.delete(holds_EM, active, axis=0).sum(axis=0)
        self._shape = (len(active), len(size_NM), holds_EM.shape[1])

    def split(self, x: np.ndarray):
        count, nodes, devices = self._shape
        ends = np.cumsum([count * devices, count * nodes * devices, count * devices])
        x_am, b_anm, o_am, _ = np.split(x, ends)
        mean = self._given.mean
        return (
            x_am.reshape(count, devices),
            np.maximum(b_anm.reshape(self._shape), 0) * mean,
            np.maximum(o_am.reshape(count, devices), 0) * mean,
        )

    def solved(self, time_limit: float):
        count, nodes, devices = self._shape
        given, unit = self._given, sparse.identity(count * devices, format="csr")
        stay = given.stay_EM[self._active] / given.mean
        gain = [stay.ravel(), given.move_ENM[self._active].ravel(), np.zeros(count * devices)]
        cost = np.concatenate([-np.concatenate(gain), [PENALTY]])
        each = sparse.kron(sparse.identity(count), np.ones((1, devices)), format="csr")
        each_node = sparse.kron(sparse.identity(count * nodes), np.ones((1, devices)), format="csr")
        on = sparse.kron(np.ones((1, count)), sparse.identity(devices), format="csr")
        on_node = sparse.kron(np.ones((1, count * nodes)), sparse.identity(devices), format="csr")
        node_here = self._here[:, None, :] * self._size_NM  # [a, n, m]
        from_node = sparse.block_diag([sparse.csr_matrix(rows) for rows in node_here], "csr")
        moving = node_here.sum(axis=2)
        here = sparse.diags(self._here.ravel())
        b_most = self._most(moving)
        o_most = sparse.diags(np.repeat(self._others, devices))
        limit_M = given.cap_M / given.mean
        rows = [
            ([each, None, None, None], 1, devices),
            ([on, None, None, None], self._room, self._room),
            ([from_node, each_node, None, None], moving.ravel(), moving.ravel()),
            ([None, None, each, None], self._others, self._others),
            ([-b_most, sparse.identity(count * nodes * devices), None, None], -np.inf, 0),
            ([-o_most, None, unit, None], -np.inf, 0),
            ([on @ here, on_node, on, -np.ones((devices, 1))], -np.inf, limit_M - self._load),
        ]
        widths = [count * devices, count * nodes * devices, count * devices, 1]
        size = sum(widths)
        limits = [optimize.LinearConstraint(_row(blocks, widths), a, b) for blocks, a, b in rows]
        bounds = optimize.Bounds(
            np.concatenate([self._low.ravel(), np.zeros(size - count * devices)]),
            np.concatenate([self._high.ravel(), np.full(size - count * devices, np.inf)]),
        )
        whole = np.zeros(size)
        whole[: count * devices] = 1
        options = {"time_limit": max(time_limit, 0.01), "mip_rel_gap": GAP}
        return optimize.milp(
            cost, constraints=limits, integrality=whole, bounds=bounds, options=options
        )

    def _most(self, moving_an: np.ndarray):
        """[a n m, a m]: the movers of a node, where their copy is."""
        count, nodes, devices = self._shape
        row = np.arange(count * nodes * devices).reshape(self._shape)
        column = np.broadcast_to(np.arange(count * devices).reshape(count, 1, devices), self._shape)
        data = np.broadcast_to(moving_an[:, :, None], self._shape)
        shape = (count * nodes * devices, count * devices)
        return sparse.csr_matrix((data.ravel(), (row.ravel(), column.ravel())), shape)


def _row(blocks, widths: list[int]):
    """One block row; None is a block of zeros."""
    height = next(block.shape[0] for block in blocks if block is not None)
    full = [
        sparse.csr_matrix((height, width)) if block is None else sparse.csr_matrix(block)
        for block, width in zip(blocks, widths, strict=True)
    ]
    return sparse.hstack(full, format="csr")
