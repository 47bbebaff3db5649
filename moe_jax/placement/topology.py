"""The machine a plan is for: nodes, devices, two tiers of links, and how fast a device computes.

Promise: `Topology` is frozen and validated. Devices are numbered node by node (nodes.py). The fast
tier joins the devices of a node, the slow tier the nodes; on a flat machine there is one node and
the slow tier is not used.

Presets are small JSON files in `topologies/` beside this module (fields as below). A name is
looked up in `configs/topology/` of the current folder first, for machines of one's own; a path to a
`.json` works as well.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import nodes as nodes_lib
from moe_jax.placement import torus as torus_lib
from moe_jax.placement.nodes import DevicesPerNode, Nodes
from moe_jax.placement.torus import Torus

FOLDERS = (
    pathlib.Path("configs/topology"),
    pathlib.Path(__file__).resolve().parent / "topologies",
)


def _number(field: str, value: Any, above: float) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not above < value <= sys.float_info.max:
        raise Refused(field, value, f"a finite number above {above:g}", "Correct it")


def _flops(value: Any, devices: int) -> float | tuple[float, ...]:
    """One number where devices are alike, else one per device."""
    if not isinstance(value, tuple):
        _number("device_flops", value, above=0.0)
        return value
    if len(value) != devices:
        rule = f"{len(value)} numbers for {devices} devices"
        raise Refused("device_flops", list(value)[:20], rule, "Give one per device, or one for all")
    for flops in value:
        _number("device_flops", flops, above=0.0)
    return value[0] if len(set(value)) == 1 else value


@dataclasses.dataclass(frozen=True)
class Tier:
    """A kind of link: bytes per second that a device sends (and receives), seconds per message."""

    bandwidth: float
    latency: float

    def __post_init__(self):
        _number("bandwidth", self.bandwidth, above=0.0)
        _number("latency", self.latency, above=-1e-30)


# One NVLink-like tier and one InfiniBand-like tier (50 GB/s per device), as on common GPU nodes.
FAST = Tier(bandwidth=450e9, latency=5e-6)
SLOW = Tier(bandwidth=50e9, latency=10e-6)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Nodes x devices.

    Attributes:
      name: for people.
      num_nodes: nodes of the machine.
      devices_per_node: devices in each; where nodes differ, one number per node (a list in JSON).
      fast: links inside a node.
      slow: links between nodes.
      torus: how the devices of a node are wired, where every pair has no link of its own: `fast`
        is then one link in one direction, its latency that of a hop. The same in every node.
      device_flops: floating-point operations per second that a device reaches in expert matmuls;
        where devices differ, one number per device (a list in JSON).
    """

    name: str
    num_nodes: int
    devices_per_node: DevicesPerNode
    fast: Tier = FAST
    slow: Tier = SLOW
    device_flops: float | tuple[float, ...] = 4e14
    torus: Torus | None = None

    def __post_init__(self):
        value = self.num_nodes
        if type(value) is not int or not 1 <= value <= nodes_lib.MOST:
            rule = f"a whole number from 1 to {nodes_lib.MOST}"
            raise Refused("num_nodes", value, rule, "Correct it")
        each = nodes_lib.checked(self.num_nodes, self.devices_per_node)
        object.__setattr__(self, "devices_per_node", each)
        flops = _flops(self.device_flops, self.num_devices)
        object.__setattr__(self, "device_flops", flops)
        if self.torus is not None and self.torus.size != each:
            rule = f"{self.torus.size} devices, and devices_per_node is {each}"
            raise Refused("torus shape", list(self.torus.shape), rule, "Correct one of them")

    @property
    def num_devices(self) -> int:
        each = self.devices_per_node
        return sum(each) if isinstance(each, tuple) else self.num_nodes * each

    @functools.cached_property
    def nodes(self) -> Nodes:
        return nodes_lib.of(self.num_devices, self.devices_per_node)

    @property
    def node_M(self) -> np.ndarray:
        """int64 [M]: the node of every device."""
        return self.nodes.node_M

    @property
    def alike(self) -> bool:
        """Any two devices of a node may change places, and any two nodes."""
        even_speed = not isinstance(self.device_flops, tuple)
        return self.nodes.equal and even_speed and self.torus is None

    @functools.cached_property
    def hops_MM(self) -> np.ndarray:
        """int64: 0 to itself; inside a node 1 (a switch), or the links of the torus; else 3.

        Three: switch, spine, switch, as in a fat tree of two levels.
        """
        inside_MM = np.ones((self.num_devices, self.num_devices), np.int64)
        if self.torus is not None:
            inside_MM = np.tile(self.torus.hops_GG, (self.num_nodes, self.num_nodes))
        hops_MM = np.where(self.nodes.same_MM, inside_MM, 3)
        np.fill_diagonal(hops_MM, 0)
        return hops_MM

    @functools.cached_property
    def flops_M(self) -> np.ndarray:
        """float64 [M]: operations per second of every device."""
        return np.broadcast_to(np.array(self.device_flops, float), self.num_devices)

    @functools.cached_property
    def mean_flops(self) -> float:
        flops = self.device_flops
        return float(np.mean(flops)) if isinstance(flops, tuple) else float(flops)

    @property
    def speed_M(self) -> np.ndarray:
        """float64 [M]: speeds over their mean; exactly 1 where devices are alike."""
        return self.flops_M / self.mean_flops

    @property
    def tera(self) -> str:
        """TFLOP/s of a device, for people; of each where they differ."""
        flops = self.device_flops
        each = flops if isinstance(flops, tuple) else (flops,)
        return ", ".join(f"{one / 1e12:g}" for one in each)

    @property
    def shape(self) -> str:
        """Nodes and devices, for people: `2 x 8`, `8 + 4`."""
        each = self.devices_per_node
        return (
            " + ".join(map(str, each)) if isinstance(each, tuple) else f"{self.num_nodes} x {each}"
        )

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        if self.torus is None:
            del fields["torus"]  # as files were before there were any
        else:
            fields["torus"] = {"shape": list(self.torus.shape), "wrap": list(self.torus.wrap)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def flat(num_devices: int) -> Topology:
    """One node of `num_devices` devices."""
    return Topology(f"flat{num_devices}", 1, num_devices)


def nodes_by_devices(num_nodes: int, num_devices: int) -> Topology:
    """`num_devices` devices in all, in `num_nodes` equal nodes."""
    if num_nodes < 1 or num_devices % num_nodes:
        divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - num_nodes))
        raise Refused(
            "nodes", num_nodes, f"must divide the {num_devices} devices", f"Use {nearest}"
        )
    if num_nodes == 1:
        return flat(num_devices)
    each = num_devices // num_nodes
    return Topology(f"{num_nodes}x{each}", num_nodes, each)


