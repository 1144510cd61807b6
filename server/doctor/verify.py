"""`--verify`: real rank groups, split and unsplit, one after the other, must say the same on this machine."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from random import Random
from typing import Self

import zmq

from engine.protocol.channel import Channel
from engine.protocol.checks import Check, Finding, MissingBasisError, failure, ok, skipped, warning
from engine.protocol.config import EngineConfig
from engine.protocol.messages import (
    GroupState,
    GroupStatus,
    Request,
    RequestBatch,
    SamplingParams,
    StatsReport,
    TokenBatch,
    TokenLogprobs,
    TokenOutput,
)
from engine.protocol.model_config import ModelConfig
from server.early_engine import ORCHESTRATOR
from server.launch import EngineProcess
from server.signals import stop_signals_delayed

SECTION = "verify"
PROMPT_LENGTHS = (1, 2, 5, 16, 17, 40, 64, 100)  # below, at and above a block's
NEW_TOKENS = 32
LOGPROBS = 5  # that each token is reported with: near-ties of more than two are rare
SHOWN_DIFFERENCES = 3
START_SECONDS = 900.0  # for one group to load: a large model from a slow disk takes minutes
OUTPUT_SECONDS = 300.0  # from one step's tokens to the next
POLL_SECONDS = 0.5
# The most by which log-probabilities may differ, and the two tokens at a near-tie: sums of rounded numbers depend on
# the order in which they are added.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}


@dataclass
class Transcript:
    """What one group said to one prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class Comparison:
    """Two groups' transcripts, side by side. After a prompt's first difference its tokens are not comparable."""

    num_tokens: int = 0
    near_ties: int = 0
    differences: list[str] = field(default_factory=list)
    largest_gap: float = 0.0  # between two log-probabilities of the same token


class _Subject:
    """The configuration, and what its groups said."""

    def __init__(self, engine: EngineConfig, command: Sequence[str]) -> None:
        self.engine = engine
        self.command = command
        self.prompts: list[list[int]] = []
        self.transcripts: dict[int, list[Transcript]] = {}  # by number of ranks

    def model_config(self) -> ModelConfig:
        try:
            return ModelConfig.from_directory(self.engine.model)
        except ValueError as error:
            raise MissingBasisError("a usable config.json") from error

    def said(self, tp_size: int) -> list[Transcript]:
        if tp_size not in self.transcripts:
            raise MissingBasisError("what both groups say")
        return self.transcripts[tp_size]

    def is_served(self, tp_size: int) -> bool:
        return tp_size == self.engine.tensor_parallel_size

    @property
    def tolerance(self) -> float:
        dtype = self.model_config().dtype if self.engine.dtype == "auto" else self.engine.dtype
        return TOLERANCES[dtype]


def checks(engine: EngineConfig, command: Sequence[str] = ORCHESTRATOR) -> list[Check]:
    """Return the checks: the model on as many ranks as asked for, or on 2 if that is 1, and on one.

    Args:
        engine: what would be served.
        command: starts the orchestrator of a group.
    """
    subject = _Subject(engine, command)
    tp_size = max(2, engine.tensor_parallel_size)
    return [
        Check(SECTION, f"{tp_size} ranks", lambda: _split(subject, tp_size)),
        Check(SECTION, "1 rank", lambda: _unsplit(subject, tp_size)),
        Check(SECTION, "same tokens", lambda: _same_tokens(subject, tp_size)),
        Check(SECTION, "same logprobs", lambda: _same_logprobs(subject, tp_size)),
    ]


def _split(subject: _Subject, tp_size: int) -> Finding:
    """Run the split model. Where it is the one that is served, its failure is serving's."""
    config = subject.model_config()
    try:
        config.check_tensor_parallel_size(tp_size)
    except ValueError:
        if subject.is_served(tp_size):
            raise
        return skipped(f"the model does not split over {tp_size} ranks: there is nothing to compare")
    if subject.is_served(tp_size):
        return _run(subject, tp_size)
    return _run_to_compare(subject, tp_size, f"verify where {tp_size} ranks can run")


def _unsplit(subject: _Subject, tp_size: int) -> Finding:
    """Run the model on one rank. Where it is the one that is served, its failure is serving's, and it always runs."""
    if subject.is_served(1):
        return _run(subject, 1)
    subject.said(tp_size)
    return _run_to_compare(subject, 1, "verify where one rank can hold the model")


def _run_to_compare(subject: _Subject, tp_size: int, hint: str) -> Finding:
    """Run a group that is not the one to serve: if it fails, serving does not."""
    try:
        return _run(subject, tp_size)
    except ValueError as error:
        return warning(f"{error}; so there is nothing to compare with", hint)


def _run(subject: _Subject, tp_size: int) -> Finding:
    """Run one group on the prompts and keep what it says.

    Raises:
        ValueError: if it fails or falls silent.
    """
    began = time.monotonic()
    with _Group(replace(subject.engine, tensor_parallel_size=tp_size), subject.command) as group:
        started = time.monotonic()
        if not subject.prompts:
            subject.prompts = prompts(subject.model_config().vocab_size, group.status.max_model_len)
        new_tokens = max(1, min(NEW_TOKENS, group.status.max_model_len - max(map(len, subject.prompts))))
        subject.transcripts[tp_size] = said = group.generate(subject.prompts, new_tokens)
    count = sum(len(transcript.token_ids) for transcript in said)
    return ok(
        f"started in {started - began:.1f} s, answered {len(said)} prompts with {count} tokens in "
        f"{time.monotonic() - started:.1f} s"
    )


