"""Share the service out among its clients: so many requests work at a time, the clients in turn."""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A number of places. Who waits for one gets it in turn with the other clients."""

    def __init__(self, count: int, most: int) -> None:
        """most: places that one client may have, so that others need not wait for the rest."""
        self.count, self.most = count, most
        self.held = Counter[str]()  # places by client
        self.waiting: dict[str, deque[asyncio.Future]] = {}
        self.last: dict[str, int] = {}  # the number of each client's last turn
        self.numbers = itertools.count()

    @asynccontextmanager
    async def take(self, client: str) -> AsyncIterator[None]:
        """Hold a place during the block."""
        if client in self.waiting or not self._may_have(client):
            await self._wait(client)
        else:
            self._give(client)
        try:
            yield
        finally:
            self._give_back(client)

    @property
    def length(self) -> int:
        """How many wait."""
        return sum(len(turns) for turns in list(self.waiting.values()))

    def _may_have(self, client: str) -> bool:
        return self.held.total() < self.count and self.held[client] < self.most

    async def _wait(self, client: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:  # the client is gone, or its time is over
            if not turn.cancelled():  # the place had just come
                self._give_back(client)
            elif turn in self.waiting.get(client, ()):
                self._remove(client, turn)
                self._forget(client)
            raise

    def _remove(self, client: str, turn: asyncio.Future) -> None:
        self.waiting[client].remove(turn)
        if not self.waiting[client]:
            del self.waiting[client]

    def _give(self, client: str) -> None:
        self.held[client] += 1
        self.last[client] = next(self.numbers)

    def _give_back(self, client: str) -> None:
        self.held[client] -= 1
        if not self.held[client]:
            del self.held[client]
        self._call_next()
        self._forget(client)

    def _forget(self, client: str) -> None:
        """Forget a client that neither has a place nor waits for one."""
        if client not in self.held and client not in self.waiting:
            self.last.pop(client, None)

    def _call_next(self) -> None:
        """Give free places to clients that wait: to those that have fewest, then in turn."""
        while allowed := [client for client in self.waiting if self._may_have(client)]:
            client = min(allowed, key=lambda one: (self.held[one], self.last.get(one, -1)))
            turn = self.waiting[client][0]
            self._remove(client, turn)
            if not turn.done():
                self._give(client)
                turn.set_result(None)
