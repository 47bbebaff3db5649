"""Balance by replicas: which experts get a second copy, and where, so that no device is hot.

Axes: L MoE layers, E experts, P slots, M devices, N nodes, s slots per device, B rows of a batch
(layers, or layers x nodes). A copy of an expert with load w and c copies is taken to compute w / c:
what the copy rule gives where homes are uniform and the copies of an expert share a node.

1. Groups of experts go to nodes, equally many each (one node: nothing to do).
2. Inside a node the expert with the largest load per copy gets the next copy, at most one per
   device: this minimises the largest load per copy.
3. Heaviest copy first, each to the lightest device that has room and holds no copy of its expert;
   where only devices are left that do, a swap makes room.
4. If asked for: swaps between the fullest device and others, while they help.
5. Without the rule of one copy per device, steps 1 to 3 are EPLB (baselines/eplb.py). On rows where
   it made a difference a search by swaps, and by other copies, goes on until the fullest device has
   no more than EPLB's.

All rows at once, but for step 5: README.md has the time of 58 layers x 256 experts -> 288 slots.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from moe_jax.errors import Refused
from moe_jax.placement import copies
from moe_jax.placement.baselines import eplb
from moe_jax.placement.plan import Placement

TRIALS = 10  # rounds of step 5, at most
STARTS, KEPT = 200, 3  # packings of such a round, and how many of them are worked on
FEW = 20  # packings of the first round: mostly enough
MOVES = 3  # copies that are given to other experts
WIDTH = 24  # experts that they may be given to
POWERS = (8, 32, 128)  # of two, of the loads; the larger, the more the fullest device counts


def balanced_slots(
    load_LE: Num[np.ndarray, "L E"],
    num_slots: int,
    num_devices: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    rounds: int = 0,
) -> Placement:
    """A plan with `num_slots` slots per layer whose largest device load is small.

    Args:
      load_LE: rows per expert; finite, not negative.
      num_slots: P, a multiple of num_devices, at least E.
      num_devices: M, all nodes together.
      num_nodes: copies of an expert stay on one of these nodes.
      num_groups: experts of a group (neighbouring ids) stay on one node; a multiple of num_nodes
        that divides E, otherwise there is one node and one group, as in EPLB.
      rounds: of step 4; 0 is fastest.
    """
    layers, experts = load_LE.shape
    copies.check_slots(num_slots, experts, num_devices)
    load_LE = load_LE.astype(np.float64)
    if not (np.isfinite(load_LE) & (load_LE >= 0)).all():
        raise Refused("load_LE", "negative or not finite", "loads count rows", "Correct them")
    if num_groups % num_nodes or experts % num_groups or num_devices % num_nodes:
        num_nodes = 1
    if num_nodes == 1:
        return Placement(_filled(load_LE, num_slots, num_devices, rounds), experts, num_devices)
    copies.check_slots(num_slots // num_nodes, experts // num_nodes, num_devices // num_nodes)
    expert_at_LE = _by_node(load_LE, num_nodes, num_groups)
    load_BE = np.take_along_axis(load_LE, expert_at_LE, axis=1).reshape(layers * num_nodes, -1)
    at_BP = _filled(load_BE, num_slots // num_nodes, num_devices // num_nodes, rounds)
    first_N1 = np.arange(num_nodes)[:, None] * load_BE.shape[1]
    at_LP = (at_BP.reshape(layers, num_nodes, -1) + first_N1).reshape(layers, -1)
    return Placement(np.take_along_axis(expert_at_LE, at_LP, axis=1), experts, num_devices)


def device_loads(
    load_LE: Num[np.ndarray, "L E"],
    physical_to_logical_LP: Int[np.ndarray, "L P"],
    num_devices: int,
) -> Float[np.ndarray, "L M"]:
    """Load of every device, the copies of an expert sharing its load evenly."""
    layers = len(physical_to_logical_LP)
    row_L1 = np.arange(layers)[:, None]
    count_LE = np.zeros(load_LE.shape)
    np.add.at(count_LE, (row_L1, physical_to_logical_LP), 1)
    share_LE = load_LE / np.maximum(count_LE, 1)
    load_LP = share_LE[row_L1, physical_to_logical_LP]
    return load_LP.reshape(layers, num_devices, -1).sum(axis=2)


def _by_node(load_LE: np.ndarray, nodes: int, groups: int) -> Int[np.ndarray, "L E"]:
    """Experts in node order, groups being packed onto nodes."""
    layers, experts = load_LE.shape
    node_LG, place_LG = eplb.pack(load_LE.reshape(layers, groups, -1).sum(axis=2), nodes)
    group_LG = np.argsort(node_LG * groups + place_LG, axis=1)
    return (group_LG[:, :, None] * (experts // groups) + np.arange(experts // groups)).reshape(
        layers, experts
    )


def _filled(load_BE: np.ndarray, slots: int, devices: int, rounds: int) -> Int[np.ndarray, "B P"]:
    """Steps 2 to 5: the expert of every slot, device by device."""
    count_BE = _copies(load_BE, slots, devices)
    expert_BP, share_BP, hard_B = _placed(load_BE, count_BE, slots, devices)
    for _ in range(rounds):
        if not _relieve(expert_BP, share_BP, devices).any():
            break
    hard = np.flatnonzero(hard_B | (count_BE >= devices).any(axis=1))
    if hard.size:
        expert_BP[hard] = _to_target(expert_BP[hard], share_BP[hard], load_BE[hard], devices)
    return expert_BP


def _copies(load_BE: np.ndarray, slots: int, devices: int) -> Int[np.ndarray, "B E"]:
    """Step 2: how many copies of every expert."""
    rows, experts = load_BE.shape
    first_B = np.arange(rows) * experts
    count_BE, share_BE = np.ones((rows, experts), np.int64), load_BE.copy()
    count, share, load = count_BE.ravel(), share_BE.ravel(), load_BE.ravel()
    for _ in range(slots - experts):
        if devices == 1:
            break
        at_B = share_BE.argmax(axis=1) + first_B
        count[at_B] += 1
        share[at_B] = np.where(count[at_B] < devices, load[at_B] / count[at_B], -1.0)
    return count_BE


def _placed(
    load_BE: np.ndarray, count_BE: np.ndarray, slots: int, devices: int
) -> tuple[Int[np.ndarray, "B P"], Float[np.ndarray, "B P"], Bool[np.ndarray, " B"]]:
    """Step 3: expert and load of every slot, and the rows where a device had to be avoided."""
    rows, experts = load_BE.shape
    first_B1 = np.arange(rows)[:, None] * experts
    share_BE = load_BE / count_BE
    at_BE = np.argsort(-share_BE, axis=1, kind="stable") + first_B1
    at_BP = np.repeat(at_BE.ravel(), count_BE.ravel()[at_BE].ravel()).reshape(rows, slots)
    owner_BP, share_BP = at_BP - first_B1, share_BE.ravel()[at_BP]
    device_BP, hard_B, stuck_B = _packed(owner_BP, share_BP, devices)
    made_BP = np.argsort(device_BP, axis=1, kind="stable")
    expert_BP = np.take_along_axis(owner_BP, made_BP, axis=1)
    share_BP = np.take_along_axis(share_BP, made_BP, axis=1)
    for row in np.flatnonzero(stuck_B):
        _separate(expert_BP[row], share_BP[row], devices)
    return expert_BP, share_BP, hard_B


def _packed(
    owner_BP: np.ndarray, share_BP: np.ndarray, devices: int
) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, " B"], Bool[np.ndarray, " B"]]:
    """Step 3 but for its swaps: the device of every copy, rows where one was avoided, or not."""
    rows, slots = owner_BP.shape
    room = slots // devices
    first_B = np.arange(rows) * devices
    load_BM = np.zeros((rows, devices))  # infinite once the device is full
    size_BM = np.zeros(rows * devices, np.int64)
    held_BM = np.zeros((rows, devices))  # infinite where the expert at hand is
    load, held = load_BM.ravel(), held_BM.ravel()
    device_PB = np.empty((slots, rows), np.int64)
    hard_B, all_stuck_B = np.zeros(rows, bool), np.zeros(rows, bool)
    share_PB = np.ascontiguousarray(share_BP.T)
    again_PB = np.zeros((slots, rows), bool)
    again_PB[1:] = (owner_BP[:, 1:] == owner_BP[:, :-1]).T
    again = set(np.flatnonzero(again_PB.any(axis=1)).tolist())
    for p in range(slots):
        if p in again:
            held_BM[~again_PB[p]] = 0.0
            free_B = load_BM.argmin(axis=1)
            device_B = (load_BM + held_BM).argmin(axis=1)
            at_B = device_B + first_B
            stuck_B = np.isinf(load[at_B] + held[at_B])
            if stuck_B.any():
                device_B = np.where(stuck_B, free_B, device_B)
                at_B = device_B + first_B
            hard_B |= free_B != device_B
            all_stuck_B |= stuck_B
        else:
            if p - 1 in again:
                held[:] = 0.0
            device_B = load_BM.argmin(axis=1)
            at_B = device_B + first_B
        if p + 1 in again:
            held[at_B] = np.inf
        device_PB[p] = device_B
        load[at_B] += share_PB[p]
        size_BM[at_B] += 1
        if p >= room - 1:
            load[at_B[size_BM[at_B] == room]] = np.inf
    return np.ascontiguousarray(device_PB.T), hard_B | all_stuck_B, all_stuck_B


def _separate(expert_P: np.ndarray, share_P: np.ndarray, devices: int) -> None:
    """Swaps copies, in place, until no device holds two of one expert."""
    slots = len(expert_P) // devices
    device_P = np.arange(len(expert_P)) // slots
    while (slot := _doubled(expert_P.reshape(devices, slots))) is not None:
        here = device_P[slot]
        load_M = np.bincount(device_P, weights=share_P, minlength=devices)
        holds_M = (expert_P.reshape(devices, slots) == expert_P[slot]).any(axis=1)
        here_P = np.isin(expert_P, expert_P[device_P == here])
        allowed_P = ~holds_M[device_P] & ~here_P
        if not allowed_P.any():  # every such device has doubled copies too: start over, evenly
            _spread(expert_P, share_P, devices)
            return
        less_P = share_P[slot] - share_P
        after_P = np.maximum(load_M[here] - less_P, load_M[device_P] + less_P)
        other = int(np.where(allowed_P, after_P, np.inf).argmin())
        for array_P in (expert_P, share_P):
            array_P[[slot, other]] = array_P[[other, slot]]


def _doubled(expert_Ms: np.ndarray) -> int | None:
    """The first slot whose expert is on its device already."""
    for device, expert_s in enumerate(expert_Ms):
        _, first = np.unique(expert_s, return_index=True)
        if len(first) < len(expert_s):
            rest = np.setdiff1d(np.arange(len(expert_s)), first)
            return device * len(expert_s) + int(rest[0])
    return None


def _spread(expert_P: np.ndarray, share_P: np.ndarray, devices: int) -> None:
    """Copies dealt to the devices in turn, in place: those of an expert never meet."""
    order_P = np.argsort(expert_P, kind="stable")
    dealt_P = np.argsort(np.arange(len(expert_P)) % devices, kind="stable")
    for array_P in (expert_P, share_P):
        array_P[:] = array_P[order_P][dealt_P]


def _relieve(expert_BP: np.ndarray, share_BP: np.ndarray, devices: int) -> Bool[np.ndarray, " B"]:
    """One swap per row, in place, that lowers the fullest device most; where there was one."""
    rows, slots = expert_BP.shape
    each = slots // devices
    row_B = np.arange(rows)
    device_P = np.arange(slots) // each
    load_BM = share_BP.reshape(rows, devices, each).sum(axis=2)
    full_B = load_BM.argmax(axis=1)
    mine_Bs = full_B[:, None] * each + np.arange(each)
    expert_Bs, share_Bs = expert_BP[row_B[:, None], mine_Bs], share_BP[row_B[:, None], mine_Bs]
    less_BsP = share_Bs[:, :, None] - share_BP[:, None, :]
    after_BsP = load_BM[:, device_P][:, None, :] + less_BsP
    np.maximum(after_BsP, load_BM[row_B, full_B][:, None, None] - less_BsP, out=after_BsP)
    same_BsP = expert_Bs[:, :, None] == expert_BP[:, None, :]
    there_BsM = same_BsP.reshape(rows, each, devices, each).any(axis=3)
    after_BsP[there_BsM[:, :, device_P]] = np.inf  # its own device is among them
    after_BsP[np.broadcast_to(same_BsP.any(axis=1, keepdims=True), after_BsP.shape)] = np.inf
    flat_BX = after_BsP.reshape(rows, -1)
    best_B = flat_BX.argmin(axis=1)
    moved_B = flat_BX[row_B, best_B] < load_BM[row_B, full_B] * (1 - 1e-12)
    rows_B = row_B[moved_B]
    mine_B = mine_Bs[row_B, best_B // slots][moved_B]
    other_B = (best_B % slots)[moved_B]
    for array_BP in (expert_BP, share_BP):
        kept_B = array_BP[rows_B, mine_B]
        array_BP[rows_B, mine_B] = array_BP[rows_B, other_B]
        array_BP[rows_B, other_B] = kept_B
    return moved_B


def _to_target(expert_BP, share_BP, load_BE, devices: int) -> Int[np.ndarray, "B P"]:
    """Step 5: rows changed until their fullest device has no more than EPLB's."""
    theirs_BR = eplb.rebalance_experts(load_BE, expert_BP.shape[1], 1, 1, devices)[0]
    target_B = device_loads(load_BE, theirs_BR, devices).max(axis=1) * (1 + 1e-9)
    over = np.arange(len(load_BE))
    while True:
        load_BM = share_BP.reshape(len(share_BP), devices, -1).sum(axis=2)
        over = over[load_BM[over].max(axis=1, initial=0) > target_B[over]]
        if not over.size:
            return expert_BP
        expert_XP, share_XP = expert_BP[over], share_BP[over]
        moved_X = _relieve(expert_XP, share_XP, devices)
        expert_BP[over], share_BP[over] = expert_XP, share_XP
        for row in over[~moved_X]:
            _search(expert_BP[row], load_BE[row], devices, float(target_B[row]))
        over = over[moved_X]