def prompts(vocab_size: int, max_model_len: int) -> list[list[int]]:
    """Return the same token ids each time, none longer than leaves room for an answer."""
    draw = Random(0)
    longest = max(1, max_model_len - NEW_TOKENS)
    lengths = sorted({min(length, longest) for length in PROMPT_LENGTHS})
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


def _same_tokens(subject: _Subject, tp_size: int) -> Finding:
    found = compare(subject.said(1), subject.said(tp_size), subject.tolerance)
    counted = f"{found.num_tokens} tokens compared, {found.near_ties} near-tie(s) told otherwise"
    if found.differences:
        more = ["…"] if len(found.differences) > SHOWN_DIFFERENCES else []
        return failure("; ".join([counted, *found.differences[:SHOWN_DIFFERENCES], *more]))
    return ok(counted)


def _same_logprobs(subject: _Subject, tp_size: int) -> Finding:
    found = compare(subject.said(1), subject.said(tp_size), subject.tolerance)
    detail = f"largest difference {found.largest_gap:.2g}, {subject.tolerance:g} allowed"
    return ok(detail) if found.largest_gap <= subject.tolerance else failure(detail)


def compare(one: list[Transcript], other: list[Transcript], tolerance: float) -> Comparison:
    """Compare token by token; where tokens differ, both must have been nearer than `tolerance` to `one`."""
    found = Comparison()
    for prompt, (a, b) in enumerate(zip(one, other, strict=True)):
        for position, (mine, theirs) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            found.num_tokens += 1
            found.largest_gap = max(found.largest_gap, *_gaps(mine, theirs))
            if mine.token_id == theirs.token_id:
                continue
            gap = mine.logprob - _likeliest(mine).get(theirs.token_id, -math.inf)
            if abs(gap) < tolerance:
                found.near_ties += 1
            else:
                found.differences.append(
                    f"prompt {prompt}, token {position}: {mine.token_id} unsplit, {theirs.token_id} split, "
                    + (f"{gap:.2g} apart" if math.isfinite(gap) else f"which is not among the {LOGPROBS} likeliest")
                )
            break
    return found


def _gaps(mine: TokenLogprobs, theirs: TokenLogprobs) -> Iterator[float]:
    """Yield how far the log-probabilities of each token that both report are apart, without end if one is no number.

    A chosen token that the other does not report is, for the other, at most as likely as the last one that it does.
    """
    of_mine, of_theirs = _likeliest(mine), _likeliest(theirs)
    if not all(map(math.isfinite, (*of_mine.values(), *of_theirs.values()))):
        yield math.inf
    for token_id in of_mine.keys() & of_theirs.keys():
        yield abs(of_mine[token_id] - of_theirs[token_id])
    for chosen, of_other in ((mine, of_theirs), (theirs, of_mine)):
        if chosen.token_id not in of_other:
            yield chosen.logprob - min(of_other.values())


def _likeliest(reported: TokenLogprobs) -> dict[int, float]:
    """Return the log-probabilities that are reported, by token."""
    top = zip(reported.top_token_ids, reported.top_logprobs, strict=True)
    return {**dict(top), reported.token_id: reported.logprob}


class _Group:
    """A rank group under its orchestrator, as the service starts it. Use it as a context manager.

    Raises:
        ValueError: in its own words, if it fails, and if it falls silent.
    """

    def __init__(self, engine: EngineConfig, command: Sequence[str]) -> None:
        self._engine = engine
        self._command = command
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stack.callback(context.destroy, linger=0)
            with stop_signals_delayed():
                process = EngineProcess(self._engine, self._command)
                stack.callback(process.stop)
            self._states = Channel(context, None, GroupStatus)
            self._states.bind(process.spec.status_endpoint)
            self.status = self._wait_until_ready()
            self._tokens = Channel(context, self.status.epoch, TokenBatch, StatsReport)
            self._tokens.connect(self.status.engine_endpoint)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wait_until_ready(self) -> GroupStatus:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            status = self._next_status(POLL_SECONDS)
            if status is not None and status.state is GroupState.READY:
                return status
        raise ValueError(f"the ranks were not ready after {START_SECONDS:.0f} s")

    def _next_status(self, timeout: float) -> GroupStatus | None:
        status = self._states.receive(timeout)
        assert status is None or isinstance(status, GroupStatus)
        if status is not None and status.state is GroupState.FAILED:
            raise ValueError(status.error)
        if status is not None and status.recovery is not None:
            raise ValueError(status.recovery.cause)
        return status

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[Transcript]:
        """Return what is said greedily to each prompt."""
        sampling = SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens, temperature=0.0, logprobs=LOGPROBS)
        requests = [Request(str(index), prompt, sampling) for index, prompt in enumerate(prompts)]
        self._tokens.send(RequestBatch(self.status.epoch, requests))
        transcripts = [Transcript() for _ in requests]
        unfinished = len(requests)
        while unfinished:
            for output in self._next_outputs():
                if output.error is not None:
                    raise ValueError(output.error)
                transcript = transcripts[int(output.request_id)]
                transcript.token_ids += output.token_ids
                transcript.logprobs += output.logprobs
                unfinished -= output.finish_reason is not None
        return transcripts

    def _next_outputs(self) -> list[TokenOutput]:
        deadline = time.monotonic() + OUTPUT_SECONDS
        while time.monotonic() < deadline:
            message = self._tokens.receive(POLL_SECONDS)
            if isinstance(message, TokenBatch):
                return message.outputs
            self._next_status(0)
        raise ValueError(f"the ranks said nothing for {OUTPUT_SECONDS:.0f} s")
