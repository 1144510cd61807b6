import asyncio
import time
from pathlib import Path

import zmq.asyncio

from engine.protocol.channel import AsyncChannel
from engine.protocol.messages import FinishReason, RequestBatch, SamplingParams, TokenBatch, TokenOutput
from server.admission import AdmissionQueue
from server.api_keys import ANONYMOUS
from server.choice import TextOptions
from server.engine_client import EngineClient
from server.errors import APIError
from server.generation import Generation, GenerationPlan
from server.limits import QueueLimits
from server.metrics.metrics import Metrics
from server.text.tokenizer import Tokenizer
from tests.unit.server_support import byte_level_tokenizer, ready_status


async def texts_before_an_error(tokenizer: Tokenizer, folder: Path) -> tuple[list[str], str]:
    """Return the texts of a request whose tokens arrive together with its error, and that error."""
    context = zmq.asyncio.Context()
    rank = AsyncChannel(context, 1, RequestBatch)
    metrics = Metrics()
    client = EngineClient(context, metrics)
    queue = AdmissionQueue(client, metrics, QueueLimits(), 8)
    client.connect(ready_status(rank.bind(f"ipc://{folder}/engine")))
    sampling, arrival = SamplingParams(max_tokens=9), time.perf_counter()
    plan = GenerationPlan("r", [[5]], sampling, 2, 2, TextOptions(), arrival, key=ANONYMOUS, deadline=None)
    texts: list[str] = []
    message = ""
    ids = tokenizer.encode("abc", add_special_tokens=False)
    failure = TokenOutput("r-0", [], FinishReason.ERROR, "scripted failure")
    outputs = [TokenOutput("r-0", ids), TokenOutput("r-1", ids), failure]

    async def answer() -> None:
        await rank.receive()
        await rank.send(TokenBatch(epoch=1, step=0, outputs=outputs))

    answering = asyncio.create_task(answer())
    generation = Generation(queue, tokenizer.token_bytes, plan)
    generation.submit()
    try:
        while not generation.has_ended:
            texts += [delta.text for delta in await generation.next()]
    except APIError as error:
        message = error.message
    await answering
    await client.close("done")
    rank.close()
    context.destroy(linger=0)
    return texts, message


def test_text_that_arrives_with_an_error_comes_before_it(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    result = asyncio.run(asyncio.wait_for(texts_before_an_error(Tokenizer(tmp_path), tmp_path), 10))
    assert result == (["abc", "abc"], "scripted failure")
