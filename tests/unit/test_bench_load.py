"""engine.bench: the arithmetic of `bench load`, the touch loop, and checkpoints of random weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.bench import random_checkpoint
from engine.bench.figures import Figure
from engine.bench.load import shares_of
from engine.bench.load_messages import FileRange, LoadSample
from engine.bench.load_report import LoadBenchmark, phase_of
from engine.bench.page_cache import read_files, resident_share
from engine.bench.random_checkpoint import write_random_checkpoint
from engine.bench.shapes import raw_configs
from engine.bench.touch import map_file, touch

SMALL = {
    **raw_configs()["1b"],
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 50,
}


def sample(
    *,
    returned: float = 0.0,
    touched: float = 1.0,
    weight_bytes: int = 1000,
    growth: int = 1000,
    storage: int | None = 0,
) -> LoadSample:
    return LoadSample(
        returned=returned,
        metadata=returned / 2,
        touched=touched,
        weight_bytes=weight_bytes,
        bytes_read=weight_bytes,
        storage_bytes=storage,
        memory_growth=growth,
        peak_growth=2 * growth,
    )


# --- figures ---------------------------------------------------------------------------------------------------------


def test_a_figure_is_the_median_of_its_runs_with_the_least_and_the_most() -> None:
    assert Figure.of([3.0, 1.0, 2.0]) == Figure(median=2.0, min=1.0, max=3.0, values=(3.0, 1.0, 2.0))


def test_times_are_those_of_the_slowest_rank() -> None:
    phase = phase_of(
        [(sample(returned=0.25, touched=2.0), sample(returned=0.5, touched=1.0))], [(sample(), sample(touched=4.0))]
    )
    assert (phase.load_seconds.median, phase.metadata_seconds.median) == (0.5, 0.25)
    assert (phase.touched_seconds.median, phase.plain_seconds.median) == (2.0, 4.0)


def test_rates_are_of_all_ranks_together() -> None:
    phase = phase_of([(sample(returned=1.0, touched=5.0), sample(touched=2.0))], [(sample(), sample(touched=2.0))])
    assert (phase.load_rate.median, phase.plain_rate.median) == (2000 / 5, 2000 / 2)
    assert phase.touch_rate.median == 2000 / 4


def test_shares_compare_each_load_with_the_plain_touch_beside_it() -> None:
    loads = [(sample(returned=1.0, touched=3.0),), (sample(returned=1.0, touched=5.0),)]
    plains = [(sample(touched=1.0),), (sample(touched=2.0),)]
    phase = phase_of(loads, plains)
    assert phase.rate_share.values == (1 / 3, 2 / 5)
    assert phase.touch_share.values == (1 / 2, 2 / 4)


def test_memory_beyond_the_weights_is_a_share_of_them_on_the_worst_rank() -> None:
    phase = phase_of([(sample(growth=1010), sample(weight_bytes=2000, growth=2100))], [(sample(),)])
    assert phase.memory_beyond_share.median == pytest.approx(0.05)
    assert phase.peak_beyond_share.median == pytest.approx(1.1)


def test_what_each_rank_read_from_a_disk_is_a_median_where_the_system_says_it() -> None:
    loads = [(sample(storage=size), sample(storage=2 * size)) for size in (1, 5, 3)]
    plain = (sample(), sample())
    assert phase_of(loads, [plain] * 3).storage_bytes == (3, 6)
    assert phase_of([(sample(storage=None), sample())], [plain]).storage_bytes is None


def test_a_table_without_cold_runs_has_one_column_and_says_why() -> None:
    phase = phase_of([(sample(returned=0.01),)] * 2, [(sample(),)] * 2)
    benchmark = LoadBenchmark(
        path="model",
        form="huggingface",
        saved_tensor_parallel_size=None,
        tensor_parallel_size=1,
        dtype="bfloat16",
        runs=2,
        weight_bytes=(1000,),
        warm=phase,
        cold=None,
        notes=("why",),
    )
    text = benchmark.to_table()
    assert text.startswith("model: Hugging Face checkpoint, loaded by 1 rank in bfloat16\n")
    assert "cold" not in text
    assert text.endswith("\n\nnote: why\n")
    assert json.loads(benchmark.to_json())["warm"]["load_seconds"]["values"] == [0.01, 0.01]
    both = replace(benchmark, cold=phase).to_table()
    assert "load() returned                10.0 ms (10.0 ms to 10.0 ms)            10.0 ms (10.0 ms to 10.0 ms)" in both


# --- files -----------------------------------------------------------------------------------------------------------


def test_shares_of_files_cover_every_byte_once(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 1, "c": 0, "d": 22}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    for count in (1, 2, 3, 7):
        shares = shares_of([tmp_path / name for name in sizes], count)
        assert len(shares) == count
        lengths = [sum(item.stop - item.start for item in share) for share in shares]
        assert max(lengths) - min(lengths) <= 1
        covered = [
            (Path(item.path).name, i) for share in shares for item in share for i in range(item.start, item.stop)
        ]
        assert covered == [(name, index) for name, size in sizes.items() for index in range(size)]


def test_one_share_of_one_file_is_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert shares_of([path], 1) == ((FileRange(path=str(path), start=0, stop=5),),)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/gone: cannot be read: No such file"):
        shares_of([tmp_path / "gone"], 2)


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("stop", [9, 15, 16, 17, 40])
def test_touching_reads_every_byte_wherever_it_lies(start: int, stop: int) -> None:
    content = torch.arange(40, dtype=torch.uint8)
    for index in range(start, stop):
        changed = content.clone()
        changed[index] = 200
        assert touch([changed[start:stop]]) != touch([content[start:stop]])


def test_touching_takes_tensors_of_any_type_and_shape() -> None:
    ones = [torch.ones(2, 4, dtype=dtype) for dtype in (torch.uint8, torch.int64)]
    assert touch([*ones, torch.empty(0)]) == int(torch.ones(8, dtype=torch.uint8).view(torch.int64)) + 8


def test_a_file_that_was_read_is_in_the_page_cache_and_maps_to_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    read_files([path])
    assert resident_share([path]) == 1.0
    assert bytes(map_file(path).tolist()) == path.read_bytes()


# --- random checkpoints ----------------------------------------------------------------------------------------------


def test_a_random_checkpoint_has_the_tensors_of_a_hugging_face_one(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", SMALL)
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == SMALL
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        dtypes = {file.get_tensor(name).dtype for name in shapes}
        norm = file.get_tensor("model.norm.weight")
    assert dtypes == {torch.bfloat16}
    assert shapes["model.embed_tokens.weight"] == (50, 16)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (8, 16)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (16, 24)
    assert "lm_head.weight" not in shapes
    assert len(shapes) == 2 + 9
    assert norm.float().mean().item() == pytest.approx(1, abs=0.1)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(tmp_path / name, SMALL, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_tokenizer_is_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    write_random_checkpoint(tmp_path / "model", SMALL, tokenizer=tmp_path)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert random_checkpoint.main(["1b", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: is there already\n"
