"""A scripted engine behind a real server: real sockets, the real protocol, and tokenizers made on the spot."""

import asyncio
import json
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import zmq.asyncio
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.protocol.channel import AsyncChannel
from engine.protocol.messages import (
    FinishReason,
    GroupState,
    GroupStatus,
    RankInfo,
    Request,
    RequestBatch,
    StatsReport,
    TokenBatch,
    TokenLogprobs,
    TokenOutput,
)
from engine.protocol.model_config import ModelConfig
from server.admission import AdmissionQueue
from server.app import create_app
from server.config import ServerConfig
from server.credentials import Credentials
from server.engine_client import EngineClient
from server.http_server import HTTPServer
from server.listener import listen
from server.logs import REQUEST_ID
from server.metrics.metrics import Metrics
from server.model_files import ModelFiles
from server.service import Service, TextModel
from server.streams import StreamStore

BOS, EOS = "<|bos|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog " * 3, "def main():\n    return 'hello world'\n", "0123456789"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "hello"}]
MAX_MODEL_LEN = 256
VOCAB_SIZE = 600  # more than the tokenizer has, as in padded checkpoints


def byte_level_tokenizer() -> Tokenizer:
    """As Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    frame = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[frame])
    return tokenizer


TOKENIZER = byte_level_tokenizer()


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 and Mistral have it: spaces are ▁, one is put before the text, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,!é", "▁t", "he", "▁the", "▁▁", "in", "ing"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("i", "n"), ("in", "g")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_model(directory: Path, tokenizer: Tokenizer | None = None, **generation: object) -> Path:
    """Write everything of a model but its weights."""
    tokenizer = tokenizer or byte_level_tokenizer()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_MODEL_LEN,
        "eos_token_id": tokenizer.token_to_id(EOS),
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    texts = {"bos_token": {"content": BOS}, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(texts))
    return directory


def scripted_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """What the scripted engine says of any token, wherever it is: the likeliest are the tokens 0, 1 and so on."""
    top = list(range(num_top))
    return TokenLogprobs(token_id, -token_id / 64, token_id + 1, top, [-index / 64 for index in top])


@dataclass
class _Sequence:
    request: Request
    token_ids: list[int]  # what follows the prompt, over and over
    emitted: int = 0
    has_scored: bool = False

    def next(self, fails_after: int | None) -> TokenOutput:
        request_id, sampling = self.request.request_id, self.request.sampling
        if fails_after is not None and self.emitted >= fails_after:
            return TokenOutput(request_id, [], FinishReason.ERROR, "scripted failure")
        if sampling.prompt_logprobs is not None and not self.has_scored:
            self.has_scored = True  # the prompt's first half comes before any token
            return TokenOutput(request_id, [], prompt_logprobs=self._scores()[: len(self._scores()) // 2])
        token = self.token_ids[self.emitted % len(self.token_ids)]
        is_first = self.emitted == 0
        self.emitted += 1
        return TokenOutput(
            request_id,
            [token],
            self._reason(token),
            logprobs=[] if sampling.logprobs is None else [scripted_logprobs(token, sampling.logprobs)],
            prompt_logprobs=self._scores()[len(self._scores()) // 2 :] if is_first else [],
            queue_seconds=0.001 if is_first else None,
            num_cached_tokens=len(self.request.prompt_token_ids) // 2 if is_first else None,
        )

    def _scores(self) -> list[TokenLogprobs]:
        num_top = self.request.sampling.prompt_logprobs
        if num_top is None:
            return []
        return [scripted_logprobs(token, num_top) for token in self.request.prompt_token_ids[1:]]

    def _reason(self, token: int) -> FinishReason | None:
        sampling = self.request.sampling
        if token in sampling.stop_token_ids and self.emitted > sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.emitted == sampling.max_tokens else None


class ScriptedEngine:
    """Rank 0 as far as the server can see. Continues each prompt by what `script` says, a token a step."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.script: Callable[[Request], str] = lambda request: f"choice {request.sampling.choice_index}"
        self.step_seconds = 0.0
        self.num_steps = 0
        self.is_paused = False  # takes requests and emits nothing
        self.fails_after: int | None = None  # tokens
        self.holds_after: int | None = None  # tokens of a sequence: no more of it comes
        self.batches: list[RequestBatch] = []
        self.aborted_at: list[int] = []  # steps
        self._tokenizer = tokenizer
        eos = tokenizer.token_to_id(EOS)
        assert eos is not None
        self._eos = eos
        self._running: dict[str, _Sequence] = {}

    @property
    def requests(self) -> list[Request]:
        return [request for batch in self.batches for request in batch.new]

    @property
    def aborted(self) -> list[str]:
        return [request_id for batch in self.batches for request_id in batch.aborted]

    async def run(self, channel: AsyncChannel) -> None:
        """Serve until cancelled."""
        stepping = asyncio.create_task(self._step(channel))
        try:
            while True:
                batch = await channel.receive()
                assert isinstance(batch, RequestBatch)
                self._take(batch)
        finally:
            stepping.cancel()

    def _take(self, batch: RequestBatch) -> None:
        self.batches.append(batch)
        for request in batch.new:
            ids = self._tokenizer.encode(self.script(request), add_special_tokens=False).ids
            sequence = _Sequence(request, [*ids, self._eos], len(request.received_token_ids))
            sequence.has_scored = request.num_received_prompt_logprobs > 0
            self._running[request.request_id] = sequence
        for request_id in batch.aborted:
            self._running.pop(request_id, None)
            self.aborted_at.append(self.num_steps)

    async def _step(self, channel: AsyncChannel) -> None:
        while True:
            await asyncio.sleep(self.step_seconds or 0.001)
            outputs = [sequence.next(self.fails_after) for sequence in self._running.values() if self._is_due(sequence)]
            for output in outputs:
                if output.finish_reason is not None:
                    del self._running[output.request_id]
            if outputs:
                await channel.send(TokenBatch(epoch=1, step=self.num_steps, outputs=outputs))
            self.num_steps += 1

    def _is_due(self, sequence: _Sequence) -> bool:
        return not self.is_paused and (self.holds_after is None or sequence.emitted < self.holds_after)


