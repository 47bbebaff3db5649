"""Simulated annealing of transitions along the layers, many copies side by side.

Axes: B copies, L layers, E experts, M devices, S slots of a device, P = M / 2 pairs of devices.

A move swaps two experts of one layer, so groups stay equal. Only adjacent layers interact: all even
layers move at once, then all odd ones. In a layer the devices are paired at random and each pair
swaps one random expert each, so the moves of a step never touch one another. With near[m, e] what
expert e keeps with the experts on device m of the layers before and after, swapping e on a with f
on b gains

    sum over m of (near[m, e] - near[m, f]) (like[b, m] - like[a, m])

which on a flat machine is four numbers. A move changes `near` of both neighbours on a and b. It
costs `penalty` per unit of load above the cap that it adds. Metropolis at a falling temperature
accepts; the penalty rises, so that the end is within the caps or close to them.
"""

import dataclasses

import numpy as np

from moe_jax.placement import clock
from moe_jax.placement.chain import Chain

SHIFTS = (-1, 1, 0)  # where what a layer keeps with its neighbours, and itself, stands in `near`
HOT, COLD = 1.0, 0.01  # temperatures, over the mean gain or loss of a random swap
PENALTY = (0.5, 6.0)  # transitions per unit of load above the cap, from hot to cold
MOVES_AT_ONCE = 2**17  # elements of a step's largest array


