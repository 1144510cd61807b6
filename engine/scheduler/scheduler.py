"""Decides what each step computes: continuous batching under one token budget.

There is no prefill phase and no decode phase. Every step, each running sequence asks for the tokens it has not computed
yet, and gets what is left of the budget; a long prompt thus comes in chunks, beside the others' single tokens. When the
KV blocks run out, the sequence that came last is preempted: it gives up its blocks and is recomputed later, except for
what the KV cache still holds then. Sequences that begin alike share the KV blocks of what they have in common.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping

from engine.kvcache.manager import KVCacheManager
from engine.protocol.messages import Request, ScheduledRow, ScheduledStep, SchedulerStats, TokenOutput
from engine.protocol.stats import BATCH_SIZE_BUCKETS, STEP_TOKENS_BUCKETS, Histogram
from engine.sampling.row import SamplingRow
from engine.scheduler.result import StepResult
from engine.scheduler.sequence import PENDING_TOKEN, Sequence


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
        enable_prefix_caching: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if num_kv_blocks * block_size < max_model_len:
            raise ValueError(f"{num_kv_blocks} KV blocks of {block_size} tokens cannot hold {max_model_len} tokens")
        self._epoch = epoch
        self._kv_cache = KVCacheManager(num_kv_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()  # in order of arrival
        self._running: list[Sequence] = []  # in order of arrival
        self._in_flight: dict[int, list[Sequence]] = {}  # of steps whose results are not applied yet, in row order
        self._finished: list[str] = []  # to be forgotten by the ranks
        self._step = 0
        self._preemptions = self._steps_reported = self._integrity_checks = 0
        self._prefix_cache_queries = self._prefix_cache_hits = 0
        self._batch_sizes, self._step_tokens = Histogram(BATCH_SIZE_BUCKETS), Histogram(STEP_TOKENS_BUCKETS)

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
        if len(request.received_token_ids) >= limit:
            raise ValueError(f"{len(request.received_token_ids)} tokens were received of at most {limit}")
        sequence = Sequence(request, self._clock(), limit)
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
        self._allocate_running(chosen)
        self._admit(chosen)
        if not chosen:
            return None
        sequences = [sequence for sequence in self._running if sequence in chosen]
        rows = [self._schedule_row(sequence, chosen[sequence]) for sequence in sequences]
        self._batch_sizes.observe(len(rows))
        self._step_tokens.observe(sum(chosen.values()))
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
        return [sequence.sampling_row for row, sequence in zip(step.rows, sequences, strict=True) if row.samples]

    def apply(self, step: ScheduledStep, result: StepResult) -> list[TokenOutput]:
        """Take a step's results.

        Rows of sequences that were aborted or that finished since the step was scheduled are dropped.
        """
        outputs = []
        for row, sequence in zip(step.rows, self._in_flight.pop(step.step), strict=True):
            if self._sequences.get(row.request_id) is sequence and (output := sequence.take(row, result)) is not None:
                outputs.append(output)
                if output.finish_reason is not None:
                    self._remove(sequence)
        return outputs

    # --- looking inside ----------------------------------------------------------------------------------------------

    def take_stats(self) -> SchedulerStats:
        """Return present values, and what was counted since the last call."""
        stats = SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_kv_blocks=self._kv_cache.num_blocks,
            num_free_kv_blocks=self._kv_cache.num_free,
            preemptions=self._preemptions,
            steps=self._step - self._steps_reported,
            integrity_checks=self._integrity_checks,
            prefix_cache_queries=self._prefix_cache_queries,
            prefix_cache_hits=self._prefix_cache_hits,
            batch_sizes=self._batch_sizes.take(),
            step_tokens=self._step_tokens.take(),
        )
        self._preemptions = self._integrity_checks = 0
        self._prefix_cache_queries = self._prefix_cache_hits = 0
        self._steps_reported = self._step
        return stats

    def check_integrity(self) -> None:
        """Check that every block is held by as many sequences as are counted, and every sequence is in one queue.

        Raises:
            IntegrityError: from the block pool.
        """
        self._kv_cache.check_integrity(sequence.block_table for sequence in self._sequences.values())
        queued = sorted(sequence.request_id for sequence in (*self._waiting, *self._running))
        assert queued == sorted(self._sequences), "a sequence left the queues"
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

    def _allocate_running(self, chosen: dict[Sequence, int]) -> None:
        """Allocate blocks for the chosen, the oldest first, preempting the youngest.

        No victim is admitted again in the same step: it needs all that it gave up, and some of that was taken.
        """
        for sequence in [sequence for sequence in self._running if sequence in chosen]:
            while sequence in chosen and not self._allocate(sequence, chosen[sequence]):
                victim = self._running.pop()
                chosen.pop(victim, None)
                self._preempt(victim)

    def _admit(self, chosen: dict[Sequence, int]) -> None:
        """Move waiting sequences to the running ones, in order of arrival, while budget, seats and blocks last."""
        budget = self._max_num_batched_tokens - sum(chosen.values())
        # One block to grow for each that runs: whoever is admitted should not be preempted at once.
        while self._waiting and budget > 0 and len(self._running) < min(self._max_num_seqs, self._kv_cache.num_free):
            sequence = self._waiting[0]
            cached = self._kv_cache.find(sequence.token_ids, sequence.num_skippable_tokens)
            needed = self._kv_cache.num_taken(cached, sequence.num_tokens) + len(self._running)
            if sequence.num_pending_tokens or needed > self._kv_cache.num_free:
                break
            sequence.begin(self._kv_cache.share(cached), cached.num_tokens)
            count = min(sequence.num_uncomputed_tokens, budget)
            allocated = self._allocate(sequence, count)
            assert allocated, "the blocks were counted"
            self._running.append(self._waiting.popleft())
            chosen[sequence] = count
            budget -= count

    def _allocate(self, sequence: Sequence, count: int) -> bool:
        return self._kv_cache.extend(sequence.block_table, sequence.token_ids, sequence.num_computed_tokens + count)

    def _preempt(self, sequence: Sequence) -> None:
        self._kv_cache.free(sequence.forget_computed())
        self._waiting.appendleft(sequence)  # victims fall from the youngest on, so the order of arrival holds
        self._preemptions += 1

    def _schedule_row(self, sequence: Sequence, count: int) -> ScheduledRow:
        if not sequence.is_known_to_ranks:
            sequence.is_known_to_ranks = True
            sequence.queue_seconds = self._clock() - sequence.arrival_time
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if self._kv_cache.enable_prefix_caching:
                self._prefix_cache_queries += sequence.num_prompt_tokens
                self._prefix_cache_hits += min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        return sequence.schedule(count)

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        self._kv_cache.free(sequence.forget_computed())
        if sequence.is_known_to_ranks:
            self._finished.append(sequence.request_id)
