"""Log-probabilities under the softmax of the model's own logits, of which each rank holds a shard of the vocabulary.

With x the logits at a position and t the token whose log-probability is wanted, rank r computes over its shard V_r

    m_r = max x_i        s_r = sum exp(x_i - m_r)        c_r = number of the i that are likelier than t        i in V_r

and its largest x_i with their ids. Rank 0 puts these few numbers together, in float64:

    m = max m_r        log Z = m + log sum s_r exp(m_r - m)        log p_t = x_t - log Z        rank of t = 1 + sum c_r

So no logits are gathered. x_t, which every rank needs in order to count, is all-reduced: all but its owner add 0. The
lower id of two with equal logits counts as the likelier.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.protocol.messages import TokenLogprobs
from engine.sampling.vocabulary import largest, rows_per_pass, to_index

LOWEST = torch.finfo(torch.float32).min


class LogprobQuery(NamedTuple):
    """The log-probability of a token at a row of the logits is wanted, and those of the `num_top` likeliest."""

    row: int
    token_id: int
    num_top: int


class _Shard(NamedTuple):
    """Token ids `first_id : first_id + size`, of which those from `vocab_size` on are padding."""

    first_id: int
    size: int
    vocab_size: int


def compute_logprobs(
    logits: Tensor, queries: Sequence[LogprobQuery], group: CommunicationHandler, *, vocab_size: int
) -> list[TokenLogprobs]:
    """Return the answers on rank 0, and nothing on the others. All ranks ask the same.

    Args:
        logits: `[num_rows, local_vocab]` of any float type: this rank's shard. Not changed.
        queries: in any order.
        group: whose shards are, in rank order, the vocabulary and then its padding.
        vocab_size: without the padding; the queries' token ids are below it.
    """
    if not queries:
        return []
    shard = _Shard(group.rank * logits.shape[1], logits.shape[1], vocab_size)
    num_top = min(max(query.num_top for query in queries), vocab_size)
    rows = to_index([query.row for query in queries], logits.device)
    token_ids = to_index([query.token_id for query in queries], logits.device)
    wanted = group.all_reduce(_owned_logits(logits, rows, token_ids, shard))
    passes = (torch.split(column, rows_per_pass(logits)) for column in (rows, token_ids, wanted))
    summaries = [
        _summarize(logits[part].float(), ids, values, shard, num_top) for part, ids, values in zip(*passes, strict=True)
    ]
    gathered = group.gather(torch.cat(summaries))
    if gathered is None:
        return []
    return _combine(gathered.view(len(queries), group.world_size, -1), wanted, queries, num_top)


def _owned_logits(logits: Tensor, rows: Tensor, token_ids: Tensor, shard: _Shard) -> Tensor:
    """Return each token's logit as float32 where this shard holds it, and 0 elsewhere."""
    local_ids = token_ids - shard.first_id
    elsewhere = (local_ids < 0) | (local_ids >= shard.size)
    return logits[rows, local_ids.masked_fill(elsewhere, 0)].float().masked_fill(elsewhere, 0)


def _summarize(x: Tensor, token_ids: Tensor, wanted: Tensor, shard: _Shard, num_top: int) -> Tensor:
    """Return m, s, c of the module's docstring, the largest logits, and their ids: `[num_rows, 3 + 2 width]`.

    All in float64, which holds float32 and token ids exactly; `width` is the same on all ranks.
    """
    ids = torch.arange(shard.first_id, shard.first_id + shard.size, device=x.device)
    x[:, max(0, shard.vocab_size - shard.first_id) :] = -torch.inf
    maximum = x.amax(1, keepdim=True).clamp(min=LOWEST)  # finite where the shard is nothing but padding
    exp_sum = (x - maximum).exp_().sum(1, keepdim=True, dtype=torch.float64)
    value = wanted.unsqueeze(1)
    is_likelier = (x > value) | ((x == value) & (ids < token_ids.unsqueeze(1)))
    top = largest(x, min(num_top, shard.size))
    parts = (maximum, exp_sum, is_likelier.sum(1, keepdim=True), x.gather(1, top), top + shard.first_id)
    return torch.cat([part.to(torch.float64) for part in parts], dim=1)


def _combine(shards: Tensor, wanted: Tensor, queries: Sequence[LogprobQuery], num_top: int) -> list[TokenLogprobs]:
    """Put the summaries of all shards together, `[num_rows, num_shards, 3 + 2 width]`."""
    width = (shards.shape[2] - 3) // 2
    maxima, exp_sums, likelier, top_logits, top_ids = torch.split(shards, [1, 1, 1, width, width], dim=2)
    maximum = maxima.amax(1)
    log_z = maximum + (exp_sums * (maxima - maximum.unsqueeze(1)).exp()).sum(1).log()
    ranks = likelier.sum(1).squeeze(1).to(torch.int64) + 1
    # Stable, and the lower ids come first already: they stay first among equals.
    order = top_logits.flatten(1).sort(dim=1, descending=True, stable=True)
    top = order.indices[:, :num_top]
    answers = zip(
        queries,
        (wanted - log_z.squeeze(1)).tolist(),
        ranks.tolist(),
        top_ids.flatten(1).gather(1, top).to(torch.int64).tolist(),
        (order.values[:, :num_top] - log_z).tolist(),
        strict=True,
    )
    return [
        TokenLogprobs(query.token_id, logprob, rank, ids[: query.num_top], logprobs[: query.num_top])
        for query, logprob, rank, ids, logprobs in answers
    ]