class ServerLog(logging.Handler):
    """Keeps each line of the server's own loggers, with the request id that it was written under."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(("ryzanstein", "server", "uvicorn")):
            self.lines.append((REQUEST_ID.get(), self.format(record)))

    def wait_for(self, words: str) -> tuple[str, str]:
        """Return the first line that contains `words`: it may be written after the client has its answer."""
        assert wait_until(lambda: any(words in line for _, line in self.lines)), self.lines
        return next((request_id, line) for request_id, line in self.lines if words in line)


class RunningServer:
    """The server in a thread, with its scripted engine."""

    def __init__(self, model: Path, *, ready: bool, config: ServerConfig, max_num_seqs: int) -> None:
        self.engine = ScriptedEngine(Tokenizer.from_file(str(model / "tokenizer.json")))
        self._model = model
        self._ready = ready
        self._max_num_seqs = max_num_seqs
        self._config = replace(config, served_model_name="scripted")
        self._credentials = Credentials.load(config)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._listener = listen("127.0.0.1", 0)
        scheme = "http" if self._credentials.tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(30)

    def stop(self) -> None:
        self.call(self._http.stop)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def call(self, action: Callable[[], None]) -> None:
        """Run `action` in the server's loop."""
        self.loop.call_soon_threadsafe(action)

    def fail(self, reason: str) -> None:
        """End everything in flight as the loss of the engine does."""
        asyncio.run_coroutine_threadsafe(self.queue.close(reason), self.loop).result(10)

    def drain(self) -> None:
        """Refuse new requests, as a stop signal does."""
        self.call(self.service.drain.begin)
        self.call(self._http.close_when_idle)

    def send(self, report: StatsReport) -> None:
        """Have the engine send statistics."""
        asyncio.run_coroutine_threadsafe(self._channel.send(report), self.loop).result(10)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        context = zmq.asyncio.Context()
        name = self._config.model_name(str(self._model))
        metrics = Metrics(name, keys=self._credentials.names, vllm_names=self._config.vllm_metric_names)
        self.client = EngineClient(context, metrics)
        self.queue = AdmissionQueue(self.client, metrics, self._config, self._max_num_seqs)
        files = ModelFiles.read(str(self._model))
        text_model = TextModel.load(files, self._config, ModelConfig.from_directory(self._model))
        streams = StreamStore(self._config.stream_resume_timeout, self._config.stream_resume_memory, metrics)
        self.service = Service(text_model, self.queue, metrics, self._config, streams)
        app = create_app(self.service, self._config, self._credentials)
        self._http = HTTPServer(app, self._config, self._credentials, self.service.drain, metrics.slow_clients.inc)
        with tempfile.TemporaryDirectory(prefix="ryzanstein-test-", dir="/tmp") as folder:
            self._channel = AsyncChannel(context, 1, RequestBatch)
            endpoint = self._channel.bind(f"ipc://{folder}/engine")
            running = asyncio.create_task(self.engine.run(self._channel))
            if self._ready:
                self.client.connect(ready_status(endpoint))
            self.loop.call_soon(self._started.set)
            await self._http.serve([self._listener])
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await self.queue.close("stopped")
            self._channel.close()
            context.destroy(linger=0)


def ready_status(endpoint: str) -> GroupStatus:
    return GroupStatus(
        epoch=1,
        state=GroupState.READY,
        ranks=[RankInfo(0, 4711, "here", "cpu")],
        engine_endpoint=endpoint,
        max_model_len=MAX_MODEL_LEN,
        num_kv_blocks=64,
    )


@contextmanager
def running_server(
    model: Path, *, ready: bool = True, max_num_seqs: int = 64, **options: Any
) -> Iterator[RunningServer]:
    server = RunningServer(model, ready=ready, config=ServerConfig(**options), max_num_seqs=max_num_seqs)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def post(server: RunningServer, path: str, body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=30)


def events(response: httpx.Response) -> list[str]:
    """Return the data of a stream's events, which are numbered."""
    assert response.headers["content-type"].startswith("text/event-stream")
    numbered = [event.split("\n") for event in response.text.split("\n\n") if event]
    assert [number for number, _ in numbered] == [f"id: {number + 1}" for number in range(len(numbered))]
    return [data.removeprefix("data: ") for _, data in numbered]


def body_of(base: dict[str, Any], changed: dict[str, Any]) -> bytes:
    return json.dumps({**base, **changed}).encode()  # unlike httpx's own encoding this one writes NaN


def refusal(server: RunningServer, path: str, body: bytes, status: int = 400) -> dict[str, Any]:
    response = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=30)
    assert response.status_code == status
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert sorted(error) == ["code", "message", "param", "type"]
    assert server.engine.requests == []
    return error


def wait_until(condition: Callable[[], bool], timeout: float = 30.0) -> bool:
    """Return whether `condition` came to hold in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def raw_exchange(server: RunningServer, sent: bytes) -> bytes:
    """Send bytes over one connection; return what comes until the server closes it."""
    host, port = server.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        while piece := connection.recv(65536):
            received += piece
    return received
