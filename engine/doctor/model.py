"""The model directory, as the ranks would read it."""

import errno
import os
import time
from itertools import islice
from pathlib import Path

import torch

from engine.checkpoint.distributor import refuse_quantized
from engine.checkpoint.integrity import checksum_problems
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.problems import header_problems, value_problems
from engine.checkpoint.source import TensorSource
from engine.checkpoint.sources import open_source
from engine.communication.handler import CommunicationHandler
from engine.doctor.software import CPUINFO, cpu_flags, has_half_precision
from engine.doctor.subject import Subject
from engine.models.llama import LlamaForCausalLM
from engine.models.registry import build_model
from engine.parallel.base import padded_to
from engine.protocol.checks import Check, Finding, MissingBasisError, failure, ok, skipped, warning
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import is_distributed
from engine.protocol.units import format_bytes, format_count, format_seconds
from engine.worker.device import choose_dtype

SECTION = "model"
SHOWN_PROBLEMS = 5
PROBES = 256  # places in the weight files that the page cache is asked about
SPEED_BYTES = 64 << 20  # read to measure a disk


def checks(subject: Subject) -> list[Check]:
    """Return this section's checks; only distributed checkpoints have checksums."""
    has_checksums = _has_checksums(Path(subject.engine.model))
    checksums = [Check(SECTION, "checksums", lambda: _checksums(subject))] if has_checksums else []
    return [
        Check(SECTION, "config.json", lambda: _config(subject)),
        Check(SECTION, "split", lambda: _split(subject)),
        Check(SECTION, "context", lambda: _context(subject)),
        Check(SECTION, "weight files", lambda: _files(subject)),
        *checksums,
        Check(SECTION, "tensors", lambda: _tensors(subject)),
        Check(SECTION, "tensor values", lambda: _values(subject)),
        Check(SECTION, "number type", lambda: _dtype(subject)),
        Check(SECTION, "page cache", lambda: _page_cache(subject)),
    ]


def _has_checksums(directory: Path) -> bool:
    try:
        return is_distributed(directory)
    except OSError:  # which the other checks come upon too
        return False


def _config(subject: Subject) -> Finding:
    config = ModelConfig.from_directory(subject.engine.model)
    subject.model = config
    return ok(
        f"{config.architecture}: {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{config.num_attention_heads} query heads, {config.num_key_value_heads} KV heads, "
        f"vocabulary {config.vocab_size}"
    )


def _split(subject: Subject) -> Finding:
    config, size = subject.usable_model(), subject.tp_size
    config.check_tensor_parallel_size(size)
    subject.is_split = True
    if size == 1:
        return ok("one rank holds all")
    kv_heads = config.local_kv_heads(size)
    shared = f", each held by {size // config.num_key_value_heads} ranks" if size > config.num_key_value_heads else ""
    paddings = [
        f"{name} padded from {number} to {padded_to(number, size)}"
        for name, number in (("vocabulary", config.vocab_size), ("MLP", config.intermediate_size))
        if number % size
    ]
    heads = f"{size} ranks of {config.num_attention_heads // size} query heads and {kv_heads} KV heads{shared}"
    return ok("; ".join([heads, *(paddings or ["nothing padded"])]))


def _context(subject: Subject) -> Finding:
    config, asked = subject.usable_model(), subject.engine.max_model_len
    config.check_max_model_len(asked)
    rope = config.rope.rope_type
    stretched = "" if rope == "default" else f", positions stretched by {rope} x{config.rope.factor:g}"
    limit = "" if asked is None else f"; --max-model-len {asked}"
    longest, positions = config.longest_context, config.max_position_embeddings
    window = "" if longest == positions else f", one sliding window of its {positions} positions"
    return ok(f"{longest} tokens{window}{stretched}{limit}")


def _files(subject: Subject) -> Finding:
    """Open every file: its header is read, and its length compared with it."""
    directory = Path(subject.engine.model)
    if not directory.is_dir():
        raise MissingBasisError("a model directory")
    with open_source(directory) as source:
        paths = source.open_all()
    subject.are_files_whole = True
    total = sum(path.stat().st_size for path in paths)
    return ok(f"{len(paths)} whole safetensors file(s), {format_bytes(total)}")


