"""What logit_bias, min_tokens and the penalties make of a row's logits, and that it is undone."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.protocol.messages import SamplingParams
from engine.sampling.logits import adjusted
from engine.sampling.row import SamplingRow
from tests import sampling_oracle

VOCAB_SIZE = 8
LOGITS = [2.0, -2.0, 0.5, -0.5, 0.0, 1.0, 4.0, -4.0]
PROMPT, OUTPUT = [0, 1, 1, 4], [2, 3, 3, 0, 3]


def row(prompt: list[int] = PROMPT, output: list[int] = OUTPUT, **options: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**{"max_tokens": 99, **options}), prompt + output, len(prompt))


def adjust(logits: Tensor, *rows: SamplingRow) -> Tensor:
    with adjusted(logits, rows):
        return logits.clone()


def changes(**options: Any) -> dict[int, float]:
    """Return the new logit of each token whose logit changes."""
    before = torch.tensor([LOGITS])
    after = adjust(before, row(**options))[0].tolist()
    return {token: value for token, value in enumerate(after) if value != LOGITS[token]}


def test_logit_bias_is_added() -> None:
    assert changes(logit_bias={0: 1.5, 7: -100.0}) == {0: 3.5, 7: -104.0}


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    assert changes(repetition_penalty=2.0) == {0: 1.0, 1: -4.0, 2: 0.25, 3: -1.0}


def test_a_repetition_penalty_below_1_makes_repetition_likelier() -> None:
    assert changes(repetition_penalty=0.5) == {0: 4.0, 1: -1.0, 2: 1.0, 3: -0.25}


def test_the_presence_penalty_is_taken_once_from_tokens_of_the_output_alone() -> None:
    assert changes(presence_penalty=0.5) == {0: 1.5, 2: 0.0, 3: -1.0}


def test_the_frequency_penalty_is_taken_as_often_as_the_output_holds_a_token() -> None:
    assert changes(frequency_penalty=0.5) == {0: 1.5, 2: 0.0, 3: -2.0}


def test_negative_penalties_add() -> None:
    assert changes(presence_penalty=-1.0, frequency_penalty=-2.0) == {0: 5.0, 2: 3.5, 3: 6.5}


@pytest.mark.parametrize(("min_tokens", "excluded"), [(0, False), (5, False), (6, True), (99, True)])
def test_stop_tokens_are_excluded_until_min_tokens_were_sampled(min_tokens: int, excluded: bool) -> None:
    expected = {1: -math.inf, 6: -math.inf} if excluded else {}
    assert changes(min_tokens=min_tokens, stop_token_ids=(1, 6)) == expected


def test_no_option_brings_an_excluded_token_back() -> None:
    everything = {"logit_bias": {3: 100.0}, "repetition_penalty": 0.5, "presence_penalty": -2.0}
    assert changes(min_tokens=6, stop_token_ids=(3,), **everything)[3] == -math.inf


def test_the_bias_comes_before_the_repetition_penalty_and_that_before_the_others() -> None:
    changed = changes(logit_bias={1: 3.0}, repetition_penalty=2.0, presence_penalty=1.0)
    assert changed == {0: 0.0, 1: 0.5, 2: -0.75, 3: -2.0}


def test_rows_are_changed_each_by_its_own_options_as_the_definition_says() -> None:
    draw = random.Random(1)
    options: dict[str, Any] = {
        "logit_bias": {token: draw.uniform(-5, 5) for token in range(0, 200, 7)},
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": -0.4,
        "min_tokens": 20,
        "stop_token_ids": (3, 5, 150),
    }
    rows = []
    for _ in range(30):
        prompt, output = (draw.choices(range(200), k=draw.randrange(40)) for _ in range(2))
        chosen = draw.sample(sorted(options), draw.randint(0, len(options)))
        rows.append(row(prompt, output, **{name: options[name] for name in chosen}))
    logits = torch.randn(30, 200, generator=torch.Generator().manual_seed(1)) * 4
    expected = torch.tensor([sampling_oracle.adjust(*pair) for pair in zip(logits.tolist(), rows, strict=True)])
    torch.testing.assert_close(adjust(logits, *rows), expected, rtol=1e-6, atol=1e-6)


def test_after_the_block_the_logits_are_bit_for_bit_the_models_own() -> None:
    logits = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    busy = row(
        logit_bias={0: 3.3, 1: 0.1}, repetition_penalty=1.7, frequency_penalty=0.3, min_tokens=9, stop_token_ids=(0,)
    )
    with adjusted(logits, [busy, row()]):
        assert not torch.equal(logits[0], before[0])
        assert torch.equal(logits[1], before[1])
    assert torch.equal(logits, before)


def test_they_are_the_models_own_also_when_sampling_fails() -> None:
    logits = torch.tensor([LOGITS])
    with pytest.raises(RuntimeError, match="device lost"), adjusted(logits, [row(presence_penalty=1.0)]):
        raise RuntimeError("device lost")
    assert logits.tolist() == [LOGITS]


def test_a_penalty_counts_nothing_before_the_first_output() -> None:
    logits = torch.tensor([LOGITS])
    assert torch.equal(adjust(logits, row(output=[], presence_penalty=2.0, frequency_penalty=2.0)), logits)
