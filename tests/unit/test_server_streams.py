"""Streams that outlive their connection: what a client gets that comes back, and what becomes of one that does not."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.metric_samples import sample_lines
from tests.unit.server_support import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RunningServer,
    events,
    post,
    running_server,
    wait_until,
)

STREAMS = "/v1/streams"
NUM_TOKENS = 40
KEYS = "- {name: ann, key: key-of-ann}\n- {name: bob, key: key-of-bob}\n"


@pytest.fixture
def patient(server: RunningServer) -> RunningServer:
    """A server whose engine takes its time for each token of a long answer."""
    server.engine.script = lambda request: f"{request.sampling.choice_index} " + "the quick brown fox é " * 20
    server.engine.step_seconds = 0.003
    return server


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    what = {"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES}
    return {**what, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, **fields}


def take(response: httpx.Response, number: int) -> list[tuple[int, str]]:
    """Return the stream's first events, at most so many, with their ids."""
    return take_from(response.iter_lines(), number)


def take_from(lines: Iterator[str], number: int) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    event_id = 0
    for line in lines:
        if line.startswith("id: "):
            event_id = int(line.removeprefix("id: "))
        elif line:
            found.append((event_id, line.removeprefix("data: ")))
        if len(found) == number:
            break
    return found


def begin(server: RunningServer, path: str, number: int, **fields: Any) -> list[tuple[int, str]]:
    """Open a stream, and leave it after so many events."""
    with httpx.stream("POST", server.url + path, json=body_of(path, **fields), timeout=30) as response:
        return take(response, number)


def begin_unfinished(server: RunningServer, path: str, number: int, **fields: Any) -> list[tuple[int, str]]:
    """Open a stream, and leave it after so many events, before its end; return when the server knows."""
    server.engine.holds_after = number + 5
    found = begin(server, path, number, **fields)
    assert wait_until(lambda: server.client.num_in_flight == 0)
    server.engine.holds_after = None
    return found


def go_on(server: RunningServer, stream_id: str, last: int | None, number: int = 10**9) -> list[tuple[int, str]]:
    headers = {} if last is None else {"last-event-id": str(last)}
    with httpx.stream("GET", f"{server.url}{STREAMS}/{stream_id}", headers=headers, timeout=30) as response:
        assert response.status_code == 200
        return take(response, number)


def id_of(found: list[tuple[int, str]]) -> str:
    stream_id: str = json.loads(found[0][1])["id"]
    return stream_id


def without_identity(found: list[tuple[int, str]]) -> list[Any]:
    """Return the events' contents but for what differs from one request to another."""
    contents = [(number, data if data == "[DONE]" else json.loads(data)) for number, data in found]
    for _, content in contents:
        if isinstance(content, dict):
            content["id"] = content["created"] = None
    return contents


def refusal(server: RunningServer, stream_id: str, last: str | None = None, key: str = "none") -> tuple[int, Any]:
    headers: dict[str, Any] = {"authorization": f"Bearer {key}"} | (
        {} if last is None else {"last-event-id": last.encode("latin-1")}
    )
    answer = httpx.get(f"{server.url}{STREAMS}/{stream_id}", headers=headers, timeout=30)
    return answer.status_code, answer.json()["error"]


