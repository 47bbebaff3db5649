"""--distributed as it is typed. JAX is not imported: what is wrong is said at once."""

from moe_jax.errors import Refused


def parse(text: str) -> tuple[str, int, int] | None:
    """(address, processes, own number) of "HOST:PORT,NUM_PROCESSES,PROCESS_ID"; None for words.

    Raises `Refused`, naming --distributed.
    """
    if text in ("off", "auto"):
        return None
    address, _, numbers = text.partition(",")
    count, _, number = numbers.partition(",")
    whole = count.isdecimal() and number.isdecimal() and 0 <= int(number) < int(count)
    if not whole or not address.rpartition(":")[2].isdecimal():
        raise Refused(
            "--distributed",
            text,
            "must be 'off', 'auto' or 'HOST:PORT,NUM_PROCESSES,PROCESS_ID', the last from 0",
            "for two processes on this machine: localhost:12345,2,0 and localhost:12345,2,1",
        )
    return address, int(count), int(number)
