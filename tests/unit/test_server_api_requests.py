"""What of an API request reaches the engine."""

from typing import Any

import pytest

from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    EOS,
    MAX_MODEL_LEN,
    MESSAGES,
    TOKENIZER,
    RunningServer,
    post,
)


def test_all_sampling_fields_reach_the_engine(server: RunningServer) -> None:
    fields = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "seed": -1, "max_tokens": 3, "n": 2}
    post(server, COMPLETIONS, {"prompt": [7, 8], **fields})
    first, second = server.engine.requests
    assert first.prompt_token_ids == [7, 8]
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.8, 5, 0.1)
    assert (sampling.seed, sampling.max_tokens) == (2**64 - 1, 3)
    assert sampling.stop_token_ids == (TOKENIZER.token_to_id(EOS),)
    assert [first.sampling.choice_index, second.sampling.choice_index] == [0, 1]
    assert first.sampling.seed == second.sampling.seed


def test_what_a_request_leaves_out_is_the_models_default(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": "x", "temperature": None})
    post(server, COMPLETIONS, {"prompt": "x"})
    first, second = (request.sampling for request in server.engine.requests)
    assert (first.temperature, first.top_p, first.top_k, first.min_p, first.max_tokens) == (0.5, 0.9, 0, 0.0, 16)
    assert first.seed != second.seed


def test_chat_may_use_what_is_left_of_the_context(server: RunningServer) -> None:
    post(server, CHAT, {"messages": MESSAGES})
    (request,) = server.engine.requests
    assert request.sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_token_ids)


def test_greedy_needs_no_other_sampling_field(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": "x", "temperature": 0, "top_k": -1, "top_p": 0.5})
    sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 1.0, 0)


def test_the_end_of_text_can_be_ignored(server: RunningServer) -> None:
    server.engine.script = lambda _: "ab"
    answer = post(server, COMPLETIONS, {"prompt": "x", "ignore_eos": True, "max_tokens": 6}).json()
    assert server.engine.requests[0].sampling.stop_token_ids == ()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abab", "length")


@pytest.mark.parametrize("prompt", ["x y", ["x y", "z"], [1, 2, 3], [[1, 2], [3]]])
def test_prompts_are_texts_or_ids_one_or_many(server: RunningServer, prompt: Any) -> None:
    post(server, COMPLETIONS, {"prompt": prompt}).raise_for_status()
    sent = [request.prompt_token_ids for request in server.engine.requests]
    many = (
        prompt if isinstance(prompt[0], list) or (isinstance(prompt, list) and isinstance(prompt[0], str)) else [prompt]
    )
    assert sent == [TOKENIZER.encode(item).ids if isinstance(item, str) else item for item in many]


def test_an_empty_text_is_a_prompt_where_the_tokenizer_frames_it(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": ""}).raise_for_status()
    assert server.engine.requests[0].prompt_token_ids == TOKENIZER.encode("").ids


def test_messages_go_through_the_template_without_a_second_frame(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    post(server, CHAT, {"messages": messages}).raise_for_status()
    ids = server.engine.requests[0].prompt_token_ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "<|bos|>[system]be brief[user]a\nb[assistant]"
    assert ids.count(ids[0]) == 1


def test_what_arrives_together_is_sent_together(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 3})
    assert [len(batch.new) for batch in server.engine.batches if batch.new] == [9]


def test_neutral_values_of_unsupported_fields_are_accepted(server: RunningServer) -> None:
    neutral: dict[str, Any] = {
        "model": None, "temperature": None, "n": None, "stop": None, "stream": None, "stream_options": None,
        "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"},
        "best_of": 1, "echo": False, "user": "me", "metadata": {"a": "b"}, "logprobs": None,
    }  # fmt: skip
    post(server, COMPLETIONS, {"prompt": "x", "suffix": None, **neutral}).raise_for_status()
    chat: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "store": False, "logprobs": False, "top_logprobs": 0,
        "service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": True, "reasoning_effort": None,
    }  # fmt: skip
    post(server, CHAT, {"messages": MESSAGES, **neutral, **chat}).raise_for_status()