def metric(server: RunningServer, name: str) -> float:
    lines = sample_lines(httpx.get(f"{server.url}/metrics").text)
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"ryzanstein_{name}"))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {}),
        (COMPLETIONS, {"n": 3, "logprobs": 2, "echo": True, "return_token_ids": True}),
        (COMPLETIONS, {"stop": "fox", "n": 2}),
        (CHAT, {"stream_options": {"include_usage": True}}),
        (CHAT, {"n": 2, "logprobs": True, "top_logprobs": 1}),
    ],
)
def test_a_stream_cut_anywhere_goes_on_as_if_it_had_not_been(
    patient: RunningServer, path: str, fields: dict[str, Any]
) -> None:
    with httpx.stream("POST", patient.url + path, json=body_of(path, **fields), timeout=30) as response:
        whole = take(response, 10**9)
    assert [number for number, _ in whole] == list(range(1, len(whole) + 1))
    for cuts in ([1], [len(whole) // 2], [2, 3, len(whole) // 3], [len(whole) - 1]):
        found = begin(patient, path, cuts[0], **fields)
        stream_id = id_of(found)
        for cut in cuts[1:]:
            found += go_on(patient, stream_id, found[-1][0], cut - len(found))
        found += go_on(patient, stream_id, found[-1][0])
        assert without_identity(found) == without_identity(whole)


def test_a_stream_that_nobody_reads_leaves_the_engine_and_is_no_end(patient: RunningServer) -> None:
    stream_id = id_of(begin_unfinished(patient, COMPLETIONS, 5, n=2))
    assert wait_until(lambda: len(patient.engine.aborted) == 2)
    assert (metric(patient, "streams_kept "), metric(patient, "stream_resumptions_total")) == (1, 0)
    assert metric(patient, "request_success_total") == 0
    assert go_on(patient, stream_id, None)[-1][1] == "[DONE]"
    assert metric(patient, "stream_resumptions_total") == 1
    assert metric(patient, 'request_success_total{finished_reason="length"}') == 2
    assert metric(patient, 'request_success_total{finished_reason="abort"}') == 0


def test_a_stream_goes_on_behind_what_the_server_had_of_it(patient: RunningServer) -> None:
    found = begin_unfinished(patient, COMPLETIONS, 20, return_token_ids=True)
    go_on(patient, id_of(found), 20)
    first, second = patient.engine.requests
    assert second.prompt_token_ids == first.prompt_token_ids
    assert len(second.received_token_ids) >= 20
    assert second.sampling == first.sampling


def test_a_stream_that_ended_can_be_read_again(server: RunningServer) -> None:
    whole = [(number + 1, data) for number, data in enumerate(events(post(server, COMPLETIONS, body_of(COMPLETIONS))))]
    stream_id = id_of(whole)
    assert go_on(server, stream_id, None) == go_on(server, stream_id, 0) == whole
    assert go_on(server, stream_id, len(whole) - 3) == whole[-3:]
    assert len(server.engine.requests) == 1
    end = httpx.get(f"{server.url}{STREAMS}/{stream_id}", headers={"last-event-id": str(len(whole))})
    assert (end.status_code, end.content) == (204, b"")


def test_an_error_is_an_event_that_comes_again(server: RunningServer) -> None:
    server.engine.fails_after = 3
    *chunks, error = events(post(server, COMPLETIONS, body_of(COMPLETIONS)))
    assert json.loads(error)["error"]["message"] == "scripted failure"
    stream_id = json.loads(chunks[0])["id"]
    assert go_on(server, stream_id, len(chunks)) == [(len(chunks) + 1, error)]


def test_an_error_before_the_first_event_leaves_no_stream(server: RunningServer) -> None:
    server.engine.fails_after = 0
    assert post(server, COMPLETIONS, body_of(COMPLETIONS)).status_code == 500
    assert metric(server, "streams_kept") == 0


def test_an_engine_lost_for_good_is_the_last_event_of_a_stream_that_is_gone_on_with(patient: RunningServer) -> None:
    found = begin_unfinished(patient, COMPLETIONS, 5)
    patient.fail("all is lost")
    rest = go_on(patient, id_of(found), found[-1][0])
    assert json.loads(rest[-1][1])["error"] == {
        "message": "all is lost", "type": "service_unavailable", "param": None, "code": "engine_not_ready",
    }  # fmt: skip


@pytest.mark.parametrize("last", ["10000", "x", "-1", "1.0", "", "9" * 30, "²"])
def test_an_id_that_no_event_has_is_refused(server: RunningServer, last: str) -> None:
    stream_id = json.loads(events(post(server, COMPLETIONS, body_of(COMPLETIONS)))[0])["id"]
    status, error = refusal(server, stream_id, last)
    assert (status, error["param"]) == (400, "Last-Event-ID")
    assert "Last-Event-ID" in error["message"]


def test_a_stream_that_never_was_is_not_found(server: RunningServer) -> None:
    status, error = refusal(server, "cmpl-none")
    assert (status, error["code"]) == (404, "stream_not_found")
    assert "'cmpl-none'" in error["message"]
    assert "30 s" in error["message"]


def test_a_stream_is_forgotten_when_nobody_came_back_in_time(model: Path) -> None:
    with running_server(model, stream_resume_timeout=0.3) as server:
        stream_id = id_of(begin_unfinished(server, COMPLETIONS, 5, n=3))
        ended = json.loads(events(post(server, COMPLETIONS, body_of(COMPLETIONS)))[0])["id"]
        assert wait_until(lambda: metric(server, "streams_kept") == 0)
        assert metric(server, 'request_success_total{finished_reason="abort"}') == 3
        assert refusal(server, stream_id)[0] == refusal(server, ended)[0] == 404
        assert server.client.num_in_flight == 0


def test_streams_are_not_kept_where_that_is_switched_off(model: Path) -> None:
    with running_server(model, stream_resume_timeout=0) as server:
        stream_id = id_of(begin_unfinished(server, COMPLETIONS, 5))
        assert wait_until(lambda: metric(server, 'request_success_total{finished_reason="abort"}') == 1)
        status, error = refusal(server, stream_id)
        assert (status, "not kept here" in error["message"]) == (404, True)
        assert events(post(server, COMPLETIONS, body_of(COMPLETIONS)))[-1] == "[DONE]"


def test_a_stream_belongs_to_the_key_that_began_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEYS)
    with running_server(model, api_key_file=str(tmp_path / "keys")) as server:
        header = {"authorization": "Bearer key-of-ann"}
        answer = httpx.post(server.url + COMPLETIONS, json=body_of(COMPLETIONS), headers=header, timeout=30)
        stream_id = json.loads(events(answer)[0])["id"]
        assert refusal(server, stream_id, key="key-of-nobody")[0] == 401
        assert refusal(server, stream_id, key="key-of-bob") == refusal_of_a_missing_one(server, stream_id)
        again = httpx.get(f"{server.url}{STREAMS}/{stream_id}", headers=header, timeout=30)
        assert events(again) == events(answer)


def refusal_of_a_missing_one(server: RunningServer, stream_id: str) -> tuple[int, Any]:
    status, error = refusal(server, "cmpl-missing", key="key-of-bob")
    return status, {**error, "message": error["message"].replace("cmpl-missing", stream_id)}


def test_who_comes_back_takes_the_stream_over_from_a_connection_that_seems_open(patient: RunningServer) -> None:
    patient.engine.holds_after = 20
    with httpx.stream("POST", patient.url + COMPLETIONS, json=body_of(COMPLETIONS), timeout=30) as old:
        lines = old.iter_lines()
        found = take_from(lines, 5)
        with httpx.stream("GET", f"{patient.url}{STREAMS}/{id_of(found)}", headers={"last-event-id": "5"}) as new:
            assert new.status_code == 200
            new_lines = new.iter_lines()
            found += take_from(new_lines, 1)
            patient.engine.holds_after = None
            found += take_from(new_lines, 10**9)
        with pytest.raises(httpx.TransportError):
            for _ in lines:
                pass
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    assert found[-1][1] == "[DONE]"
    assert patient.engine.aborted == []  # nothing had to begin again


def test_of_many_that_come_back_at_once_the_last_gets_the_stream(patient: RunningServer) -> None:
    stream_id = id_of(begin_unfinished(patient, COMPLETIONS, 5))
    patient.engine.holds_after = 10
    ends: list[bool] = []

    def come_back() -> None:
        try:
            ends.append(go_on(patient, stream_id, 5)[-1][1] == "[DONE]")
        except httpx.TransportError:
            ends.append(False)

    threads = [threading.Thread(target=come_back) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: metric(patient, "stream_resumptions_total") == len(threads))
    patient.engine.holds_after = None
    for thread in threads:
        thread.join(30)
    assert sorted(ends) == [False] * 4 + [True]
    assert patient.client.num_in_flight == 0


@pytest.fixture
def tight(model: Path) -> Iterator[RunningServer]:
    """A server that keeps few streams."""
    with running_server(model, stream_resume_memory=30_000) as server:
        yield server


def test_what_nobody_has_read_for_longest_goes_first(tight: RunningServer) -> None:
    ids = [json.loads(events(post(tight, COMPLETIONS, body_of(COMPLETIONS)))[0])["id"] for _ in range(10)]
    statuses = [httpx.get(f"{tight.url}{STREAMS}/{stream_id}").status_code for stream_id in ids]
    assert statuses == sorted(statuses, reverse=True)
    assert (statuses[0], statuses[-1]) == (404, 200)
    assert metric(tight, "streams_kept_bytes") <= 30_000


def test_a_stream_that_is_too_large_to_be_kept_is_sent_whole_all_the_same(tight: RunningServer) -> None:
    found = events(post(tight, COMPLETIONS, body_of(COMPLETIONS, n=8, max_tokens=200)))
    assert found[-1] == "[DONE]"
    assert refusal(tight, json.loads(found[0])["id"])[0] == 404
    assert metric(tight, "streams_kept_bytes") == 0
