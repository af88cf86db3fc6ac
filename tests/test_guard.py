"""The guard in front of the service, without a network behind it."""

import asyncio

from serving.middleware import Guard
from serving.monitoring import Metrics


async def start(guard: Guard, address: str) -> tuple[asyncio.Task, list[dict]]:
    """Send a request from an address; return it and what it is answered."""
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": (address, 1)}
    task = asyncio.create_task(guard(scope, receive, send))
    await asyncio.sleep(0)
    return task, sent


def test_one_client_leaves_a_quarter_of_the_requests_to_others():
    async def scenario() -> None:
        end = asyncio.Event()

        async def app(scope: dict, receive, send) -> None:
            await end.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        guard = Guard(app, Metrics(), None, (), None, 100, 8, 10)
        started = [await start(guard, address) for address in "aaaaaaabbb"]
        refused = [number for number, (task, _) in enumerate(started) if task.done()]
        assert refused == [6, 9]  # a's seventh, and b's third: then there are eight
        assert started[6][1][0]["status"] == 503
        end.set()
        await asyncio.gather(*(task for task, _ in started))
        assert [sent[0]["status"] for _, sent in started].count(200) == 8
        assert not guard.running

    asyncio.run(scenario())
