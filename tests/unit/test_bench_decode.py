"""engine.bench: what a step must read and compute, what a rank's memory is, and how decode and limits are reported."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bench.decode import step_seconds
from engine.bench.decode_costs import ModelCosts, StepCost
from engine.bench.decode_memory import RankMemory, bare_memory, rank_memory
from engine.bench.decode_report import DecodeBenchmark, Ratio, Row, SetupReport
from engine.bench.engine_process import Arrival
from engine.bench.figures import Figure, aligned
from engine.bench.limits import CHUNK_BYTES, LimitMeter, core_counts
from engine.bench.limits_report import Limit, LimitsBenchmark
from engine.kernels.instruction_sets import usable_instruction_sets
from engine.kernels.library import KernelLibrary
from engine.protocol.commands import BenchDecodeCommand
from tests.configs import model_config

# 16 wide, 4 query and 2 KV heads of 4, 32 intermediate, vocabulary 100, 2 layers.
BLOCK = 16 * 16 + 2 * (8 * 16) + 16 * 16 + 3 * 16 * 32  # q, k and v, o, then gate, up and down
NORMS = 2 * 2 * 16 + 16
HEAD = 100 * 16


def costs(tp_size: int = 1, dtype: torch.dtype = torch.float32, **fields: Any) -> ModelCosts:
    return ModelCosts.of(model_config(**{"num_hidden_layers": 2, **fields}), tp_size, dtype)


# --- what a step must do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_all_weights_but_the_embedding_of_which_it_reads_rows(tied: bool) -> None:
    found = costs(tie_word_embeddings=tied).decode(3, 0)
    assert found.read_bytes == 4 * (2 * BLOCK + NORMS + HEAD + 3 * 16)


def test_keys_and_values_of_each_sequence_are_read_up_to_its_context() -> None:
    per_token = 2 * 2 * (2 * 4) * 4  # layers, keys and values, two KV heads of 4, float32
    found = costs()
    assert found.decode(3, 50).read_bytes - found.decode(3, 0).read_bytes == 3 * 50 * per_token


def test_each_token_passes_the_blocks_and_only_what_samples_passes_the_head() -> None:
    found = costs()
    assert found.decode(3, 50).operations == 2 * 3 * (2 * BLOCK + HEAD)
    assert found.prefill(40).operations == 2 * (40 * 2 * BLOCK + HEAD)


def test_half_as_wide_numbers_are_half_as_many_bytes_and_as_many_operations() -> None:
    wide, narrow = costs().decode(2, 10), costs(dtype=torch.bfloat16).decode(2, 10)
    assert (2 * narrow.read_bytes, narrow.operations) == (wide.read_bytes, wide.operations)


def test_a_split_model_costs_as_much_and_its_norms_on_each_rank() -> None:
    one, two = costs(), costs(tp_size=2)
    assert two.block_numbers == one.block_numbers
    assert two.kv_token_bytes == one.kv_token_bytes
    assert two.weight_bytes == one.weight_bytes + 4 * NORMS


def test_key_value_heads_that_several_ranks_hold_count_on_each() -> None:
    one, four = costs(), costs(tp_size=4)
    assert four.block_numbers - one.block_numbers == 2 * 2 * (8 * 16)
    assert four.kv_token_bytes == 2 * one.kv_token_bytes


def test_biases_are_read_and_multiply_nothing() -> None:
    plain, biased = costs(), costs(qkv_bias=True)
    assert biased.weight_bytes - plain.weight_bytes == 4 * 2 * (16 + 8 + 8)
    assert biased.block_numbers == plain.block_numbers


def test_int8_matrices_are_a_byte_a_number_and_a_scale_a_row() -> None:
    plain = costs(dtype=torch.bfloat16)
    int8 = ModelCosts.of(model_config(num_hidden_layers=2), 1, torch.bfloat16, "int8")
    rows = 2 * (16 + 2 * 8 + 16 + 2 * 32 + 16) + 100
    assert int8.weight_bytes == 2 * BLOCK + HEAD + 4 * rows + 2 * NORMS
    assert int8.decode(3, 50).operations == plain.decode(3, 50).operations


# --- times -----------------------------------------------------------------------------------------------------------


def test_a_step_is_the_mean_between_steps_that_served_everyone_without_the_first_two() -> None:
    moments = [(0.0, 1), (1.0, 3), (5.0, 3), (6.0, 3), (6.5, 3), (7.0, 3), (9.0, 3), (20.0, 2)]
    assert step_seconds([Arrival(*moment) for moment in moments], 3) == (9.0 - 6.0) / 3


# --- memory ----------------------------------------------------------------------------------------------------------

SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                3000 kB
7f0000400000-7f0000500000 r--p 00000000 08:01 42                         /model/weights_rank0.safetensors
Size:               1024 kB
Rss:                1000 kB
7f0000500000-7f0000600000 rw-p 00000000 00:00 0                          [heap]
Size:               1024 kB
Rss:                 500 kB
"""


