from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from engine.protocol.channel import Channel
from engine.protocol.messages import Message, RequestBatch, Start

Open = Callable[..., Channel]


@pytest.fixture
def open_channel() -> Iterator[Open]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    opened: list[Channel] = []

    def open_one(epoch: int | None, *receives: type[Message]) -> Channel:
        opened.append(Channel(context, epoch, *receives))
        return opened[-1]

    yield open_one
    for channel in opened:
        channel.close()
    context.destroy(linger=0)


def linked(open_channel: Open, tmp_path: Path, receiver_epoch: int | None) -> tuple[Channel, Channel]:
    receiver = open_channel(receiver_epoch, RequestBatch, Start)
    sender = open_channel(1)
    sender.connect(receiver.bind(f"ipc://{tmp_path}/link"))
    return sender, receiver


def test_messages_arrive_in_order_even_when_the_sender_connects_first(open_channel: Open, tmp_path: Path) -> None:
    sender = open_channel(1)
    sender.connect(f"ipc://{tmp_path}/link")
    for number in range(1000):
        sender.send(RequestBatch(epoch=1, aborted=[str(number)]))
    receiver = open_channel(1, RequestBatch)
    receiver.bind(f"ipc://{tmp_path}/link")
    received = [receiver.receive(5) for _ in range(1000)]
    assert [message.aborted[0] for message in received if isinstance(message, RequestBatch)] == [
        str(number) for number in range(1000)
    ]


def test_messages_of_another_epoch_are_dropped(open_channel: Open, tmp_path: Path) -> None:
    sender, receiver = linked(open_channel, tmp_path, 2)
    sender.send(RequestBatch(epoch=1, aborted=["old"]))
    sender.send(RequestBatch(epoch=2, aborted=["new"]))
    assert receiver.receive(5) == RequestBatch(epoch=2, aborted=["new"])
    assert receiver.receive(0) is None


def test_a_channel_without_an_epoch_takes_every_epoch(open_channel: Open, tmp_path: Path) -> None:
    sender, receiver = linked(open_channel, tmp_path, None)
    for epoch in (1, 2):
        sender.send(Start(epoch=epoch, num_kv_blocks=1, max_model_len=16))
    received = [receiver.receive(5), receiver.receive(5)]
    assert [message.epoch for message in received if message is not None] == [1, 2]


def test_receiving_gives_up_after_the_timeout(open_channel: Open, tmp_path: Path) -> None:
    _, receiver = linked(open_channel, tmp_path, 1)
    assert receiver.receive(0.01) is None


def test_a_tcp_channel_reports_the_port_it_got(open_channel: Open) -> None:
    receiver = open_channel(1, RequestBatch)
    endpoint = receiver.bind("tcp://127.0.0.1:*")
    assert endpoint.startswith("tcp://127.0.0.1:")
    sender = open_channel(1)
    sender.connect(endpoint)
    sender.send(RequestBatch(epoch=1))
    assert receiver.receive(5) == RequestBatch(epoch=1)
