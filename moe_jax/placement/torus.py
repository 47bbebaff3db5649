"""Devices of a node on a torus or mesh (TPU slices): hops, and what each link carries.

Axes: G devices of a node, A axes, K = 2 A G links (one per device, axis and direction).

Device g is at np.unravel_index(g, shape): the last axis runs fastest. Bytes take axis 0 first, then
axis 1, and so on (dimension order). On an axis that wraps around they take the shorter way; where
both are as long, half of them each. An axis without wraparound is a line, whose end devices have
one link less. Exact: no routing tricks of a real machine (twisted tori, adaptive routes) enter.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from scipy import sparse

from moe_jax.errors import Refused

MOST = 1024  # devices: the table of routes has G^2 x hops entries


@dataclasses.dataclass(frozen=True)
class Torus:
    """A torus.

    Attributes:
      shape: devices along every axis.
      wrap: for every axis, does it wrap around?
    """

    shape: tuple[int, ...]
    wrap: tuple[bool, ...]

    def __post_init__(self):
        sizes = [type(n) is int and 1 <= n <= MOST for n in self.shape]
        if not sizes or not all(sizes) or len(sizes) > 4 or self.size > MOST:
            rule = f"one to four whole numbers, at most {MOST} devices together"
            raise Refused("torus shape", list(self.shape)[:20], rule, "Correct it")
        if len(self.wrap) != len(self.shape) or any(type(w) is not bool for w in self.wrap):
            rule = "true or false for every axis"
            raise Refused("torus wrap", list(self.wrap)[:20], rule, "Correct it")

    @functools.cached_property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @functools.cached_property
    def hops_GG(self) -> np.ndarray:
        """int64: links between two devices."""
        place_AG = np.array(np.unravel_index(np.arange(self.size), self.shape))
        far_AGG = np.abs(place_AG[:, :, None] - place_AG[:, None, :])
        size_A11, wrap_A11 = (np.array(a)[:, None, None] for a in (self.shape, self.wrap))
        return np.where(wrap_A11, np.minimum(far_AGG, size_A11 - far_AGG), far_AGG).sum(axis=0)

    @functools.cached_property
    def links_G(self) -> np.ndarray:
        """int64: links that leave every device (as many arrive)."""
        place_AG = np.array(np.unravel_index(np.arange(self.size), self.shape))
        links_G = np.zeros(self.size, np.int64)
        for place_G, size, wrap in zip(place_AG, self.shape, self.wrap, strict=True):
            if size > 1:
                links_G += 2 if wrap else (place_G > 0).astype(int) + (place_G < size - 1)
        return links_G

    @functools.cached_property
    def routes(self) -> sparse.csr_array:
        """[G * G, K]: the share of what goes from s to d (row s G + d) that passes each link."""
        rows, links, shares = [], [], []
        every_AG = np.array(np.unravel_index(np.arange(self.size), self.shape))
        for axis, (size, wrap) in enumerate(zip(self.shape, self.wrap, strict=True)):
            place_G = every_AG[axis]
            for start, end in np.ndindex(size, size):
                source, destination = np.flatnonzero(place_G == start), place_G == end
                s, d = (a.ravel() for a in np.meshgrid(source, np.flatnonzero(destination)))
                # axes before this one are done, those after it are still to come
                at_A = [every_AG[b][d if b < axis else s] for b in range(len(self.shape))]
                for step in _steps(start, end, size, wrap):
                    at_A[axis] = np.full(len(s), step.place)
                    device = np.ravel_multi_index(at_A, self.shape)
                    rows.append(s * self.size + d)
                    links.append((device * len(self.shape) + axis) * 2 + step.backward)
                    shares.append(np.full(len(s), step.share))
        shape = (self.size**2, 2 * len(self.shape) * self.size)
        if not rows:
            return sparse.csr_array(shape)
        entries = (np.concatenate(rows), np.concatenate(links))
        return sparse.coo_array((np.concatenate(shares), entries), shape=shape).tocsr()

    def on_links(self, bytes_LGG: np.ndarray) -> np.ndarray:
        """float64 [L, K]: what each link carries; link k leaves device k // (2 A)."""
        return bytes_LGG.reshape(len(bytes_LGG), -1) @ self.routes

    def busiest_LG(self, bytes_LGG: np.ndarray) -> np.ndarray:
        """float64 [L, G]: what the busiest link that leaves each device carries."""
        return self.on_links(bytes_LGG).reshape(len(bytes_LGG), self.size, -1).max(axis=2)

    @functools.cached_property
    def shared_KG(self) -> np.ndarray:
        """float64 [K, G]: on each link, if every device sends one byte to device d."""
        every = sparse.kron(np.ones((1, self.size)), sparse.eye(self.size))
        return np.asarray((every @ self.routes).todense()).T

    @functools.cached_property
    def answered_KG(self) -> np.ndarray:
        """float64 [K, G]: on each link, if device d sends one byte to every device."""
        every = sparse.kron(sparse.eye(self.size), np.ones((1, self.size)))
        return np.asarray((every @ self.routes).todense()).T

    def furthest(self, used_XG: np.ndarray) -> np.ndarray:
        """int64 [X]: hops from the furthest device to one of those used; 0 where none is."""
        return (used_XG * self.hops_GG.max(axis=0)).max(axis=1)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A link of a way along one axis."""

    place: int
    backward: int
    share: float


def _steps(start: int, end: int, size: int, wrap: bool) -> list[_Step]:
    """The links from one place of an axis to another."""
    ahead = (end - start) % size
    if not wrap:
        ways = [(abs(end - start), int(end < start), 1.0)]
    elif 2 * ahead == size:
        ways = [(ahead, 0, 0.5), (ahead, 1, 0.5)]
    else:
        ways = [(ahead, 0, 1.0) if 2 * ahead < size else (size - ahead, 1, 1.0)]
    return [
        _Step((start + (-n if backward else n)) % size, backward, share)
        for length, backward, share in ways
        for n in range(length)
    ]


def from_json(fields: Any) -> Torus | None:
    """From `{"shape": [4, 4], "wrap": [true, true]}`."""
    if fields is None:
        return None
    lists = isinstance(fields, dict) and set(fields) == {"shape", "wrap"}
    if not lists or not all(isinstance(one, (list, tuple)) for one in fields.values()):
        rule = 'as {"shape": [4, 4], "wrap": [true, true]}'
        raise Refused("torus", str(fields)[:80], rule, "Correct it")
    for field, kind in (("shape", int), ("wrap", bool)):
        if len(fields[field]) > 4 or any(type(one) is not kind for one in fields[field]):
            rule = f"one to four of {kind.__name__}"
            raise Refused(f"torus {field}", str(fields[field])[:80], rule, "Correct it")
    return Torus(tuple(fields["shape"]), tuple(fields["wrap"]))
