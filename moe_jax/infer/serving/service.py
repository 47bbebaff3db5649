"""A thread that runs an engine: requests, cancellations and calls reach it between steps.

What waits for the engine waits in an inbox, so nobody waits for a step to end but the engine's own
thread. Nothing is lost: what was accepted is answered, with a last part that says how it ended,
even where the engine itself fails.
"""

import concurrent.futures
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.errors import Refused
from moe_jax.infer.serving.broadcast import BEAT_SECONDS, END
from moe_jax.infer.serving.engine import Engine, Request
from moe_jax.infer.serving.placing import Placing
from moe_jax.infer.serving.request import Deliver, Options, Part

IDLE_SECONDS = 0.05  # between looks at what goes on without requests


class Unavailable(Exception):
    """Nothing is wrong with a request, but it is not taken now.

    Attributes:
      status: of HTTP: 429 = the queue is full, 503 = no more requests are taken.
      refused: why, for people.
    """

    def __init__(self, status: int, refused: Refused):
        super().__init__(str(refused))
        self.status, self.refused = status, refused


class Ticket:
    """A request on its way to, through and out of the engine."""

    def __init__(self, deliver: Deliver):
        self.deliver = deliver
        self.request: Request | None = None
        self.wanted = True


class Service:
    """Args:
    engine: from now on only this object calls it.
    max_queue: requests that wait, beyond those for which there are seats.
    placing: moves the experts of this engine between its steps; None = they stay.
    """

    def __init__(self, engine: Engine, max_queue: int = 1024, placing: Placing | None = None):
        self._engine, self._max_queue, self.placing = engine, max_queue, placing
        self._inbox: list[Callable[[], Any]] = []
        self._tickets: set[Ticket] = set()
        self._changed = threading.Condition()
        self._draining = self._stopped = self._over = False
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Requests that were taken and are not answered to the end."""
        return len(self._tickets)

    @property
    def draining(self) -> bool:
        return self._draining

    def check(self, prompt: Sequence[int], options: Options) -> None:
        """Raises `Refused` for a request that could never be answered."""
        self._engine.check(prompt, options)

    def submit(self, prompt: Sequence[int], options: Options, deliver: Deliver) -> Ticket:
        """Takes a request; `deliver` is called from the engine's thread.

        Raises:
          Refused: it could never be answered.
          Unavailable: not now.
        """
        self.check(prompt, options)
        ticket = Ticket(deliver)
        with self._changed:
            self._check_open(1)
            self._tickets.add(ticket)
            self._put(lambda: self._admit(ticket, prompt, options))
        return ticket

    def check_open(self, count: int = 1) -> None:
        """Raises `Unavailable` where so many requests would not be taken now, `Refused` where they
        never would, all at once."""
        with self._changed:
            self._check_open(count)

    def _check_open(self, count: int) -> None:
        if self.failure:
            why = Refused("server", "failed", "the engine has stopped", "see the server's log")
            raise Unavailable(503, why)
        if self._draining:
            why = Refused("server", "draining", "no more requests are taken", "ask another server")
            raise Unavailable(503, why)
        room = self._engine.limits.seats * self._engine.limits.shards + self._max_queue
        if count > room:
            rule = f"must be at most {room} answers at once, the seats and the queue of this server"
            raise Refused("n", count, f"prompts x n {rule}", "send several requests")
        if len(self._tickets) + count > room:
            rule = f"at most {self._max_queue} requests wait"
            raise Unavailable(429, Refused("queue", "full", rule, "try again later"))

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants this answer any more."""
        with self._changed:
            ticket.wanted = False
            self._put(lambda: self._drop(ticket))

    def call(self, function: Callable[[Engine], Any]) -> concurrent.futures.Future[Any]:
        """Runs `function(engine)` between two steps."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # who asked has gone
            if self._over:
                future.set_exception(RuntimeError("the engine has stopped"))
                return
            try:
                future.set_result(function(self._engine))
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if self._stopped:
                future.set_exception(RuntimeError("the engine has stopped"))
            else:
                self._put(run)
        return future

    def drain(self) -> None:
        """No more requests are taken; those that were are answered.

        Called here, too, where another process of the server was asked to end.
        """
        with self._changed:
            self._draining = True

    def stop(self) -> None:
        """Cancels what is left and ends the thread."""
        with self._changed:
            self._draining = self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    # --- on the engine's thread -----------------------------------------------------------

    def _put(self, what: Callable[[], Any]) -> None:
        self._inbox.append(what)
        self._changed.notify_all()

    def _run(self) -> None:
        taken: list[Callable[[], Any]] = []
        others = self._engine.runner.broadcast
        pause, beaten = None if others.is_alone else BEAT_SECONDS, time.monotonic()
        try:
            while not self._stopped:
                with self._changed:
                    if not (self._inbox or self._engine.busy or self._stopped):
                        self._changed.wait(IDLE_SECONDS if self._works else pause)
                    taken, self._inbox = self._inbox, []
                while taken:
                    taken.pop(0)()
                if pause and time.monotonic() >= beaten + pause:
                    beaten = time.monotonic()
                    if others.beat():
                        self.drain()
                if (self._engine.step() or self._works) and self.placing:
                    self.placing.between_steps()
            others.tell(END)
        except BaseException:
            self.failure = traceback.format_exc()
        finally:
            if self.placing:
                self.placing.close()
            with self._changed:
                self._stopped = self._over = True
                left, taken = list(self._tickets), taken + self._inbox
                self._tickets.clear()
            for ticket in left:
                finish = "failed" if self.failure else "cancelled"
                ticket.deliver(Part(None, "", None, finish))
            for what in taken:  # calls that somebody waits for
                what()

    @property
    def _works(self) -> bool:
        return self.placing is not None and self.placing.works

    def _admit(self, ticket: Ticket, prompt: Sequence[int], options: Options) -> None:
        def deliver(part: Part) -> None:
            if part.finish:
                self._tickets.discard(ticket)
            ticket.deliver(part)

        if ticket in self._tickets:
            try:
                ticket.request = self._engine.submit(prompt, options, deliver)
            except Exception:  # a bug: it costs this request, not those that run
                traceback.print_exc()
                deliver(Part(None, "", None, "failed"))
                return
            if not ticket.wanted:  # it was called off on its way here
                self._engine.cancel(ticket.request)

    def _drop(self, ticket: Ticket) -> None:
        if ticket.request is not None and not self.failure:
            self._engine.cancel(ticket.request)