def copies_for(chain: Chain) -> int:
    """As many copies as keep a step's arrays in the cache."""
    elements = chain.num_layers * chain.num_devices * chain.keep_LEE.shape[1]
    return int(np.clip(MOVES_AT_ONCE // max(elements, 1), 1, 32))


def anneal(
    chain: Chain,
    start_BLE: np.ndarray,
    rng: np.random.Generator,
    sweeps: int,
    deadline: float,
    hot: float = HOT,
    own_LEE: np.ndarray | None = None,
) -> np.ndarray:
    """int64 [B, L, E]: the labels after `sweeps` sweeps, or at the deadline.

    Args:
      chain: what is kept together, and the caps.
      start_BLE: labels to start from.
      rng: of the moves.
      sweeps: moves per layer and pair of devices.
      deadline: time.monotonic() after which the sweeps end.
      hot: first temperature, over the mean gain or loss of a random swap.
      own_LEE: what two experts of one layer keep on one device, or None; symmetric, zero diagonal.
    """
    if chain.num_devices < 2:
        return start_BLE
    state = _State.of(chain, start_BLE, own_LEE)
    scale = state.typical(rng)
    for sweep in range(sweeps):
        if clock.late(deadline):
            break
        done = sweep / max(sweeps - 1, 1)
        temperature = scale * hot * (COLD / hot) ** done
        penalty = PENALTY[0] * (PENALTY[1] / PENALTY[0]) ** done
        for parity in range(min(2, chain.num_layers)):
            state.step(parity, temperature, penalty, rng)
    return state.device_BLE


@dataclasses.dataclass(eq=False)
class _State:
    """Copies of the labels, by expert and by slot, with the loads of the devices.

    Attributes:
      rows_ZLEE: what an expert keeps with each expert of the layer before, after, and its own if
        that counts; zero beyond the ends.
      near_BLME: what an expert keeps with all of these on each device; a layer of zeros before the
        first and one after the last.
    """

    chain: Chain
    device_BLE: np.ndarray
    expert_BLMS: np.ndarray
    load_BLM: np.ndarray
    rows_ZLEE: np.ndarray
    near_BLME: np.ndarray

    @classmethod
    def of(cls, chain: Chain, start_BLE: np.ndarray, own_LEE: np.ndarray | None = None) -> "_State":
        copies, layers, experts = start_BLE.shape
        order_BLE = np.argsort(start_BLE, axis=2, kind="stable")
        expert_BLMS = order_BLE.reshape(copies, layers, chain.num_devices, -1)
        load_BLM = chain.load_LE[np.arange(layers)[:, None, None], expert_BLMS].sum(axis=3)
        none_1EE = np.zeros((1, experts, experts))
        before_LEE = np.concatenate([none_1EE, chain.keep_LEE.transpose(0, 2, 1)])
        after_LEE = np.concatenate([chain.keep_LEE, none_1EE])
        rows_ZLEE = np.stack([before_LEE, after_LEE] + ([] if own_LEE is None else [own_LEE]))
        near_BLME = np.zeros((copies, layers + 2, chain.num_devices, experts))
        onehot_BLME = (start_BLE[:, :, None] == np.arange(chain.num_devices)[:, None]).astype(float)
        for shift, rows_LEE in zip(SHIFTS, rows_ZLEE, strict=False):
            near_BLME[:, 1 + shift : 1 + shift + layers] += onehot_BLME @ rows_LEE
        return cls(chain, start_BLE.copy(), expert_BLMS, load_BLM, rows_ZLEE, near_BLME)

    def typical(self, rng: np.random.Generator) -> float:
        """Mean gain or loss of a random swap."""
        total = [np.abs(self._propose(parity, rng).gain_BLP).mean() for parity in (0, 1)]
        return max(float(np.mean(total)), 1e-12)

    def step(self, parity: int, temperature: float, penalty: float, rng) -> None:
        """One swap for every pair of devices in every other layer."""
        move = self._propose(parity % self.chain.num_layers, rng)
        gain_BLP = move.gain_BLP - penalty * move.overload_BLP
        bar_BLP = temperature * np.log(rng.random(gain_BLP.shape))  # log: never above 0
        b, n, p = np.nonzero(gain_BLP >= bar_BLP)
        layer, e, f = move.layer_L[n], move.e_BLP[b, n, p], move.f_BLP[b, n, p]
        to, of = move.to_BLP[b, n, p], move.of_BLP[b, n, p]
        self.device_BLE[b, layer, e], self.device_BLE[b, layer, f] = to, of
        self.expert_BLMS[b, layer, of, move.slot_e_BLP[b, n, p]] = f
        self.expert_BLMS[b, layer, to, move.slot_f_BLP[b, n, p]] = e
        shift = self.chain.load_LE[layer, f] - self.chain.load_LE[layer, e]
        self.load_BLM[b, layer, of] += shift
        self.load_BLM[b, layer, to] -= shift
        # Pairs are disjoint, so no row of `near` is met twice in one sum.
        near_XE = self.near_BLME.reshape(-1, self.device_BLE.shape[2])
        first = self._first(b, layer)
        for shift, rows_LEE in zip(SHIFTS, self.rows_ZLEE, strict=False):
            change_AE = rows_LEE[layer, e] - rows_LEE[layer, f]
            there = first + shift * self.chain.num_devices
            near_XE[there + to] += change_AE
            near_XE[there + of] -= change_AE

    def _first(self, copy, layer):
        """The row of device 0 of a layer in `near`."""
        return (copy * self.near_BLME.shape[1] + layer + 1) * self.chain.num_devices

    def _propose(self, parity: int, rng: np.random.Generator) -> "_Moves":
        copies, layers, devices, slots = self.expert_BLMS.shape
        layer_L = np.arange(min(parity, layers - 1), layers, 2)
        pairs = devices // 2
        shape = (copies, len(layer_L), pairs)
        device_BLM = rng.random((copies, len(layer_L), devices)).argsort(axis=2)
        of_BLP, to_BLP = device_BLM[:, :, :pairs], device_BLM[:, :, pairs : 2 * pairs]
        slot_e_BLP, slot_f_BLP = rng.integers(slots, size=(2, *shape))
        copy_B11, layer_1L1 = np.arange(copies)[:, None, None], layer_L[None, :, None]
        e_BLP = self.expert_BLMS[copy_B11, layer_1L1, of_BLP, slot_e_BLP]
        f_BLP = self.expert_BLMS[copy_B11, layer_1L1, to_BLP, slot_f_BLP]

        experts, like_MM = self.device_BLE.shape[2], self.chain.likeness_MM
        if self.chain.node_likeness or self.chain.devices_per_node != devices:
            differ_BLPM = self.near_BLME[copy_B11, layer_1L1 + 1, :, e_BLP]
            differ_BLPM -= self.near_BLME[copy_B11, layer_1L1 + 1, :, f_BLP]
            gain_BLP = np.einsum("blpm,blpm->blp", differ_BLPM, like_MM[to_BLP] - like_MM[of_BLP])
        else:
            first_BLP = self._first(copy_B11, layer_1L1)
            to, of = (first_BLP + to_BLP) * experts, (first_BLP + of_BLP) * experts
            near = self.near_BLME.reshape(-1)
            gain_BLP = near[to + e_BLP] - near[of + e_BLP] + near[of + f_BLP] - near[to + f_BLP]
        if len(self.rows_ZLEE) > 2:  # what e and f keep of each other stays: both change places
            own_BLP = self.rows_ZLEE[2, layer_1L1, e_BLP, f_BLP]
            gain_BLP -= 2.0 * (1.0 - like_MM[of_BLP, to_BLP]) * own_BLP

        load_e, load_f = (self.chain.load_LE[layer_1L1, x] for x in (e_BLP, f_BLP))
        overload_BLP = np.zeros(shape)
        for device_BLP, shift_BLP in ((of_BLP, load_f - load_e), (to_BLP, load_e - load_f)):
            load_BLP = self.load_BLM[copy_B11, layer_1L1, device_BLP]
            cap_BLP = self.chain.cap_LM[layer_1L1, device_BLP]
            overload_BLP += np.maximum(load_BLP + shift_BLP - cap_BLP, 0.0)
            overload_BLP -= np.maximum(load_BLP - cap_BLP, 0.0)
        return _Moves(
            layer_L, e_BLP, f_BLP, of_BLP, to_BLP, slot_e_BLP, slot_f_BLP, gain_BLP, overload_BLP
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Moves:
    """Proposed swaps: e in a slot of device `of` with f in a slot of device `to`."""

    layer_L: np.ndarray
    e_BLP: np.ndarray
    f_BLP: np.ndarray
    of_BLP: np.ndarray
    to_BLP: np.ndarray
    slot_e_BLP: np.ndarray
    slot_f_BLP: np.ndarray
    gain_BLP: np.ndarray
    overload_BLP: np.ndarray
