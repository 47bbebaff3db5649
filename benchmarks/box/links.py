"""Hosts and links inside this machine: a network namespace per host, one switch, limited links.

    host h0 --eth0 ==veth== h0-- switch --h1 ==veth== eth0-- host h1

The switch is a bridge in a namespace of its own, so nothing appears among the machine's own
interfaces. Both ends of every cable carry a token-bucket filter (tc tbf): what a host sends is
limited at its eth0, what it receives at the switch's end.

Nothing is left behind. A watchdog process waits on a pipe that this process holds; when the pipe
closes, because `Network` was closed or because this process ended in any way, SIGKILL included, it
kills what runs in the namespaces and deletes them. Should the watchdog be killed as well, the next
`Network` removes what dead processes left, recognised by name: PREFIX, process id, host.
"""

import dataclasses
import ipaddress
import os
import pathlib
import shutil
import subprocess

from moe_jax.errors import Refused

PREFIX = "moejax"
MTU = "9000"  # jumbo frames, as between machines of a cluster: headers are below 1 %
NETWORK = ipaddress.ip_network("10.77.0.0/24")
MOST_HOSTS = NETWORK.num_addresses - 2  # the others name the network and its broadcast
NETNS_FILES = pathlib.Path("/etc/netns")  # files here replace those of /etc inside a namespace
# Programs and the Debian package they come in.
PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "taskset": "util-linux",
    "unshare": "util-linux",
}

# $1...: namespaces. A process may start another while it is killed, hence the repetition.
_CLEAN = """
for name in "$@"; do
  for attempt in 1 2 3; do
    pids=$(ip netns pids "$name" 2>/dev/null) || break
    [ -z "$pids" ] && break
    kill -9 $pids 2>/dev/null
    sleep 0.1
  done
  ip netns del "$name" 2>/dev/null
  rm -rf "/etc/netns/$name"
done
"""
_WATCH = "cat > /dev/null" + _CLEAN


def check_machine() -> None:
    """Refuses a machine or a user that cannot make namespaces. Touches nothing."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise Refused(
                "cluster in a box",
                program,
                "this program is needed and is not on the PATH",
                f"install it (Debian: apt-get install {package})",
            )
    if os.geteuid() != 0:
        raise Refused(
            "cluster in a box",
            f"user id {os.geteuid()}",
            "network namespaces need root",
            "run it as root, for example with sudo",
        )


def check_hosts(num_hosts: int) -> None:
    """Refuses more hosts than there are addresses."""
    if num_hosts > MOST_HOSTS:
        rule = f"{NETWORK} has {MOST_HOSTS} addresses for hosts"
        raise Refused("--hosts", num_hosts, rule, "use fewer")


@dataclasses.dataclass(frozen=True)
class Host:
    """One host of the box.

    Attributes:
      name: hostname inside, h0, h1, ...
      namespace: its network namespace.
      address: on eth0.
    """

    name: str
    namespace: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` on this host: its network, hostname and hosts file."""
        start = f'hostname {self.name}; exec "$@"'
        inside = ["unshare", "--uts", "sh", "-c", start, self.name, *words]
        return ["ip", "netns", "exec", self.namespace, *inside]


