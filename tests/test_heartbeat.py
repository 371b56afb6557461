"""Section 11, Server: timed heartbeats."""

from collections.abc import Callable

import pytest
from endpoint import Endpoint, Reply
from wire import is_terminal, of_kind, wire

import memws

pytestmark = pytest.mark.anyio


def host_of(server: memws.WebSocketServer) -> memws.AgentHost:
    """The agent sam's place in the server."""
    assert server._hub is not None
    return server._hub._hosts["sam"]


async def test_timed_heartbeats(
    serve: Callable[..., memws.WebSocketServer], endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent with an interval wakes by itself, for subscribers only, and rests after IDLE_HEARTBEATS of them."""
    monkeypatch.setattr(memws, "MIN_HEARTBEAT_INTERVAL", 1)
    monkeypatch.setattr(memws, "IDLE_HEARTBEATS", 1)
    server = serve(base_url=endpoint.url, model="test-model")
    endpoint.default = Reply(text="nothing to do")
    async with wire(server, "*") as owner, wire(server, "*") as watcher:
        await owner.ok("create_agent", config={"name": "sam", "heartbeat_interval": 1})
        await watcher.ok("subscribe", agent_name="sam")
        frames = await watcher.until(is_terminal)
        assert [event["reason"] for event in of_kind(frames, "heartbeat")] == [memws.HEARTBEAT_TIMER]
        assert frames[-1]["stop_reason"] == "done"
        assert not of_kind(frames, "assistant_message"), "nobody waits for a reply"
        await owner.nothing_more()
        host = host_of(server)
        assert host._timer is None, "it rests until a user speaks"
        await owner.turn("hello")
        assert host._timer is not None


async def test_paused_heartbeats_wait(
    serve: Callable[..., memws.WebSocketServer], endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pause_heartbeats puts the next timed heartbeat off."""
    monkeypatch.setattr(memws, "MIN_HEARTBEAT_INTERVAL", 1)
    server = serve(base_url=endpoint.url, model="test-model")
    endpoint.script(Reply(calls=[("pause_heartbeats", {"minutes": 5}), ("send_message", {"message": "good night"})]))
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={"name": "sam", "heartbeat_interval": 1})
        await client.turn("good night")
        host = host_of(server)
        assert host._timer is not None
        assert server._loop is not None
        assert host._timer.when() - server._loop.time() > 200, "seconds until the next one"