def _checksums(subject: Subject) -> Finding:
    """Read every byte of every file."""
    directory = Path(subject.engine.model)
    if not subject.are_files_whole:
        raise MissingBasisError("whole weight files")
    metadata = CheckpointMetadata.read(directory)
    problems = list(islice(checksum_problems(directory, metadata), SHOWN_PROBLEMS + 1))
    if problems:
        subject.are_files_whole = False
        more = ["…"] if len(problems) > SHOWN_PROBLEMS else []
        return failure("; ".join(problems[:SHOWN_PROBLEMS] + more), "copy the checkpoint again")
    return ok(f"those of {len(metadata.files)} file(s) are as when they were written")


def _tensors(subject: Subject) -> Finding:
    subject.usable_model()
    if not subject.are_files_whole:
        raise MissingBasisError("whole weight files")
    directory = Path(subject.engine.model)
    with open_source(directory) as source:
        refuse_quantized(directory, source.quantization, subject.engine.quantization)
        model = _stored_model(subject, source)
        problems = list(islice(header_problems(model, source), SHOWN_PROBLEMS + 1))
    if problems:
        more = ["…"] if len(problems) > SHOWN_PROBLEMS else []
        return failure("; ".join(problems[:SHOWN_PROBLEMS] + more), "download the model again, all from one revision")
    subject.are_weights_whole = True
    count = sum(parameter.numel() for parameter in model.parameters())
    return ok(f"{format_count(count)} parameters; every name, shape and type is as config.json asks")


def _values(subject: Subject) -> Finding:
    if not subject.are_weights_whole:
        raise MissingBasisError("whole weights")
    with open_source(Path(subject.engine.model)) as source:
        problems = list(islice(value_problems(_stored_model(subject, source), source), 1))
    if problems:
        return failure(problems[0])
    return ok("tied tensors are equal, and what float16 would round fits it, where there are such")


def _stored_model(subject: Subject, source: TensorSource) -> LlamaForCausalLM:
    """Return the model as one rank would hold it, but for matrices that are yet to be quantized, without memory."""
    device = torch.device("meta")
    config = subject.usable_model()
    dtype, group = choose_dtype(subject.engine, config), CommunicationHandler(device)
    return build_model(config, group, device=device, dtype=dtype, quantization=source.quantization)


def _dtype(subject: Subject) -> Finding:
    config = subject.usable_model()
    dtype = choose_dtype(subject.engine, config)
    name = str(dtype).removeprefix("torch.")
    found = f"{name}, as stored" if name == config.dtype else f"{name}; stored as {config.dtype}"
    on_cpu = subject.device(0).type == "cpu"
    if on_cpu and dtype.itemsize == 2 and not has_half_precision(name, cpu_flags(CPUINFO)):
        return warning(
            f"{found}; this processor has no instructions for it", "--dtype float32 may be faster, if it fits"
        )
    return ok(found)


def _page_cache(subject: Subject) -> Finding:
    """Ask which of the weights are in memory already; where they are not, measure what reads them."""
    if not subject.are_weights_whole:
        raise MissingBasisError("whole weights")
    with open_source(Path(subject.engine.model)) as source:
        paths = source.open_all()
    share = cached_share(paths)
    if share is None:
        return skipped("the file system does not tell")
    if share > 0.99:
        return ok("all weights are in it: loading reads no disk")
    size = sum(path.stat().st_size for path in paths)
    speed = read_speed(max(paths, key=lambda path: path.stat().st_size))
    seconds = (1 - share) * size / speed
    rest = f"{format_bytes(speed)}/s: about {format_seconds(seconds)}"
    return ok(f"{share:.0%} of the weights are in it; the rest is read at {rest}")


def cached_share(paths: list[Path]) -> float | None:
    """Return which share of the files is in the page cache, by samples; None where the file system cannot say."""
    hits = samples = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            for index in range(PROBES):
                found = _is_cached(file.fileno(), size * index // PROBES)
                if found is None:
                    return None
                hits, samples = hits + found, samples + 1
    return hits / samples


def _is_cached(descriptor: int, offset: int) -> bool | None:
    for _ in range(2):  # a page that marks where to read ahead refuses once, though it is there
        try:
            return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                return None
            raise
    return False


def read_speed(path: Path) -> float:
    """Return the bytes a second at which the end of a file is read, which loading comes to last."""
    size = min(SPEED_BYTES, path.stat().st_size)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        file.seek(-size, os.SEEK_END)
        file.read(size)
    return size / (time.perf_counter() - began)
