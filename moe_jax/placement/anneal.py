"""Simulated annealing of transitions along the layers, many copies side by side.

Axes: B copies, L layers, E experts, M devices, S slots of a device, P = M / 2 pairs of devices.

A move swaps two experts of one layer, so groups stay equal. Only adjacent layers interact: all even
layers move at once, then all odd ones. In a layer the devices are paired at random and each pair
swaps one random expert each, so the moves of a step never touch one another. With K the transitions
of an expert from and to its neighbours and like[d, g] what expert g of a neighbour keeps for one on
device d, swapping e on a with f on b gains

    sum over g of (K[e, g] - K[f, g]) (like[b, g] - like[a, g])

and costs `penalty` per unit of load above the cap that it adds. Metropolis at a falling temperature
accepts; the penalty rises, so that the end is within the caps or close to them.
"""

import dataclasses
import time

import numpy as np

from moe_jax.placement.chain import Chain

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
        if time.monotonic() >= deadline:
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
      keep_LEN: [L, E, 2 E or 3 E], with the layer before, the layer after, and the own layer.
    """

    chain: Chain
    device_BLE: np.ndarray
    expert_BLMS: np.ndarray
    load_BLM: np.ndarray
    keep_LEN: np.ndarray

    @classmethod
    def of(cls, chain: Chain, start_BLE: np.ndarray, own_LEE: np.ndarray | None = None) -> "_State":
        copies, layers, experts = start_BLE.shape
        order_BLE = np.argsort(start_BLE, axis=2, kind="stable")
        expert_BLMS = order_BLE.reshape(copies, layers, chain.num_devices, -1)
        load_BLM = chain.load_LE[np.arange(layers)[:, None, None], expert_BLMS].sum(axis=3)
        none_1EE = np.zeros((1, experts, experts))
        before_LEE = np.concatenate([none_1EE, chain.keep_LEE.transpose(0, 2, 1)])
        after_LEE = np.concatenate([chain.keep_LEE, none_1EE])
        parts = [before_LEE, after_LEE] + ([] if own_LEE is None else [own_LEE])
        keep_LEN = np.concatenate(parts, axis=2)
        return cls(chain, start_BLE.copy(), expert_BLMS, load_BLM, keep_LEN)

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

        differ_BLPN = self.keep_LEN[layer_1L1, e_BLP] - self.keep_LEN[layer_1L1, f_BLP]
        before_BLE = self.device_BLE[:, np.maximum(layer_L - 1, 0)]
        after_BLE = self.device_BLE[:, np.minimum(layer_L + 1, layers - 1)]
        experts, near = before_BLE.shape[2], [before_BLE, after_BLE]
        if own := self.keep_LEN.shape[2] > 2 * experts:
            near.append(self.device_BLE[:, layer_L])
        near_BL1N = np.concatenate(near, axis=2)[:, :, None, :]
        if self.chain.node_likeness or self.chain.devices_per_node != devices:
            like_MM = self.chain.likeness_MM
            like_BLPN = (
                like_MM[to_BLP[..., None], near_BL1N] - like_MM[of_BLP[..., None], near_BL1N]
            )
        else:
            like_BLPN = (near_BL1N == to_BLP[..., None]).astype(np.int8)
            like_BLPN -= near_BL1N == of_BLP[..., None]
        gain_BLP = np.einsum("blpn,blpn->blp", differ_BLPN, like_BLPN)
        if own:  # e and f themselves change places, so what they keep of each other stays
            like_BLP = 1.0 - self.chain.likeness_MM[of_BLP, to_BLP]
            gain_BLP -= 2.0 * like_BLP * self.keep_LEN[layer_1L1, e_BLP, 2 * experts + f_BLP]

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
