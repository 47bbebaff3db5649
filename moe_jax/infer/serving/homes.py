"""Where a request should run: on the device whose experts the tokens of its prompt are sent to.

A token's rows over the links are fewer by what it finds at home, and a request stays on the shard
that it was admitted to, so its home is chosen once, before anything of it was routed. What is known
then are the identities of its tokens, and they predict their experts (Sem-MoE, arXiv:2503.04398).
The rule: for every identity, what its recorded tokens would have cost at every home
(placement/homes/identities.py); a request costs the mean over its tokens. Homes that many want have
a price (placement/homes/assign.py), learned from the recorded requests, so that all fill up alike.

Nobody waits for a home: see scheduler.py.

Axes: V vocabulary, M devices that hold experts, T tokens, S shards.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from moe_jax.errors import Refused
from moe_jax.placement.homes import assign, identities, tally
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class Homes:
    """What is known of tokens.

    Attributes:
      cost_VM: rows that a token of an identity costs at a home, all layers, less the mean.
      price_M: what a place on a device is worth.
      slack: requests that a shard may run more than another because it is a home.
    """

    cost_VM: Float[np.ndarray, "V M"]
    price_M: Float[np.ndarray, " M"]
    slack: int

    def __call__(self, tokens: Sequence[int], running_S: Sequence[int]) -> list[float]:
        """Of every shard for a request, the smaller the better; inf = it is too far ahead.

        Args:
          tokens: of the prompt, and of the answer so far.
          running_S: requests that run on the shards; shard s is a place on device s % M.
        """
        ahead_S = np.asarray(running_S) - min(running_S)
        device_S = np.arange(len(ahead_S)) % len(self.price_M)
        cost_S = self.cost_VM[np.asarray(tokens)].mean(axis=0)[device_S]
        priced_S = cost_S + self.price_M[device_S] * (2 * ahead_S / self.slack)
        return np.where(ahead_S < self.slack, priced_S, np.inf).tolist()


def slack(seats: int) -> int:
    """That of shards with so many seats."""
    return max(2, seats // 4)


def learn(
    problem: Problem,
    token_T: Int[np.ndarray, " T"],
    placement: Placement,
    vocab_size: int,
    slack: int,
) -> Homes:
    """Args:
    problem: recorded requests as sequences, with the links and the dispatch.
    token_T: identities of its tokens.
    placement: where experts are.

    Raises:
      Refused: homes make no difference to this dispatch, or experts have copies.
    """
    tally.check(problem)
    if placement.has_replicas:
        rule = "where a copy is taken depends on the home that is to be chosen"
        fix = "serve under a plan without copies (made without --slots)"
        raise Refused("plan num_slots", placement.num_slots, rule, fix)
    cost_VM = identities.cost_VM(problem, token_T, placement.device_LE, vocab_size)
    cost_SM = identities.mean_SM(cost_VM, token_T, problem.trace.seq_len)
    return Homes(cost_VM, assign.prices_M(cost_SM), slack)
