"""What rank 0 makes of a step's logits: each row's next token, and its log-probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.protocol.messages import TokenLogprobs
from engine.sampling.logits import adjusted
from engine.sampling.logprobs import LogprobQuery, compute_logprobs
from engine.sampling.row import SamplingRow
from engine.sampling.sampler import Sampler, SamplingError


@torch.inference_mode()
def sample_step(
    logits: Tensor, rows: Sequence[SamplingRow], sample: Sampler
) -> tuple[list[int | str], dict[int, TokenLogprobs]]:
    """Return each row's token, or a message why it has none; and the log-probabilities by row, for those who ask.

    Args:
        logits: `[num_rows, vocab_size]` float32, the model's own. Changed meanwhile, restored in the end.
        rows: one for each.
        sample: draws the tokens.
    """
    with adjusted(logits, rows):
        samples = sample(logits, [row.params for row in rows], [row.position for row in rows])
    queries = [
        LogprobQuery(index, token, row.params.logprobs)
        for index, (row, token) in enumerate(zip(rows, samples, strict=True))
        if row.params.logprobs is not None and isinstance(token, int)
    ]
    whole = CommunicationHandler(logits.device)  # one shard, the vocabulary
    logprobs = compute_logprobs(logits, queries, whole, vocab_size=logits.shape[1])
    tokens = [str(token) if isinstance(token, SamplingError) else token for token in samples]
    return tokens, {query.row: answer for query, answer in zip(queries, logprobs, strict=True)}
