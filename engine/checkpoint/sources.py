"""Opens a checkpoint, whichever form it has."""

from pathlib import Path

from engine.checkpoint.huggingface import HuggingFaceFiles
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.sharded import ShardedFiles
from engine.checkpoint.source import TensorSource
from engine.protocol.model_directory import is_distributed


def open_source(directory: Path, *, use_memory_map: bool = True) -> TensorSource:
    """Return the tensors of a model directory, to be closed by the caller.

    Args:
        directory: of a distributed checkpoint, or as Hugging Face writes it.
        use_memory_map: see `TensorFile`.

    Raises:
        ValueError: naming the file that is missing or cannot be used.
    """
    if is_distributed(directory):
        return ShardedFiles(directory, CheckpointMetadata.read(directory), use_memory_map=use_memory_map)
    return HuggingFaceFiles(directory, use_memory_map=use_memory_map)
