"""Log-probabilities of one shard: against float64, their order, their ranks."""

import math

import pytest
import torch
from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.protocol.messages import TokenLogprobs
from engine.sampling.logprobs import LogprobQuery, compute_logprobs

ALONE = CommunicationHandler(torch.device("cpu"))


def random_logits(num_rows: int, vocab_size: int, scale: float = 4.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale


def compute(logits: Tensor, *queries: LogprobQuery) -> list[TokenLogprobs]:
    return compute_logprobs(logits, queries, ALONE, vocab_size=logits.shape[1])


@pytest.mark.parametrize("vocab_size", [7, 1009, 300_000])  # the last is more than one pass over the vocabulary takes
@pytest.mark.parametrize("scale", [0.1, 4.0, 300.0])
def test_they_are_the_log_softmax_in_float64(vocab_size: int, scale: float) -> None:
    logits = random_logits(9, vocab_size, scale)
    expected = logits.double().log_softmax(1)
    queries = [LogprobQuery(row, 3 * row % vocab_size, 5) for row in range(9)]
    for query, answer in zip(queries, compute(logits, *queries), strict=True):
        assert answer.token_id == query.token_id
        assert answer.logprob == pytest.approx(expected[query.row, query.token_id].item(), abs=1e-6, rel=1e-6)
        assert answer.top_logprobs == pytest.approx(
            expected[query.row, answer.top_token_ids].tolist(), abs=1e-6, rel=1e-6
        )
        assert answer.top_token_ids == expected[query.row].topk(5).indices.tolist()
        assert answer.rank == 1 + int((logits[query.row] > logits[query.row, query.token_id]).sum())


def test_the_probabilities_of_all_tokens_add_up_to_1() -> None:
    [answer] = compute(random_logits(1, 1009), LogprobQuery(0, 5, 1009))
    assert sorted(answer.top_token_ids) == list(range(1009))
    assert math.fsum(map(math.exp, answer.top_logprobs)) == pytest.approx(1, abs=1e-6)


def test_of_equals_the_lower_id_is_the_likelier_in_order_and_rank() -> None:
    logits = torch.tensor([[0.0, 1.0, -0.0, 1.0, 0.0, -1.0]])
    answers = compute(logits, *(LogprobQuery(0, token, 6) for token in range(6)))
    assert [answer.rank for answer in answers] == [3, 1, 4, 2, 5, 6]
    assert answers[0].top_token_ids == [1, 3, 0, 2, 4, 5]


def test_a_token_stands_at_its_rank_among_the_top() -> None:
    logits = random_logits(1, 101).round()  # many equals
    for token, answer in enumerate(compute(logits, *(LogprobQuery(0, token, 101) for token in range(101)))):
        assert answer.top_token_ids[answer.rank - 1] == token
        assert answer.top_logprobs[answer.rank - 1] == answer.logprob
        assert answer.top_logprobs == sorted(answer.top_logprobs, reverse=True)


def test_each_query_has_as_many_of_the_top_as_it_asks_for() -> None:
    logits = random_logits(3, 50)
    answers = compute(
        logits, LogprobQuery(2, 1, 0), LogprobQuery(0, 1, 20), LogprobQuery(2, 7, 1), LogprobQuery(1, 0, 99)
    )
    assert [len(answer.top_token_ids) for answer in answers] == [0, 20, 1, 50]
    assert [len(answer.top_logprobs) for answer in answers] == [0, 20, 1, 50]


def test_no_query_has_no_answer() -> None:
    assert compute(random_logits(2, 10)) == []


def test_a_token_that_the_model_excludes_has_minus_infinity() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    [answer] = compute(logits, LogprobQuery(0, 1, 3))
    assert (answer.logprob, answer.rank) == (-math.inf, 3)
    assert answer.top_logprobs == pytest.approx([-math.log(2), -math.log(2), -math.inf])


def test_padding_counts_for_nothing() -> None:
    logits = random_logits(2, 10)
    padded = torch.cat((logits, torch.full((2, 3), 50.0)), dim=1)
    query = LogprobQuery(1, 4, 12)
    assert compute_logprobs(padded, [query], ALONE, vocab_size=10) == compute(logits, query)


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = random_logits(2, 500).bfloat16()
    query = LogprobQuery(1, 4, 10)
    assert compute(logits, query) == compute(logits.float(), query)


def test_the_logits_are_left_as_they_were() -> None:
    logits = random_logits(2, 50)
    before = logits.clone()
    compute_logprobs(logits, [LogprobQuery(0, 1, 5), LogprobQuery(1, 1, 5)], ALONE, vocab_size=48)
    assert torch.equal(logits, before)
