import pytest

from engine.protocol.codec import Decoder, ProtocolError, encode
from engine.protocol.messages import (
    FinishReason,
    GroupState,
    GroupStatus,
    HistogramDelta,
    Message,
    RankInfo,
    RankReport,
    RankStats,
    Request,
    RequestBatch,
    SamplingParams,
    ScheduledRow,
    ScheduledStep,
    SchedulerStats,
    Start,
    StatsReport,
    TokenBatch,
    TokenOutput,
)

RANK_STATS = RankStats(3, 1, {"all_reduce": HistogramDelta([0, 2, 1], 0.5)}, {"resident": 10})
MESSAGES: list[Message] = [
    RequestBatch(3, [Request("a", [1, 2], SamplingParams(max_tokens=4, seed=2**64 - 1))], ["b"]),
    TokenBatch(3, 9, [TokenOutput("a", [5], FinishReason.STOP, queue_seconds=0.25)]),
    ScheduledStep(3, 9, [ScheduledRow("a", True, [1, 2], [0], 0, 2, True)], ["z"]),
    StatsReport(3, SchedulerStats(1, 2, 3, 4, 5, 6, 7), [RANK_STATS]),
    RankReport(3, RANK_STATS, [0.25, 0.5]),
    GroupStatus(3, GroupState.READY, [RankInfo(0, 11, "host", "cpu")], "ipc:///x", 64, 8, {"weights": 5}),
    Start(3, 8, 64),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert Decoder(type(message), RankStats).decode(encode(message)) == message


def test_a_message_of_another_version_is_refused() -> None:
    payload = bytes((99,)) + encode(MESSAGES[0])[1:]
    with pytest.raises(ProtocolError, match="protocol version 99, expected 1"):
        Decoder(RequestBatch).decode(payload)


def test_a_message_of_another_kind_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not a message expected here"):
        Decoder(TokenBatch).decode(encode(MESSAGES[0]))


@pytest.mark.parametrize("payload", [b"", b"\x01", b"\x01\xc1", b"\x01garbage"])
def test_bytes_that_are_no_message_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder(TokenBatch, StatsReport).decode(payload)
