"""Which device gets which sequence, all devices equally full: exact, or with a proven gap.

Axes: S sequences, M devices, C places per device. `cost_SM` is what sequence s costs on device m
(rows, tally.py); less is better.

- `equal`: the same number of sequences everywhere (they differ by at most one where M does not
  divide S). An assignment problem, solved exactly (Jonker-Volgenant in SciPy).
- `within_tokens`: no device holds more than (1 + slack) of the mean of the tokens: a generalised
  assignment problem. The linear relaxation (HiGHS; beyond PROGRAM unknowns a Lagrangian by
  subgradients) proves a bound; its whole part is kept, the few fractional sequences are put where
  there is room, and moves and swaps end it. `Seated.gap` is proven.
- `in_batches`: sequences that arrive together are assigned together: `equal`, batch by batch.
- `online`: one after the other, no device ever more than `slack` sequences ahead of another. How
  scarce a device is says its price (`prices_M`), learned where all sequences are known.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, sparse

from moe_jax.errors import Refused

PROGRAM = 50_000  # unknowns up to which the relaxation is a linear program
ASSIGNED = 4_096  # sequences up to which `equal` is exact
STEPS = 300  # of the subgradient
SAFETY = 1 - 1e-9  # of a bound, against rounding


@dataclasses.dataclass(frozen=True, eq=False)
class Seated:
    """A device for every sequence.

    Attributes:
      home_S: the devices.
      value: what they cost together.
      bound: proven; no assignment that keeps the capacity costs less.
    """

    home_S: Int[np.ndarray, " S"]
    value: float
    bound: float

    @property
    def gap(self) -> float:
        return (self.value - self.bound) / self.value if self.value > 0 else 0.0


def equal(cost_SM: Float[np.ndarray, "S M"]) -> Seated:
    """Equal numbers of sequences; exact up to ASSIGNED of them."""
    sequences, devices = cost_SM.shape
    if sequences > ASSIGNED:
        capped = _capped(cost_SM, np.ones(sequences), -(-sequences // devices))
        home_S = _with_least(cost_SM, capped.home_S, sequences // devices)
        return Seated(home_S, _value(cost_SM, home_S), capped.bound)
    places = -(-sequences // devices)
    empty = places * devices - sequences
    # empty places are sequences without cost, at most one on a device: its last place
    far = 1.0 + 2.0 * np.abs(cost_SM).sum()
    cost_SC = np.repeat(cost_SM, places, axis=1)
    last_C = np.arange(places * devices) % places == places - 1
    empty_SC = np.tile(np.where(last_C, 0.0, far), (empty, 1))
    row, column = optimize.linear_sum_assignment(np.concatenate([cost_SC, empty_SC]))
    home_S = (column[np.argsort(row)] // places)[:sequences]
    value = _value(cost_SM, home_S)
    return Seated(home_S, value, value)


def within_tokens(
    cost_SM: Float[np.ndarray, "S M"], len_S: Int[np.ndarray, " S"], slack: float
) -> Seated:
    """No device above (1 + slack) times the mean of the tokens."""
    devices = cost_SM.shape[1]
    least = least_slack(len_S, devices)
    if not slack >= least:
        raise Refused(
            "slack",
            slack,
            f"sequences of {int(len_S.max())} tokens and less do not fit that evenly",
            f"Use {least:.4f} or more",
        )
    return _capped(cost_SM, len_S.astype(float), (1 + slack) * len_S.sum() / devices)


def least_slack(len_S: Int[np.ndarray, " S"], devices: int) -> float:
    """A slack that packing, longest first, can keep; four digits, rounded up."""
    held_M = np.bincount(_packed(len_S, devices), weights=len_S, minlength=devices)
    return max(float(np.ceil((held_M.max() / held_M.mean() - 1) * 1e4) / 1e4), 0.0)


def in_batches(cost_SM: Float[np.ndarray, "S M"], batch: int) -> Int[np.ndarray, " S"]:
    """Homes of sequences that arrive `batch` at a time, in this order."""
    check_batch(batch)
    starts = range(0, len(cost_SM), batch)
    return np.concatenate([equal(cost_SM[at : at + batch]).home_S for at in starts])


def online(
    cost_SM: Float[np.ndarray, "S M"], price_M: Float[np.ndarray, " M"], slack: int
) -> Int[np.ndarray, " S"]:
    """Homes of sequences that arrive one by one: the cheapest device that is not too far ahead.

    A device that is `slack` / 2 ahead costs its price more; so scarce ones fill up in time, and a
    surplus of sequences that all want the same is not sent away before there is one.
    """
    check_imbalance(slack)
    held_M = np.zeros(len(price_M), np.int64)
    home_S = np.empty(len(cost_SM), np.int64)
    for s, cost_M in enumerate(cost_SM):
        ahead_M = held_M - held_M.min()
        priced_M = cost_M + price_M * (2 * ahead_M / slack)
        home_S[s] = int(np.where(ahead_M < slack, priced_M, np.inf).argmin())
        held_M[home_S[s]] += 1
    return home_S


def check_batch(batch: int) -> None:
    if batch < 1:
        raise Refused("batch", batch, "sequences that arrive together, at least 1", "Use 64")


def check_imbalance(slack: int) -> None:
    if slack < 1:
        raise Refused("imbalance", slack, "sequences a device may be ahead, at least 1", "Use 4")


def prices_M(cost_SM: Float[np.ndarray, "S M"]) -> Float[np.ndarray, " M"]:
    """What a place on each device is worth if all are equally full; the cheapest is worth 0."""
    sequences, devices = cost_SM.shape
    price_M, _ = _dual(cost_SM, np.ones(sequences), sequences / devices)
    return price_M - price_M.min()


def _capped(cost_SM: np.ndarray, len_S: np.ndarray, cap: float) -> Seated:
    price_M, bound = _dual(cost_SM, len_S, cap)
    priced_SM = cost_SM + price_M * len_S[:, None]
    home_S = _repaired(priced_SM, len_S, cap)
    home_S = _improved(cost_SM, len_S, cap, home_S)
    value = _value(cost_SM, home_S)
    return Seated(home_S, value, min(bound, value))


def _dual(cost_SM: np.ndarray, len_S: np.ndarray, cap: float) -> tuple[np.ndarray, float]:
    """Prices per token of each device, at least 0, and the bound that they prove.

    For any price >= 0: sum_s min_m (cost + price_m len_s) - cap sum_m price_m is at most the cost
    of every assignment that keeps the cap. The bound is evaluated so, whoever found the prices.
    """
    starts = [_subgradient(cost_SM, len_S, cap)]
    if cost_SM.size <= PROGRAM:
        starts.append(_program(cost_SM, len_S, cap))
    value, price_M = max(
        ((_dual_value(cost_SM, len_S, cap, price_M), price_M) for price_M in starts),
        key=lambda pair: pair[0],
    )
    return price_M, value - (1 - SAFETY) * abs(value)


def _dual_value(cost_SM, len_S, cap: float, price_M) -> float:
    cheapest_S = (cost_SM + price_M * len_S[:, None]).min(axis=1)
    return float(cheapest_S.sum() - cap * price_M.sum())


def _program(cost_SM: np.ndarray, len_S: np.ndarray, cap: float) -> np.ndarray:
    sequences, devices = cost_SM.shape
    once = sparse.kron(sparse.eye(sequences), np.ones((1, devices)), format="csr")
    held = sparse.kron(len_S[None, :], sparse.eye(devices), format="csr")
    found = optimize.linprog(
        cost_SM.ravel(),
        A_ub=held,
        b_ub=np.full(devices, cap),
        A_eq=once,
        b_eq=np.ones(sequences),
        method="highs",
    )
    if found.status != 0:  # the subgradient's prices are valid in any case
        return np.zeros(devices)
    return np.maximum(-found.ineqlin.marginals, 0.0)


def _subgradient(cost_SM: np.ndarray, len_S: np.ndarray, cap: float) -> np.ndarray:
    """Polyak-like steps on the dual; the best prices seen."""
    devices = cost_SM.shape[1]
    scale = float((cost_SM.max(axis=1) - cost_SM.min(axis=1)).mean() / max(len_S.mean(), 1e-300))
    price_M = best_M = np.zeros(devices)
    best = -np.inf
    for step in range(STEPS):
        priced_SM = cost_SM + price_M * len_S[:, None]
        home_S = priced_SM.argmin(axis=1)
        value = float(priced_SM[np.arange(len(home_S)), home_S].sum() - cap * price_M.sum())
        if value > best:
            best, best_M = value, price_M
        over_M = np.bincount(home_S, weights=len_S, minlength=devices) / cap - 1
        price_M = np.maximum(price_M + scale * over_M / (1 + step / 10), 0.0)
    return best_M


def _repaired(priced_SM: np.ndarray, len_S: np.ndarray, cap: float) -> np.ndarray:
    """Everyone where it is cheapest at these prices; who finds no room goes to the next device."""
    devices = priced_SM.shape[1]
    sorted_SM = np.sort(priced_SM, axis=1)
    sure_S = sorted_SM[:, 1] - sorted_SM[:, 0] if devices > 1 else np.zeros(len(len_S))
    free_M = np.full(devices, cap * (1 + 1e-12))
    home_S = np.empty(len(len_S), np.int64)
    for s in np.argsort(-sure_S, kind="stable"):
        fits_M = free_M >= len_S[s]
        if not fits_M.any():
            return _packed(len_S, devices)  # fits, as the caller has made sure
        home_S[s] = int(np.where(fits_M, priced_SM[s], np.inf).argmin())
        free_M[home_S[s]] -= len_S[s]
    return home_S


def _packed(len_S: np.ndarray, devices: int) -> np.ndarray:
    """Longest first, each to the emptiest device."""
    held_M, home_S = np.zeros(devices), np.empty(len(len_S), np.int64)
    for s in np.argsort(-len_S, kind="stable"):
        home_S[s] = int(held_M.argmin())
        held_M[home_S[s]] += len_S[s]
    return home_S


def _improved(cost_SM, len_S, cap: float, home_S: np.ndarray) -> np.ndarray:
    """Moves and swaps, sequence after sequence, until none gains."""
    home_S, all_S = home_S.copy(), np.arange(len(home_S))
    held_M = np.bincount(home_S, weights=len_S, minlength=cost_SM.shape[1])
    room, least = cap * (1 + 1e-12), 1e-9 * (1.0 + np.abs(cost_SM).max())
    gained = True
    while gained:
        gained = False
        for s in range(len(home_S)):
            at = int(home_S[s])
            change_M = np.where(held_M + len_S[s] <= room, cost_SM[s] - cost_SM[s, at], np.inf)
            change_S = cost_SM[s, home_S] - cost_SM[s, at]
            change_S += cost_SM[all_S, at] - cost_SM[all_S, home_S]
            grows_S = len_S - len_S[s]
            fits_S = (held_M[at] + grows_S <= room) & (held_M[home_S] - grows_S <= room)
            change_S = np.where(fits_S, change_S, np.inf)
            m, other = int(change_M.argmin()), int(change_S.argmin())
            if min(change_M[m], change_S[other]) >= -least:
                continue
            gained = True
            if change_M[m] <= change_S[other]:
                moves = [(s, m)]
            else:
                moves = [(s, int(home_S[other])), (other, at)]
            for who, to in moves:
                held_M[home_S[who]] -= len_S[who]
                held_M[to] += len_S[who]
                home_S[who] = to
    return home_S


def _with_least(cost_SM: np.ndarray, home_S: np.ndarray, least: int) -> np.ndarray:
    """Who costs least to move goes from devices with more to those with fewer."""
    home_S, all_S = home_S.copy(), np.arange(len(home_S))
    held_M = np.bincount(home_S, minlength=cost_SM.shape[1])
    while held_M.min() < least:
        m = int(held_M.argmin())
        change_S = cost_SM[:, m] - cost_SM[all_S, home_S]
        s = int(np.where(held_M[home_S] > least, change_S, np.inf).argmin())
        held_M[[home_S[s], m]] += [-1, 1]
        home_S[s] = m
    return home_S


def _value(cost_SM: np.ndarray, home_S: np.ndarray) -> float:
    return float(cost_SM[np.arange(len(home_S)), home_S].sum())