class Network:
    """Hosts joined by limited links; a context manager."""

    def __init__(self, num_hosts: int):
        check_machine()
        check_hosts(num_hosts)
        remove_leftovers()
        mine = f"{PREFIX}-{os.getpid()}"
        addresses = [str(address) for address in NETWORK.hosts()][:num_hosts]
        self.hosts = [Host(f"h{i}", f"{mine}-h{i}", a) for i, a in enumerate(addresses)]
        self._switch = f"{mine}-switch"
        names = [self._switch, *(host.namespace for host in self.hosts)]
        self._watchdog = subprocess.Popen(
            ["sh", "-c", _WATCH, "watchdog", *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for its parent
        )
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self._make(self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for host in self.hosts:
            self._make(host.namespace)
            ends = ("mtu", MTU, "name", "eth0", "netns", host.namespace, "type", "veth")
            peer = ("peer", "mtu", MTU, "name", host.name, "netns", self._switch)
            _ip("link", "add", *ends, *peer)
            _ip("-n", self._switch, "link", "set", host.name, "master", "bridge", "up")
            length = NETWORK.prefixlen
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/{length}", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")

    def _make(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        folder = NETNS_FILES / namespace
        folder.mkdir(parents=True, exist_ok=True)
        # Gloo binds the address that the hostname resolves to.
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self.hosts)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def limit(self, mbit: float) -> None:
        """Sets the rate of every link, in both directions, in 10^6 bits per second."""
        for end in self._ends():
            self._limit(end, mbit)

    def limit_sending(self, host: int, mbit: float) -> None:
        """Sets the rate at which one host sends, in 10^6 bits per second."""
        self._limit((self.hosts[host].namespace, "eth0"), mbit)

    def limit_receiving(self, host: int, mbit: float) -> None:
        """Sets the rate at which one host receives, in 10^6 bits per second."""
        self._limit((self._switch, self.hosts[host].name), mbit)

    def limit_link(self, source: int, destination: int, mbit: float, others: float) -> None:
        """Sets the rate from one host to another, in 10^6 bits per second.

        Args:
          source, destination: numbers of the hosts.
          mbit: between the two.
          others: of all that the source sends to other hosts, together.
        """
        namespace, to = self.hosts[source].namespace, self.hosts[destination].address
        of = ("tc", "-n", namespace)
        _run(*of, "qdisc", "replace", "dev", "eth0", "root", "handle", "1:", "htb", "default", "1")
        for name, rate in (("1:1", others), ("1:2", mbit)):
            shape = ("htb", "rate", f"{int(rate * 1e6)}bit", "burst", "64kb", "quantum", MTU)
            _run(*of, "class", "add", "dev", "eth0", "parent", "1:", "classid", name, *shape)
        chosen = ("u32", "match", "ip", "dst", f"{to}/32", "flowid", "1:2")
        _run(*of, "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip", *chosen)

    def _limit(self, end: tuple[str, str], mbit: float) -> None:
        namespace, device = end
        shape = ("tbf", "rate", f"{int(mbit * 1e6)}bit", "burst", "64kb", "latency", "50ms")
        _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape)

    def unlimit(self) -> None:
        """Lets the links run as fast as the machine does."""
        for namespace, device in self._ends():
            _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")

    def _ends(self) -> list[tuple[str, str]]:
        """(namespace, interface) of both ends of every cable."""
        ends = [(host.namespace, "eth0") for host in self.hosts]
        return ends + [(self._switch, host.name) for host in self.hosts]

    def close(self) -> None:
        """Kills what runs on the hosts and removes them."""
        if self._watchdog.stdin:
            self._watchdog.stdin.close()
        self._watchdog.wait()

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_leftovers() -> list[str]:
    """Removes the namespaces of processes that are no more; returns their names."""
    left = [name for name in namespaces() if not _alive(name)]
    if left:
        subprocess.run(["sh", "-c", _CLEAN, "clean", *left], check=False)
    return left


def namespaces() -> list[str]:
    """The namespaces of this program, whoever made them."""
    listed = _run("ip", "netns", "list").split("\n")
    names = {line.split()[0] for line in listed if line.strip()}
    if NETNS_FILES.is_dir():
        names |= {folder.name for folder in NETNS_FILES.iterdir()}
    return sorted(name for name in names if name.startswith(f"{PREFIX}-"))


def _alive(namespace: str) -> bool:
    """Is the process that made this namespace still there?"""
    pid = namespace.split("-")[1]
    return pathlib.Path("/proc", pid).is_dir()


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise Refused(
            "cluster in a box",
            " ".join(words),
            f"this command failed: {said}",
            "see that the kernel has network namespaces, veth, bridge, tbf, htb and u32",
        )
    return done.stdout
