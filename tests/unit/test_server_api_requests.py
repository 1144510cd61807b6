"""What of an API request reaches the engine."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.server_support import (
    BOS,
    CHAT,
    COMPLETIONS,
    EOS,
    MAX_MODEL_LEN,
    MESSAGES,
    TOKENIZER,
    RunningServer,
    post,
    running_server,
    write_model,
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


def test_penalties_biases_and_stop_tokens_reach_the_engine(server: RunningServer) -> None:
    fields = {
        "presence_penalty": -2, "frequency_penalty": 1.5, "repetition_penalty": 1.2, "logit_bias": {"5": -100, "0": 1},
        "min_tokens": 2, "stop_token_ids": [9, 8, 9], "logprobs": 3, "prompt_logprobs": 1, "temperature": 0,
    }  # fmt: skip
    post(server, COMPLETIONS, {"prompt": [7, 8], **fields}).raise_for_status()
    sampling = server.engine.requests[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-2, 1.5, 1.2)
    assert sampling.logit_bias == {5: -100, 0: 1}
    assert (sampling.min_tokens, sampling.logprobs, sampling.prompt_logprobs) == (2, 3, 1)
    assert sampling.stop_token_ids == (9, 8, TOKENIZER.token_to_id(EOS))


def test_where_the_end_of_text_is_ignored_only_the_requests_own_tokens_stop(server: RunningServer) -> None:
    post(server, COMPLETIONS, {"prompt": "x", "ignore_eos": True, "stop_token_ids": [9]}).raise_for_status()
    assert server.engine.requests[0].sampling.stop_token_ids == (9,)


def test_a_chats_logprobs_are_its_top_logprobs(server: RunningServer) -> None:
    for fields, asked in (({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 4}, 4)):
        post(server, CHAT, {"messages": MESSAGES, **fields}).raise_for_status()
        assert server.engine.requests[-1].sampling.logprobs == asked


def test_only_an_echo_needs_the_prompts_logprobs(server: RunningServer) -> None:
    for echo, asked in ((False, None), (True, 2)):
        post(server, COMPLETIONS, {"prompt": "x", "logprobs": 2, "echo": echo}).raise_for_status()
        assert server.engine.requests[-1].sampling.prompt_logprobs == asked


@pytest.mark.parametrize(
    ("keep", "max_tokens", "kept"), [(3, 5, 3), (10_000, 5, 250), (-1, 5, 250), (-1, 100, MAX_MODEL_LEN - 100)]
)
def test_the_end_of_a_prompt_can_be_kept(server: RunningServer, keep: int, max_tokens: int, kept: int) -> None:
    prompt = [index % 90 + 5 for index in range(250)]
    fields = {"max_tokens": max_tokens, "truncate_prompt_tokens": keep}
    answer = post(server, COMPLETIONS, {"prompt": prompt, **fields}).json()
    assert server.engine.requests[0].prompt_token_ids == prompt[-kept:]
    assert answer["usage"]["prompt_tokens"] == kept


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_token_that_begins_a_text_is_kept_when_the_text_is_cut(server: RunningServer, path: str) -> None:
    text = "the lazy dog sleeps"
    own: dict[str, Any] = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    post(server, path, own).raise_for_status()
    post(server, path, {**own, "truncate_prompt_tokens": 4}).raise_for_status()
    post(server, path, {**own, "truncate_prompt_tokens": 1}).raise_for_status()
    whole, cut, shortest = (request.prompt_token_ids for request in server.engine.requests)
    assert whole[0] == TOKENIZER.token_to_id(BOS)
    assert cut == [whole[0], *whole[-3:]]
    assert shortest == whole[-1:]


def test_a_text_far_too_long_can_be_cut_to_what_fits(server: RunningServer) -> None:
    text = "the lazy dog " * 3000
    for path, body in ((COMPLETIONS, {"prompt": text}), (CHAT, {"messages": [{"role": "user", "content": text}]})):
        post(server, path, {**body, "truncate_prompt_tokens": -1, "max_tokens": 6}).raise_for_status()
        assert len(server.engine.requests[-1].prompt_token_ids) == MAX_MODEL_LEN - 6


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("framed", [True, False])
def test_the_tokenizers_frame_can_be_asked_for_or_left_out(server: RunningServer, path: str, framed: bool) -> None:
    own: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES}
    post(server, path, {**own, "add_special_tokens": framed}).raise_for_status()
    ids = server.engine.requests[0].prompt_token_ids
    assert ids.count(TOKENIZER.token_to_id(BOS) or 0) == framed + (path == CHAT)  # the template writes one itself


def test_the_final_message_can_be_continued(server: RunningServer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "I am"}]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    post(server, CHAT, {"messages": messages, **fields}).raise_for_status()
    ids = server.engine.requests[0].prompt_token_ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "<|bos|>[user]hello[assistant]I am"


def test_the_template_gets_more_variables(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}{% if think %}!{% endif %}")
    with running_server(model) as server:
        post(server, CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"think": True}}).raise_for_status()
    assert TOKENIZER.decode(server.engine.requests[0].prompt_token_ids) == "hello!"


def test_a_models_repetition_penalty_is_a_default(tmp_path: Path) -> None:
    with running_server(write_model(tmp_path, repetition_penalty=1.1)) as server:
        for body in ({"prompt": "x"}, {"prompt": "x", "repetition_penalty": 1}):
            post(server, COMPLETIONS, body).raise_for_status()
        assert [request.sampling.repetition_penalty for request in server.engine.requests] == [1.1, 1]


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
        "best_of": 1, "echo": False, "user": "me", "metadata": {"a": "b"}, "logprobs": None, "guided_json": None,
        "structured_outputs": None, "vllm_xargs": None, "cache_salt": None, "return_tokens_as_token_ids": False,
    }  # fmt: skip
    post(server, COMPLETIONS, {"prompt": "x", "suffix": None, **neutral}).raise_for_status()
    chat: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "store": False, "logprobs": False, "top_logprobs": 0,
        "service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": True, "reasoning_effort": None,
    }  # fmt: skip
    post(server, CHAT, {"messages": MESSAGES, **neutral, **chat}).raise_for_status()