def uneven(sizes: tuple[int, ...]) -> Topology:
    """Nodes of these numbers of devices."""
    return Topology("+".join(map(str, sizes)), len(sizes), sizes)


def preset(name: str) -> Topology:
    """A preset by name, or a file by path."""
    if (path := file_of(name)) is not None:
        return _read(path)
    known = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.json")})
    raise Refused(
        "topology", name, "no preset of this name", f"Use one of {', '.join(known)}, or a .json"
    )


def file_of(name: str) -> pathlib.Path | None:
    """The file that `preset` reads; None where it knows none."""
    if name.endswith(".json"):
        return pathlib.Path(name)
    paths = (folder / f"{name}.json" for folder in FOLDERS)
    return next((path for path in paths if path.is_file()), None)


def from_json(fields: Any, source: str = "topology") -> Topology:
    """From the JSON form, as presets and plans hold it."""
    if not isinstance(fields, dict):
        raise Refused(source, fields, "a JSON object", "See moe_jax/placement/topologies/")
    known = {field.name for field in dataclasses.fields(Topology)}
    for key in fields:
        if key not in known:
            raise Refused(f"{source} {key}", fields[key], "no such field", f"Fields: {known}")
    for key in ("name", "num_nodes", "devices_per_node"):
        if key not in fields:
            raise Refused(f"{source} {key}", None, "this field is needed", "Add it")
    if type(fields["name"]) is not str or type(fields["num_nodes"]) is not int:
        named = {key: fields[key] for key in ("name", "num_nodes")}
        raise Refused(source, named, "name is a text, num_nodes a whole number", "Correct it")
    values = dict(fields)
    each = nodes_lib.checked(values["num_nodes"], values["devices_per_node"])
    values["devices_per_node"] = each
    if isinstance(flops := values.get("device_flops"), list):
        devices = sum(each) if isinstance(each, tuple) else each * values["num_nodes"]
        values["device_flops"] = _flops(tuple(flops), devices)
    elif "device_flops" in values:
        _number("device_flops", flops, above=0.0)
    for key in ("fast", "slow"):
        if key in values:
            tier = values[key]
            if not isinstance(tier, dict) or set(tier) != {"bandwidth", "latency"}:
                raise Refused(f"{source} {key}", tier, "has bandwidth and latency", "Correct it")
            for name, above in (("bandwidth", 0.0), ("latency", -1e-30)):
                _number(f"{key} {name}", tier[name], above)
            values[key] = Tier(**tier)
    if "torus" in values:
        values["torus"] = torus_lib.from_json(values["torus"])
    return Topology(**values)


def _read(path: pathlib.Path) -> Topology:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused("topology", str(path), f"not a JSON file ({error})", "Correct it") from error
    return from_json(fields, str(path))