def test_what_is_neither_weights_nor_cache_nor_torch_is_beyond(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps").write_text(SMAPS)
    memory = rank_memory(7, weights=1000 << 10, kv_cache=4000 << 10, proc=tmp_path)
    # 96 kB of the mapping that holds the cache may be something else.
    assert memory == RankMemory(resident=4500 << 10, weights=1000 << 10, kv_cache=(3000 - 96) << 10)
    assert memory.beyond(96 << 10) == 500 << 10
    assert memory.share_beyond(96 << 10) == pytest.approx(500 / 3904)


def test_a_cache_that_no_mapping_can_hold_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps").write_text(SMAPS)
    assert rank_memory(7, weights=0, kv_cache=1 << 30, proc=tmp_path).kv_cache == 0


def test_a_process_that_imported_torch_takes_some_memory() -> None:
    assert 10 << 20 < bare_memory() < 2 << 30


# --- limits ----------------------------------------------------------------------------------------------------------


def test_cores_are_doubled_up_to_all_of_them() -> None:
    assert [core_counts(count) for count in (1, 2, 3, 8, 12)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4, 8),
        (1, 2, 4, 8, 12),
    ]


@pytest.mark.parametrize("instruction_set", [item.name for item in usable_instruction_sets()])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_read_loop_reads_every_word_once(instruction_set: str, threads: int) -> None:
    library = KernelLibrary(instruction_set)
    words = torch.randint(-(2**62), 2**62, (3 * CHUNK_BYTES // 8 + 8,))
    words = words[(-words.data_ptr() % 64) // 8 :][: 3 * CHUNK_BYTES // 8]
    total = torch.zeros(1, dtype=torch.int64)
    pool = library.create_pool(threads, None, 0.0)
    library.function("read_memory")(pool, total.data_ptr(), words.data_ptr(), 3)
    assert total.item() == words.sum().item()


@pytest.mark.slow
def test_what_a_machine_reads_and_multiplies_is_measured_in_each_type() -> None:
    meter = LimitMeter((1,), ("float32", "bfloat16", "float16", "int8"))
    assert meter.reader(1).rate() > 1e8
    assert all(meter.multiplier(dtype, 1).rate() > 1e8 for dtype in ("float32", "bfloat16", "float16", "int8"))


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("0",), ("x",), ("1", "-2"), ("9" * 20,)])
@pytest.mark.parametrize("name", ["batch", "context", "prefill"])
def test_what_is_no_number_is_refused_by_the_options_name(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be numbers between 1 and "):
        BenchDecodeCommand(model="m", **{name: words})  # type: ignore[arg-type]


def test_one_rank_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(ValueError, match="--compare compares several ranks with one"):
        BenchDecodeCommand(model="m", compare=True)


# --- reports ---------------------------------------------------------------------------------------------------------

ONE = Figure.of([0.5])
ROW = Row(
    phase="decode",
    batch=8,
    context=256,
    num_steady=1,
    step_seconds=ONE,
    tokens_per_second=Figure.of([16.0]),
    cost=StepCost(read_bytes=2 << 30, operations=3_000_000_000),
    read_seconds=Figure.of([0.25]),
    compute_seconds=Figure.of([0.1]),
    roof_share=ONE,
    transfer_share=None,
    waiting_share=None,
)
SETUP = SetupReport(
    name="1 rank, 2 threads",
    tensor_parallel_size=1,
    threads=2,
    batch_invariant=False,
    cores=2,
    rows=(
        ROW,
        replace(
            ROW,
            phase="prefill",
            batch=1,
            num_steady=0,
            transfer_share=Figure.of([0.04]),
            waiting_share=Figure.of([0.07]),
        ),
    ),
    memory=(RankMemory(resident=900 << 20, weights=400 << 20, kv_cache=100 << 20),),
)
BENCHMARK = DecodeBenchmark(
    path="model",
    dtype="bfloat16",
    quantization="none",
    kernels="auto",
    runs=1,
    steps=16,
    setups=(SETUP,),
    ratios=(Ratio(of="a", over="b", row="decode 8 x 256", speed_up=ONE, roof_ratio=ONE, share=Figure.of([1.0])),),
    limits=(Limit(kind="read", cores=1, way="C++ loop", rate=Figure.of([3e10])),),
    bare_memory=200 << 20,
)


def test_a_table_has_each_step_beside_its_roof() -> None:
    blocks = BENCHMARK.to_table().split("\n\n")
    name, heading, decode, prefill, memory = blocks[1].splitlines()
    assert name == "1 rank, 2 threads"
    cells = ["decode 8 x 256", "1", "500.0 ms", "16.0", "2.0 GiB", "3.0 Gop", "250.0 ms", "100.0 ms", "50.0%"]
    assert re.split(r"  +", decode) == cells
    assert prefill.startswith("prefill 256     unsteady  ")
    assert re.split(r"  +", prefill)[-2:] == ["4.0%", "7.0%"]
    assert heading.index("of the roof") == decode.index("50.0%")
    assert memory.endswith("200.0 MiB of a process that imported torch: 200.0 MiB more, 40.0% of weights and KV cache")
    assert blocks[2] == "a over b, decode 8 x 256: 0.50 x; the roofs' ratio 0.50 x; share 100.0%"
    assert blocks[3] == "limit of 1 core, read: 30.00 GB/s, C++ loop\n"


def test_a_rank_smaller_than_torch_has_less_than_nothing_beyond() -> None:
    small = replace(SETUP, memory=(RankMemory(resident=500 << 20, weights=300 << 20, kv_cache=100 << 20),))
    assert "imported torch: 100.0 MiB less, -25.0% of" in replace(BENCHMARK, setups=(small,)).to_table()


def test_documents_hold_all_figures() -> None:
    found = json.loads(BENCHMARK.to_json())
    assert found["setups"][0]["rows"][0]["cost"] == {"read_bytes": 2 << 30, "operations": 3_000_000_000}
    assert found["ratios"][0]["share"]["values"] == [1.0]
    limits = LimitsBenchmark(num_cpus=2, kernels="avx2", runs=1, limits=BENCHMARK.limits)
    assert json.loads(limits.to_json())["limits"][0]["rate"]["median"] == 3e10


def test_limits_are_a_line_a_kind_and_a_column_a_number_of_cores() -> None:
    limits = tuple(
        Limit(kind=kind, cores=cores, way="way", rate=Figure.of([cores * 1e9]))
        for kind in ("read", "int8")
        for cores in (2, 1)
    )
    assert LimitsBenchmark(num_cpus=2, kernels="avx2", runs=1, limits=limits).to_table().splitlines()[2:] == [
        "               1 core          2 cores",
        "read memory    1.00 GB/s, way  2.00 GB/s, way",
        "multiply int8  1 Gop/s, way    2 Gop/s, way",
    ]


def test_columns_begin_below_each_other() -> None:
    assert aligned([("a", "bb", ""), ("ccc", "d", "e")]) == ["a    bb", "ccc  d   e"]
