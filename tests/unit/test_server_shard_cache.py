import json
import os
import shutil
from pathlib import Path

import pytest

from server.model_source.entry_lock import EntryLock
from server.model_source.shard_cache import CacheKey, ShardCache

MIB = 1 << 20


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    (tmp_path / "shards").mkdir()
    return ShardCache(tmp_path / "shards", 10 * MIB)


def entry_name(number: int) -> str:
    return f"model-tp2-bfloat16-{number:012x}"


def add(cache: ShardCache, number: int, size: int, used_at: float) -> Path:
    """Put an entry there."""
    entry = cache.entry(entry_name(number))
    entry.mkdir()
    (entry / "metadata.json").write_text("{}")
    with (entry / "weights_rank0.safetensors").open("wb") as weights:
        weights.truncate(size - 2)
    lock = cache.lock_path(entry.name)
    lock.touch()
    os.utime(lock, (used_at, used_at))
    return entry


def there(cache: ShardCache) -> list[int]:
    return [number for number in range(10) if cache.entry(entry_name(number)).exists()]


def test_room_that_is_there_costs_nothing(cache: ShardCache) -> None:
    add(cache, 1, 4 * MIB, 1)
    add(cache, 2, 4 * MIB, 2)
    cache.make_room(2 * MIB)
    assert there(cache) == [1, 2]


def test_what_was_not_used_for_longest_goes_first(cache: ShardCache) -> None:
    for number, used_at in ((1, 30), (2, 10), (3, 20)):
        add(cache, number, 3 * MIB, used_at)
    cache.make_room(5 * MIB)
    assert there(cache) == [1]


def test_no_more_goes_than_must(cache: ShardCache) -> None:
    for number, used_at in ((1, 30), (2, 10), (3, 20)):
        add(cache, number, 3 * MIB, used_at)
    cache.make_room(2 * MIB)
    assert there(cache) == [1, 3]


def test_an_entry_that_a_service_uses_stays(cache: ShardCache) -> None:
    for number in (1, 2, 3):
        add(cache, number, 3 * MIB, number)
    lock = EntryLock.try_shared(cache.lock_path(entry_name(1)))
    assert lock is not None
    cache.make_room(3 * MIB)
    assert there(cache) == [1, 3]
    lock.close()


def test_nothing_is_removed_in_vain(cache: ShardCache) -> None:
    for number in (1, 2, 3):
        add(cache, number, 3 * MIB, number)
    lock = EntryLock.try_shared(cache.lock_path(entry_name(2)))
    assert lock is not None
    with pytest.raises(ValueError, match="all others are in use"):
        cache.make_room(8 * MIB)
    assert there(cache) == [1, 2, 3]
    lock.close()


def test_what_is_more_than_the_limit_has_no_room(cache: ShardCache) -> None:
    add(cache, 1, 3 * MIB, 1)
    with pytest.raises(ValueError, match=r"11\.0 MiB are more than --shard-cache-size, 10\.0 MiB"):
        cache.make_room(11 * MIB)
    assert there(cache) == [1]


def test_a_tenth_of_the_disk_is_left_to_others(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1 << 59)
    disk = shutil.disk_usage(tmp_path)
    with pytest.raises(ValueError, match="less than 10% of the disk would be left free"):
        cache.make_room(disk.free - disk.total // 20)


def test_what_others_put_there_is_never_removed(cache: ShardCache) -> None:
    entry = add(cache, 1, 3 * MIB, 1)
    own = entry.rename(cache.root / "my-checkpoint")
    without_lock = add(cache, 2, 3 * MIB, 2)
    cache.lock_path(without_lock.name).unlink()
    (cache.root / ".mine.tmp-1").mkdir()
    cache.make_room(10 * MIB)
    cache.sweep()
    assert own.is_dir()
    assert without_lock.is_dir()
    assert (cache.root / ".mine.tmp-1").is_dir()


def test_what_a_dead_writer_left_is_swept_and_what_a_live_one_has_is_not(cache: ShardCache) -> None:
    left, live = (cache.root / f".{entry_name(number)}.tmp-abc" for number in (1, 2))
    for path in (left, live):
        path.mkdir()
        (path / "weights_rank0.safetensors").touch()
    lock = EntryLock.try_exclusive(cache.lock_path(entry_name(2)))
    assert lock is not None
    cache.sweep()
    assert not left.exists()
    assert live.is_dir()
    lock.close()


def test_many_may_use_an_entry_and_only_one_may_write_it(cache: ShardCache) -> None:
    path = cache.lock_path(entry_name(1))
    users = [EntryLock.try_shared(path), EntryLock.try_shared(path)]
    assert None not in users
    assert EntryLock.try_exclusive(path) is None
    for user in users:
        assert user is not None
        user.close()
    writer = EntryLock.try_exclusive(path)
    assert writer is not None
    assert EntryLock.try_shared(path) is None
    writer.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "llama"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    )
    for name in names:
        (directory / name).write_bytes(bytes(1000))
    return directory


def key(source: Path, tensor_parallel_size: int = 2, dtype: str = "bfloat16") -> CacheKey:
    return CacheKey(source=source, tensor_parallel_size=tensor_parallel_size, dtype=dtype, stored_dtype="bfloat16")


def test_a_name_says_what_an_entry_is(source: Path) -> None:
    assert key(source).name.startswith("llama-tp2-bfloat16-")
    assert key(source).name == key(source).name
    names = {key(source).name, key(source, 4).name, key(source, dtype="float32").name}
    assert len(names) == 3


def test_a_model_of_the_hub_is_called_as_there(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    assert key(snapshot).name.startswith("org--name-tp2-bfloat16-")


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors"])
def test_another_version_is_another_entry(name: str, source: Path) -> None:
    before = key(source).name
    os.utime(source / name, ns=(1, 1))
    touched = key(source).name
    (source / name).write_bytes(bytes(1001))
    os.utime(source / name, ns=(1, 1))
    assert len({before, touched, key(source).name}) == 3


def test_a_link_to_a_directory_is_the_directory(source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(source)
    assert key(link).name == key(source).name


def test_an_entry_is_as_large_as_its_weights_in_its_type(source: Path) -> None:
    assert key(source).weight_bytes == 2000
    assert 2000 <= key(source).entry_bytes < 2200
    assert 4000 <= key(source, dtype="float32").entry_bytes < 4400