def _search(expert_P: np.ndarray, load_E: np.ndarray, devices: int, target: float) -> None:
    """Step 5 for one row, in place: descents from many starts, until `target`.

    A start has a few copies taken from experts and given to others, and is packed by loads that are
    a little off.
    """
    rng = np.random.default_rng(0)
    best_P, best = expert_P.copy(), _largest(expert_P, load_E, devices)
    for count in [FEW] + [STARTS] * TRIALS:
        starts_XP = _starts(best_P, load_E, devices, target, count, rng)
        for tried_P in [best_P.copy(), *starts_XP]:
            largest = _largest(tried_P, load_E, devices)
            for power in POWERS if count == STARTS else ():
                while largest > target and _step(tried_P, load_E, devices, target, power):
                    largest = _largest(tried_P, load_E, devices)
            if largest < best:
                best_P, best = tried_P.copy(), largest
        if best <= target:
            break
    expert_P[:] = best_P


def _starts(
    expert_P, load_E, devices: int, target: float, count: int, rng: np.random.Generator
) -> Int[np.ndarray, "X P"]:
    """The best few of `count` packings near a plan of one layer, when one of them is at the target
    or no swap makes the fullest device of any less full.
    """
    slots = len(expert_P)
    count_E = np.bincount(expert_P, minlength=len(load_E))
    count_XE = np.stack([_recounted(count_E, load_E, devices, rng) for _ in range(count)])
    off_XE = load_E * rng.uniform(0.8, 1.25, count_XE.shape)
    expert_XP = _placed(off_XE, count_XE, slots, devices)[0]
    share_XP = np.take_along_axis(load_E / count_XE, expert_XP, axis=1)
    while True:
        load_X = share_XP.reshape(count, devices, -1).sum(axis=2).max(axis=1)
        if load_X.min() <= target or not _relieve(expert_XP, share_XP, devices).any():
            break
    kept_X = np.argsort(load_X, kind="stable")[:KEPT]
    expert_XP, share_XP = expert_XP[kept_X], share_XP[kept_X]
    while _relieve(expert_XP, share_XP, devices).any():
        pass
    return expert_XP


