"""Bodies of every kind against a real service: whatever comes, it answers in time and in the API's own words."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from tests.service_process import ServiceProcess

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VOCAB_SIZE = 4096
HANG_SECONDS = 30.0  # no answer takes a tenth of it

Strategy = st.SearchStrategy[Any]
TEXT = st.text(max_size=12)
SOME_TEXT = st.text(min_size=1, max_size=12)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 30)
    | st.integers()
    | st.floats(-3, 3)
    | st.floats()
    | TEXT
    | st.text("\ud800", min_size=1)
)
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
IDS = st.integers(0, VOCAB_SIZE - 1)
CONTENT = TEXT | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), min_size=1, max_size=2)
ROLES = st.sampled_from(["system", "developer", "user", "assistant"])
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": CONTENT}, optional={"name": TEXT})

# What each field takes, up to its borders.
COMMON: dict[str, Strategy] = {
    "model": st.none() | st.just("ryzanstein-embedded"),
    "max_tokens": st.integers(0, 8),
    "min_tokens": st.integers(0, 8),
    "temperature": st.floats(0, 100) | st.just(0),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 50) | st.just(2**63 - 1),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "logit_bias": st.dictionaries(IDS.map(str), st.floats(-100, 100), max_size=4),
    "stop": st.none() | SOME_TEXT | st.lists(SOME_TEXT, max_size=3),
    "stop_token_ids": st.none() | st.lists(IDS, max_size=4),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "ignore_eos": st.booleans(),
    "return_token_ids": st.booleans(),
    "prompt_logprobs": st.integers(0, 20),
    "truncate_prompt_tokens": st.just(-1) | st.integers(1, 2**63 - 1),
    "add_special_tokens": st.just(True),  # without them a text may have no tokens
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "user": TEXT,
    "response_format": st.just({"type": "text"}),
}
COMPLETION: dict[str, Strategy] = {
    "echo": st.booleans(),
    "logprobs": st.integers(0, 20),
    "best_of": st.integers(1, 4),
    "suffix": st.just(""),
}
CHAT_ONLY: dict[str, Strategy] = {
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "add_generation_prompt": st.booleans(),
    "continue_final_message": st.booleans(),
    "tools": st.just([]),
}
ID_LIST = st.lists(IDS, min_size=1, max_size=6)
PROMPT = TEXT | st.lists(TEXT, min_size=1, max_size=3) | ID_LIST | st.lists(ID_LIST, min_size=1, max_size=3)


def settled(body: dict[str, Any]) -> dict[str, Any]:
    """Return `body` without what contradicts itself: fields that are only allowed together with others."""
    scores = body.get("echo") or body.get("prompt_logprobs") is not None
    if "stream_options" in body or "best_of" in body or "prompt_logprobs" in body:
        body["stream"] = "stream_options" in body
    if body.get("stream"):
        body |= {"prompt_logprobs": None} | ({"best_of": body.get("n", 1)} if "best_of" in body else {})
        scores = body.get("echo")
    if "best_of" in body:
        body["best_of"] = max(body["best_of"], body.get("n", 1))
    if body.get("top_logprobs"):
        body["logprobs"] = True
    if body.get("continue_final_message"):
        body["add_generation_prompt"] = False
        body["messages"][-1]["role"] = "assistant"  # of other roles the template does not keep lines as they are
    body["max_tokens"] = max(body["max_tokens"], 0 if scores else 1)
    if "min_tokens" in body:
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])
    return body


def proper(needed: dict[str, Strategy], optional: dict[str, Strategy]) -> Strategy:
    """Return bodies with a few of the optional fields, each by itself as it should be."""
    names = st.lists(st.sampled_from(sorted(optional)), max_size=6, unique=True)
    needed = {**needed, "max_tokens": COMMON["max_tokens"]}
    return names.flatmap(lambda chosen: st.fixed_dictionaries(needed | {name: optional[name] for name in chosen}))


def spoilt(bodies: Strategy, names: set[str]) -> Strategy:
    """Return bodies in which fields, known or not, are anything at all."""
    known = st.dictionaries(st.sampled_from(sorted(names)), JUNK, min_size=4, max_size=7)
    wrong = known | known | known | st.dictionaries(TEXT, JUNK, min_size=1, max_size=1)
    return st.tuples(bodies, wrong).map(lambda both: {**both[0], **both[1]})


def short(body: dict[str, Any]) -> dict[str, Any]:
    """Return `body` so that what it asks for, if it is served, is little."""
    limits = {name: body[name] for name in ("max_tokens", "max_completion_tokens") if name in body}
    return body | {name: 2 for name, limit in limits.items() if limit is None or limit in range(3, 1000)}


def as_json(body: Any) -> bytes:
    return json.dumps(body).encode()  # also NaN and Infinity, which JSON does not have


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


COMPLETION_FIELDS, CHAT_FIELDS = COMMON | COMPLETION, COMMON | CHAT_ONLY
COMPLETION_BODIES = proper({"prompt": PROMPT}, COMPLETION_FIELDS)
CHAT_BODIES = proper({"messages": st.lists(MESSAGE, min_size=1, max_size=3)}, CHAT_FIELDS)
VALID = st.tuples(st.just(COMPLETIONS), COMPLETION_BODIES.map(settled).map(as_json)) | st.tuples(
    st.just(CHAT), CHAT_BODIES.map(settled).map(as_json)
)
SPOILT = st.tuples(
    st.just(COMPLETIONS), spoilt(COMPLETION_BODIES.map(settled), {"prompt", *COMPLETION_FIELDS}).map(short).map(as_json)
) | st.tuples(
    st.just(CHAT),
    spoilt(CHAT_BODIES.map(settled), {"messages", "chat_template_kwargs", *CHAT_FIELDS}).map(short).map(as_json),
)
BROKEN = st.tuples(VALID, st.floats(0, 0.99)).map(lambda both: (both[0][0], cut(both[0][1], both[1])))
ANYTHING = st.tuples(st.sampled_from([COMPLETIONS, CHAT]), JUNK.map(as_json) | st.binary(max_size=20))


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess("-tp", "2", "--dtype", "float32", "--num-kv-blocks", "256") as service:
        yield service


def check_answer(response: httpx.Response) -> None:
    """Fail unless the answer is whole, and in the API's shape."""
    if response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"):
        *chunks, done = re.findall("^data: (.*)$", response.text, re.MULTILINE)
        assert done == "[DONE]"
        assert all("error" not in json.loads(chunk) for chunk in chunks)
    elif response.status_code == 200:
        assert response.json()["choices"]
    else:
        assert response.status_code in (400, 404)
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["code"]
        assert error["param"] is not None or error["code"] in ("invalid_json", "invalid_body")


