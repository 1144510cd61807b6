import asyncio
from pathlib import Path

import pytest
import zmq.asyncio

from engine.protocol.messages import FinishReason, GroupState, GroupStatus, Request, SamplingParams
from server.engine_client import EngineClient
from server.metrics import Metrics


async def client_of_a_rank_that_sends(payload: bytes, tmp_path: Path) -> tuple[str, FinishReason | None]:
    """Return why the link broke, and how the request in flight ended."""
    context, endpoint = zmq.asyncio.Context(), f"ipc://{tmp_path}/rank0"
    rank = context.socket(zmq.DEALER)
    rank.bind(endpoint)
    client = EngineClient(context, Metrics())
    client.connect(GroupStatus(epoch=1, state=GroupState.READY, engine_endpoint=endpoint))
    inbox = client.submit([Request("a", [1], SamplingParams(max_tokens=1))], arrival=0.0)
    await rank.recv()
    await rank.send(payload)
    reason = await asyncio.wait_for(client.until_broken(), 10)
    await client.close(reason)
    (output,) = await inbox.take()
    context.destroy(linger=0)
    return reason, output.finish_reason


@pytest.mark.parametrize("payload", [b"", b"\x63", b"\x01garbage"])
def test_a_rank_that_makes_no_sense_ends_every_request(payload: bytes, tmp_path: Path) -> None:
    reason, finish_reason = asyncio.run(client_of_a_rank_that_sends(payload, tmp_path))
    assert reason.startswith("the link to rank 0 broke: ")
    assert finish_reason is FinishReason.ERROR