def _recounted(
    count_E: np.ndarray, load_E: np.ndarray, devices: int, rng: np.random.Generator
) -> Int[np.ndarray, " E"]:
    """Up to MOVES copies taken from one expert and given to another, one of the heaviest."""
    count_E = count_E.copy()
    heavy = np.argsort(-load_E, kind="stable")[:WIDTH]
    for _ in range(rng.integers(MOVES + 1)):
        e = rng.choice(np.flatnonzero(count_E > 1))
        count_E[e] -= 1
        f = rng.choice(heavy)
        count_E[f if count_E[f] < devices else e] += 1
    return count_E


def _largest(expert_P: np.ndarray, load_E: np.ndarray, devices: int) -> float:
    return float(device_loads(load_E[None], expert_P[None], devices).max())


def _step(expert_P, load_E, devices: int, target: float, power: int) -> bool:
    """The swap or the exchange of a copy for another expert's that lowers sum(load ** power) most.

    In place; False if none does.
    """
    slots = len(expert_P)
    device_P = np.arange(slots) // (slots // devices)
    unit_E = load_E / target
    holds_EM = np.zeros((len(load_E), devices))
    holds_EM[expert_P, device_P] = 1.0
    count_E = holds_EM.sum(axis=1)
    share_E = unit_E / count_E
    load_M = share_E @ holds_EM
    now = _power(load_M, power).sum()

    there_PP = holds_EM[expert_P][:, device_P] > 0
    less_PP = share_E[expert_P][:, None] - share_E[expert_P][None, :]
    load_P1, load_1P = load_M[device_P][:, None], load_M[device_P][None, :]
    swap_PP = _power(np.maximum(load_P1 - less_PP, 0), power)
    swap_PP += _power(np.maximum(load_1P + less_PP, 0), power)
    swap_PP += now - _power(load_P1, power) - _power(load_1P, power)
    swap_PP[there_PP | there_PP.T] = np.inf

    gone_Q = np.flatnonzero(count_E[expert_P] > 1)  # slots that hold one of several copies
    gone_QE = expert_P[gone_Q]
    fewer_QM = holds_EM[gone_QE] * (unit_E / np.maximum(count_E - 1, 1) - share_E)[gone_QE][:, None]
    fewer_QM[np.arange(len(gone_Q)), device_P[gone_Q]] = -share_E[gone_QE]
    more_E = unit_E / (count_E + 1)
    more_EM = holds_EM * (more_E - share_E)[:, None]
    after_QEM = load_M + fewer_QM[:, None, :] + more_EM[None]
    after_QEM[np.arange(len(gone_Q)), :, device_P[gone_Q]] += more_E
    np.maximum(after_QEM, 0, out=after_QEM)
    swap_QE = _power(after_QEM, power).sum(axis=2)
    swap_QE[holds_EM.T[device_P[gone_Q]] > 0] = np.inf

    least_swap = swap_PP.min()
    least_other = swap_QE.min() if swap_QE.size else np.inf
    if not min(least_swap, least_other) < now * (1 - 1e-12):
        return False
    if least_swap <= least_other:
        p, q = np.unravel_index(int(swap_PP.argmin()), swap_PP.shape)
        expert_P[[p, q]] = expert_P[[q, p]]
    else:
        q, e = np.unravel_index(int(swap_QE.argmin()), swap_QE.shape)
        expert_P[gone_Q[q]] = e
    return True


def _power(x: np.ndarray, power: int) -> np.ndarray:
    """x to a power of two, by squares: a tenth of the time of NumPy's `**`."""
    x = x * x
    while (power := power // 2) > 1:
        np.multiply(x, x, out=x)
    return x