def exercise(service: ServiceProcess, requests: Strategy, num_examples: int) -> Counter[str]:
    """Send requests one after the other; return how many got which answer."""
    statuses: Counter[str] = Counter()
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=service.url, timeout=HANG_SECONDS, headers=headers) as client:

        @settings(
            max_examples=num_examples,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(requests)
        def send(request: tuple[str, bytes]) -> None:
            path, content = request
            note(f"{path} {content!r}")
            response = client.post(path, content=content)
            note(response.text)
            check_answer(response)
            code = "" if response.status_code == 200 else f" {response.json()['error']['code']}"
            statuses[f"{response.status_code}{code}"] += 1

        send()
    return statuses


def test_every_valid_body_is_served(service: ServiceProcess, tell: Callable[[str], None]) -> None:
    checks = service.metric("ryzanstein_integrity_checks_total")
    statuses = exercise(service, VALID, 150)
    assert set(statuses) == {"200"}
    tell(f"valid bodies: {dict(statuses)}")
    service.wait_until_idle(checks)


@pytest.mark.parametrize(
    "num_bodies", [600, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_no_body_breaks_the_service(num_bodies: int, service: ServiceProcess, tell: Callable[[str], None]) -> None:
    checks = service.metric("ryzanstein_integrity_checks_total")
    statuses = exercise(service, SPOILT | SPOILT | BROKEN | ANYTHING, num_bodies)
    assert len(statuses) > 5
    assert statuses["200"] <= num_bodies / 10
    assert httpx.get(f"{service.url}/ready").status_code == 200
    service.complete(prompt="x", max_tokens=1)
    service.wait_until_idle(checks)
    found = service.metric("ryzanstein_integrity_checks_total") - checks
    tell(f"spoilt bodies: {dict(statuses.most_common())}; bookkeeping found whole {found:.0f} times")
