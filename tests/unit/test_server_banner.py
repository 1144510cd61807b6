"""What is printed once requests are taken."""

from typing import Any

import pytest

from engine.protocol.config import EngineConfig, RankSpec
from engine.protocol.messages import GroupState, GroupStatus, RankInfo
from server.banner import banner


def line(name: str, **options: Any) -> str:
    status = GroupStatus(
        epoch=1,
        state=GroupState.READY,
        ranks=[RankInfo(rank=0, pid=7, host="here", device="cpu", threads="3 threads on CPUs 0-2")],
        kernels="avx2",
    )
    spec = RankSpec(engine=EngineConfig(model="/models/m", **options), epoch=1, run_dir="/run")
    lines = banner(status, spec, "m", "http://127.0.0.1:8000").splitlines()
    (found,) = [words[12:] for words in lines if words[2:12].strip() == name]
    return found


def test_a_rank_is_shown_with_its_threads() -> None:
    assert line("ranks") == "0: pid 7 on here, cpu, 3 threads on CPUs 0-2"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "avx2"),
        ({"batch_invariant": True}, "avx2, batch-invariant"),
        ({"quantization": "int8"}, "avx2, int8 matrices"),
        ({"quantization": "int8", "batch_invariant": True}, "avx2, int8 matrices, batch-invariant"),
    ],
)
def test_what_computes_is_shown_with_what_was_asked_of_it(options: dict[str, Any], shown: str) -> None:
    assert line("kernels", **options) == shown
