"""A group of ranks that cannot be begun."""

import contextlib
from pathlib import Path

import pytest
import zmq

from engine.orchestrator.group import Group
from engine.orchestrator.handshake import Handshake
from engine.protocol.beats import Beats
from engine.protocol.config import EngineConfig, RankSpec
from tests.configs import model_config


def test_a_group_whose_folder_is_gone_leaves_no_socket_open(tmp_path: Path) -> None:
    engine = EngineConfig(tensor_parallel_size=2)
    spec = RankSpec(engine=engine, epoch=1, run_dir=str(tmp_path / "gone"))
    handshake = Handshake(engine, model_config(), epoch=1)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.closing(Beats(tmp_path / "beats-1", 2)) as beats:
        group = Group(spec, handshake, context, beats, lambda _: None)
        with pytest.raises(zmq.ZMQError), group:
            pass
        are_closed = [socket.closed for socket in group.sockets]
    context.destroy()
    assert are_closed
    assert all(are_closed)
