"""What --serve is asked to be, checked before a model is read."""

import dataclasses
import importlib.util
import pathlib
import socket

from moe_jax.errors import Refused


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the flags of infer.py."""

    host: str
    port: int
    context: int | None
    seats: int | None
    cache_tokens: int | None
    max_queue: int
    bearer_token_file: str | None
    record: str | None
    record_tokens: bool = False
    replan_tokens: int = 0
    replan_pause: float = 0.05
    replan_homes: bool = True
    replan_pins: str = ""

    def check(self, listens: bool = True) -> str:
        """Refuses what can be refused before a model is read; returns the bearer token.

        Args:
          listens: this process is the one of several that will.
        """
        for package in ("starlette", "uvicorn"):
            if importlib.util.find_spec(package) is None:
                fix = "install the extra: pip install 'moe_jax[serve]'"
                raise Refused("--serve", True, f"needs the package {package}", fix)
        if not 0 <= self.port < 65536:
            raise Refused("--port", self.port, "must lie in [0, 65535]", "use 8000")
        for flag in ("context", "seats", "cache_tokens"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise Refused(f"--{flag}", value, "must be at least 1", "leave it out")
        if self.max_queue < 0:
            raise Refused("--max_queue", self.max_queue, "must be at least 0", "use 1024")
        if self.replan_tokens < 0:
            rule = "must be at least 0 tokens; 0 = experts stay"
            raise Refused("--replan_tokens", self.replan_tokens, rule, "use 50000")
        if not 0 <= self.replan_pause < float("inf"):
            rule = "must be seconds, at least 0"
            raise Refused("--replan_pause", self.replan_pause, rule, "use 0.05")
        if listens:
            listen(self.host, self.port).close()
        if self.bearer_token_file is None or not listens:
            return ""
        flag, path = "--bearer_token_file", pathlib.Path(self.bearer_token_file)
        try:
            token = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(flag, str(path), f"must be readable ({error})", "correct it") from None
        if not token or not token.isprintable() or " " in token:
            raise Refused(flag, str(path), "must hold one word", "write a token into it")
        return token


def listen(host: str, port: int, send_seconds: float | None = None) -> socket.socket:
    """A socket that listens; refused where another server does.

    Args:
      send_seconds: until a client must have taken what is sent to it, or its connection ends;
        None = as long as the platform likes.
    """
    bound = None
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if send_seconds is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            # What was written waits in the kernel, where nobody above it counts its seconds.
            limit = max(1, round(send_seconds * 1000))
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        if bound is not None:
            bound.close()
        fix = "use another port, or end the server that has it"
        where = f"{host}:{port}"
        raise Refused("--host, --port", where, f"cannot be listened on ({error})", fix) from None
    return bound
