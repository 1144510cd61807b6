"""Decides what each step computes: continuous batching under one token budget.

There is no prefill phase and no decode phase. Every step, each running sequence asks for the tokens it has not computed
yet, and gets what is left of the budget; a long prompt thus comes in chunks, beside the others' single tokens. When the
KV blocks run out, the sequence that came last is preempted: it gives up its blocks and is recomputed later.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping

from engine.kvcache.block_pool import BlockPool
from engine.protocol.messages import (
    FinishReason,
    PromptLogprobs,
    Request,
    ScheduledRow,
    ScheduledStep,
    SchedulerStats,
    TokenOutput,
)
from engine.sampling.row import SamplingRow
from engine.scheduler.result import StepResult
from engine.scheduler.sequence import Sequence

# In a step's `new_token_ids`: sampled by a step before, not known yet when this one was scheduled.
PENDING_TOKEN = -1


class Scheduler:
    """Holds every sequence of the engine. The oldest is never preempted, so something always progresses."""

    def __init__(
        self,
        *,
        epoch: int,
        num_kv_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if num_kv_blocks * block_size < max_model_len:
            raise ValueError(f"{num_kv_blocks} KV blocks of {block_size} tokens cannot hold {max_model_len} tokens")
        self._epoch = epoch
        self._pool = BlockPool(num_kv_blocks)
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()  # in order of arrival
        self._running: list[Sequence] = []  # in order of arrival
        self._in_flight: dict[int, list[Sequence]] = {}  # of steps whose results are not applied yet, in row order
        self._finished: list[str] = []  # to be forgotten by the ranks
        self._arrivals = self._step = 0
        self._preemptions = self._steps_reported = self._integrity_checks = 0

    # --- requests ----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: if it could never be scheduled; the message is for the person who sent it.
        """
        prompt_length = len(request.prompt_token_ids)
        if prompt_length == 0:
            raise ValueError("the prompt has no tokens")
        if prompt_length >= self._max_model_len:
            raise ValueError(f"the prompt has {prompt_length} tokens; the context holds {self._max_model_len}")
        if request.sampling.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {request.sampling.max_tokens}")
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        limit = min(request.sampling.max_tokens, self._max_model_len - prompt_length)
        sequence = Sequence(request, self._arrivals, self._clock(), limit)
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown ids (it may just have finished) are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._remove(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any request is left."""
        return bool(self._sequences)

    # --- one step ----------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """Decide the next step, or return None if no sequence can be advanced now."""
        chosen = self._share_budget()
        preempted = self._allocate_running(chosen)
        if not preempted:
            self._admit(chosen)
        if not chosen:
            return None
        sequences = [sequence for sequence in self._running if sequence in chosen]
        rows = [self._schedule_row(sequence, chosen[sequence]) for sequence in sequences]
        self._in_flight[self._step] = sequences
        finished, self._finished = self._finished, []
        step = ScheduledStep(epoch=self._epoch, step=self._step, rows=rows, finished=finished)
        self._step += 1
        return step

    def fill_pending(self, step: ScheduledStep, tokens: Mapping[str, int | str]) -> None:
        """Replace the pending tokens in `step` by what the step before it sampled, by request id.

        A sequence for which none could be sampled ends when that step is applied; until then any token will do.
        """
        for row in step.rows:
            if row.new_token_ids and row.new_token_ids[-1] == PENDING_TOKEN:
                token = tokens[row.request_id]
                row.new_token_ids[-1] = token if isinstance(token, int) else 0

    def sampling_rows(self, step: ScheduledStep) -> list[SamplingRow]:
        """Return what is to be sampled in a step that is in flight: each row that samples, in batch order.

        The steps before it must have been applied.
        """
        sequences = self._in_flight[step.step]
        return [
            SamplingRow(sequence.request.sampling, sequence.token_ids, len(sequence.request.prompt_token_ids))
            for row, sequence in zip(step.rows, sequences, strict=True)
            if row.samples
        ]

    def apply(self, step: ScheduledStep, result: StepResult) -> list[TokenOutput]:
        """Take a step's results.

        Rows of sequences that were aborted or that finished since the step was scheduled are dropped.
        """
        outputs = []
        for row, sequence in zip(step.rows, self._in_flight.pop(step.step), strict=True):
            is_there = self._sequences.get(row.request_id) is sequence
            if is_there and (row.samples or row.prompt_logprobs is not None):
                outputs.append(self._apply_row(row, sequence, result))
        return outputs

    # --- looking inside ----------------------------------------------------------------------------------------------

    def take_stats(self) -> SchedulerStats:
        """Return present values, and what was counted since the last call."""
        stats = SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_kv_blocks=self._pool.num_blocks,
            num_free_kv_blocks=self._pool.num_free,
            preemptions=self._preemptions,
            steps=self._step - self._steps_reported,
            integrity_checks=self._integrity_checks,
        )
        self._preemptions = self._integrity_checks = 0
        self._steps_reported = self._step
        return stats

    def check_integrity(self) -> None:
        """Check that every block is free or in one sequence's table, and every sequence in one queue.

        Raises:
            IntegrityError: from the block pool.
        """
        self._pool.check_integrity(sequence.block_ids for sequence in self._sequences.values())
        queued = sorted(sequence.arrival for sequence in (*self._waiting, *self._running))
        assert queued == sorted(sequence.arrival for sequence in self._sequences.values()), "a sequence left the queues"
        self._integrity_checks += 1

    # --- the parts of a decision -------------------------------------------------------------------------------------

    def _share_budget(self) -> dict[Sequence, int]:
        """Give tokens to the running sequences, the oldest first.

        Nobody starves at any budget: a sequence is admitted only when the older ones left some of it.
        """
        budget = self._max_num_batched_tokens
        chosen: dict[Sequence, int] = {}
        for sequence in self._running:
            if (count := min(sequence.num_uncomputed_tokens, budget)) > 0:
                chosen[sequence] = count
                budget -= count
        return chosen

    def _allocate_running(self, chosen: dict[Sequence, int]) -> bool:
        """Allocate blocks for the chosen, the oldest first, preempting the youngest; return whether any was."""
        preempted = False
        for sequence in [sequence for sequence in self._running if sequence in chosen]:
            while sequence in chosen and not self._allocate(sequence, chosen[sequence]):
                preempted = True
                victim = self._running.pop()
                chosen.pop(victim, None)
                self._preempt(victim)
        return preempted

    def _admit(self, chosen: dict[Sequence, int]) -> None:
        """Move waiting sequences to the running ones, in order of arrival, while budget, seats and blocks last."""
        budget = self._max_num_batched_tokens - sum(chosen.values())
        while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            # One block to grow for each that runs: whoever is admitted should not be preempted at once.
            needed = self._blocks_for(sequence.num_tokens) + len(self._running)
            if sequence.num_pending_tokens or (self._running and needed > self._pool.num_free):
                break
            count = min(sequence.num_uncomputed_tokens, budget)
            if not self._allocate(sequence, count):
                break
            self._running.append(self._waiting.popleft())
            chosen[sequence] = count
            budget -= count

    def _allocate(self, sequence: Sequence, count: int) -> bool:
        missing = self._blocks_for(sequence.num_computed_tokens + count) - len(sequence.block_ids)
        block_ids = self._pool.allocate(max(0, missing))
        if block_ids is None:
            return False
        sequence.block_ids.extend(block_ids)
        return True

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _preempt(self, sequence: Sequence) -> None:
        self._pool.free(sequence.forget_computed())
        self._waiting.appendleft(sequence)  # victims fall from the youngest on, so the order of arrival holds
        self._preemptions += 1

    def _schedule_row(self, sequence: Sequence, count: int) -> ScheduledRow:
        """Advance the sequence and say what the ranks do not know yet."""
        num_unsent_pending = sequence.num_tokens - max(sequence.num_sent_tokens, len(sequence.token_ids))
        samples = sequence.num_computed_tokens + count == sequence.num_tokens
        row = ScheduledRow(
            request_id=sequence.request_id,
            is_new=sequence.num_sent_tokens == 0,
            new_token_ids=sequence.token_ids[sequence.num_sent_tokens :] + [PENDING_TOKEN] * num_unsent_pending,
            new_block_ids=sequence.block_ids[sequence.num_sent_blocks :],
            num_computed_tokens=sequence.num_computed_tokens,
            num_scheduled_tokens=count,
            samples=samples,
            prompt_logprobs=self._want_prompt_logprobs(sequence, sequence.num_computed_tokens + count),
        )
        if not sequence.is_known_to_ranks:
            sequence.is_known_to_ranks = True
            sequence.queue_seconds = self._clock() - sequence.arrival_time
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.num_sent_tokens = sequence.num_tokens
        sequence.num_sent_blocks = len(sequence.block_ids)
        sequence.num_computed_tokens += count
        sequence.num_pending_tokens += samples
        return row

    def _want_prompt_logprobs(self, sequence: Sequence, stop: int) -> PromptLogprobs | None:
        """Ask for what a step up to the position `stop` can bring of the prompt's logprobs, each once.

        What is asked for is delivered, as long as the sequence is there: a preemption takes no results back.
        """
        num_top = sequence.request.sampling.prompt_logprobs
        start = sequence.num_prompt_logprobs
        stop = min(stop, len(sequence.request.prompt_token_ids) - 1)
        if num_top is None or start >= stop:
            return None
        sequence.num_prompt_logprobs = stop
        return PromptLogprobs(start, stop, num_top)

    def _apply_row(self, row: ScheduledRow, sequence: Sequence, result: StepResult) -> TokenOutput:
        request_id = row.request_id
        token = result.tokens[request_id] if row.samples else None
        token_ids = [token] if isinstance(token, int) else []
        has_logprobs = bool(token_ids) and sequence.request.sampling.logprobs is not None
        queue_seconds, num_cached_tokens = sequence.take_news_of_first_step()
        return TokenOutput(
            request_id,
            token_ids,
            finish_reason=None if token is None else self._take_token(sequence, token),
            error=token if isinstance(token, str) else None,
            logprobs=[result.logprobs[request_id]] if has_logprobs else [],
            prompt_logprobs=[] if row.prompt_logprobs is None else result.prompt_logprobs[request_id],
            queue_seconds=queue_seconds,
            num_cached_tokens=num_cached_tokens,
        )

    def _take_token(self, sequence: Sequence, token: int | str) -> FinishReason | None:
        """Take what was sampled, or why nothing could be; return whether that ends the sequence."""
        sequence.num_pending_tokens -= 1
        finish_reason = None
        if isinstance(token, str):
            finish_reason = FinishReason.ERROR
        else:
            sequence.token_ids.append(token)
            finish_reason = sequence.finish_reason
        if finish_reason is not None:
            self._remove(sequence)
        return finish_reason

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        self._pool.free(sequence.forget_computed())
        if sequence.is_known_to_ranks:
            self._finished.append(sequence.request_id)
