"""One layer's hops with copies, over all sets of devices that may hold an expert: small machines.

Axes: E experts, M devices, S = 2^M - 1 sets, s slots of a device.

x_ES = 1 where an expert's copies are on that set; what a set costs and loads is counted under the
copy rule (hops_counts.py), so nothing is left out: sum_S x_eS = 1, sum_eS [m in S] x_eS = s, and
loads under their caps. `program` asks HiGHS for whole numbers. `proves` is the Lagrangian of the
slots: for all prices p of a device's slot, of either sign, a layer has at least
    sum_e min_S (hops_eS + sum of p over S)  -  s sum_m p_m,
the best prices being duals of the linear relaxation; any others prove too. Caps do not enter it.
"""

import numpy as np
from scipy import optimize, sparse

from moe_jax.placement import clock, hops_counts

MOST = 2**17  # sets of all experts together
GAP = 1e-4  # relative, at which the program may end


def small(experts: int, devices: int) -> bool:
    """There are few enough sets to look at all of them."""
    return experts * 2**devices <= MOST


class Sets:
    """What every set costs every expert.

    Attributes:
      holds_SM: bool, the sets.
      hops_ES: of the expert's assignments.
      load_ESM: that its copies compute.
    """

    def __init__(self, counts: hops_counts.Layer, devices: int, slots: int):
        self._slots = slots
        self.holds_SM = (np.arange(1, 2**devices)[:, None] >> np.arange(devices)) % 2 > 0
        priced = [
            counts.priced(np.full(len(self.holds_SM), e), self.holds_SM)
            for e in range(counts.experts)
        ]
        self.hops_ES = np.stack([hops for hops, _ in priced])
        self.load_ESM = np.stack([load for _, load in priced])

    def proves(self, price_M: np.ndarray) -> float:
        """Fewest hops of the layer, by these prices."""
        paid_ES = self.hops_ES + self.holds_SM @ price_M
        return float(paid_ES.min(axis=1).sum() - self._slots * price_M.sum())

    def prices(self, seconds: float) -> np.ndarray:
        """The duals of the slots; 0 where the relaxation does not end in time."""
        matrix, side = self._equal()
        found = optimize.linprog(
            self.hops_ES.ravel(),
            A_eq=matrix,
            b_eq=side,
            bounds=(0, None),
            method="highs",
            options={"time_limit": max(seconds, 1e-3)},
        )
        devices = self.holds_SM.shape[1]
        return -found.eqlin.marginals[-devices:] if found.status == 0 else np.zeros(devices)

    def program(self, cap_M: np.ndarray, seconds: float) -> np.ndarray | None:
        """bool [E, M]: who holds what; None where nothing was found in time."""
        matrix, side = self._equal()
        limits = [optimize.LinearConstraint(matrix, side, side)]
        if np.isfinite(cap_M).all():
            load = sparse.csr_matrix(self.load_ESM.reshape(-1, len(cap_M)).T)
            limits.append(optimize.LinearConstraint(load, -np.inf, cap_M))
        found = optimize.milp(
            self.hops_ES.ravel(),
            constraints=limits,
            bounds=optimize.Bounds(0, 1),
            integrality=np.ones(self.hops_ES.size),
            options={"time_limit": max(seconds, 1e-3), "mip_rel_gap": GAP},
        )
        if clock.checked(found).x is None:
            return None
        holds_EM = self.holds_SM[found.x.reshape(self.hops_ES.shape).argmax(axis=1)]
        return holds_EM if (holds_EM.sum(axis=0) == self._slots).all() else None

    def _equal(self) -> tuple[sparse.csr_matrix, np.ndarray]:
        """One set for every expert, so many experts on every device."""
        experts, sets = self.hops_ES.shape
        devices = self.holds_SM.shape[1]
        one = sparse.kron(sparse.eye(experts), np.ones((1, sets)))
        full = sparse.kron(sparse.csr_matrix(np.ones((1, experts))), self.holds_SM.T.astype(float))
        side = np.concatenate([np.ones(experts), np.full(devices, float(self._slots))])
        return sparse.vstack([one, full]).tocsr(), side
