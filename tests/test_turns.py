"""The service is shared out among its clients."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from conftest import ROOT
from test_serve import Running, write_keys

from dataset.phantoms import draw_phantom
from serving.turns import Turns


class Visit:
    """A request of a client that stays until it is told to go."""

    def __init__(self, turns: Turns, client: str) -> None:
        self.is_in, self.leave = False, asyncio.Event()
        self.task = asyncio.create_task(self._run(turns, client))

    async def _run(self, turns: Turns, client: str) -> None:
        async with turns.take(client):
            self.is_in = True
            await self.leave.wait()

    async def end(self) -> None:
        self.leave.set()
        await self.task


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def visit(turns: Turns, clients: str) -> list[Visit]:
    visits = [Visit(turns, client) for client in clients]
    await settle()
    return visits


def who_is_in(clients: str, visits: list[Visit]) -> str:
    return "".join(client for client, one in zip(clients, visits, strict=True) if one.is_in)


def run(scenario) -> None:
    asyncio.run(scenario)


def test_one_client_leaves_a_place_free():
    async def scenario():
        turns = Turns(3, 2)
        visits = await visit(turns, "aaaab")
        assert who_is_in("aaaab", visits) == "aab" and turns.length == 2
        await visits[4].end()
        await settle()
        assert not visits[2].is_in  # the last place is for others
        await visits[0].end()
        await settle()
        assert visits[2].is_in

    run(scenario())


def test_clients_come_in_turn_whoever_has_more_waiting():
    async def scenario():
        turns = Turns(2, 1)
        first = await visit(turns, "xy")
        waiting = await visit(turns, "aaab")
        await first[0].end()
        await settle()
        assert who_is_in("aaab", waiting) == "a"
        await first[1].end()
        await settle()
        assert who_is_in("aaab", waiting) == "ab"  # a already has one
        await waiting[0].end()
        await settle()
        assert waiting[1].is_in and not waiting[2].is_in

    run(scenario())


def test_a_single_place_goes_round():
    async def scenario():
        turns, order = Turns(1, 1), []

        async def ask(client):
            async with turns.take(client):
                order.append(client)
                await asyncio.sleep(0)

        await asyncio.gather(*(ask(client) for client in "aaabbc"))
        assert order == list("abcaba")

    run(scenario())


@pytest.mark.parametrize("is_called", [False, True])
def test_who_goes_away_while_it_waits_takes_no_place(is_called):
    async def scenario():
        turns = Turns(1, 1)
        (first,) = await visit(turns, "a")
        gone, last = await visit(turns, "bc")
        if is_called:  # its place comes at the moment in which it goes
            first.leave.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        gone.task.cancel()
        await first.end()
        await settle()
        assert last.is_in and gone.task.done()
        await last.end()
        assert not (turns.held or turns.waiting or turns.last)

    run(scenario())


@pytest.mark.slow
def test_a_greedy_client_does_not_keep_another_waiting(tmp_path):
    """One sends 40 images at once; the other's single image does not wait for all of them."""
    keys = write_keys(tmp_path / "keys", greedy="greedy", other="other")
    service = Running(ROOT / "files" / "lungs", tmp_path, "--keys", keys)
    png = cv2.imencode(".png", draw_phantom(np.random.default_rng(0))[0])[1].tobytes()

    def ask(key: str) -> int:
        headers = {"X-API-Key": key}
        return service.client.post("/v1/segment", content=png, headers=headers).status_code

    try:
        assert ask("other") == 200  # the model is loaded
        with ThreadPoolExecutor(41) as pool:
            greedy = [pool.submit(ask, "greedy") for _ in range(40)]
            while not any(one.done() for one in greedy):
                time.sleep(0.001)
            assert ask("other") == 200
            assert sum(one.done() for one in greedy) < 30
            assert {one.result() for one in greedy} == {200}
    finally:
        service.stop()
