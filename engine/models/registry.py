"""From the architecture that a checkpoint names to the class that computes it."""

import torch

from engine.communication.handler import CommunicationHandler
from engine.models.llama import LlamaForCausalLM
from engine.parallel.quantization import quantize_layers
from engine.protocol.model_config import ModelConfig

# One for each of model_config.ARCHITECTURES. What Mistral and Qwen2 do differently is in their ModelConfig.
MODEL_CLASSES = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": LlamaForCausalLM,
}


def build_model(
    config: ModelConfig,
    group: CommunicationHandler,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "none",
) -> LlamaForCausalLM:
    """Return this rank's shard of the model, without weights.

    Args:
        config: the model.
        group: the ranks that it is split over.
        device: where the parameters lie.
        dtype: their type, and that of the arithmetic.
        quantization: of the matrices, as `--quantization` has it.

    Raises:
        ValueError: when the model cannot be split so, or not quantized.
    """
    model = MODEL_CLASSES[config.architecture](config, group, device=device, dtype=dtype)
    if quantization == "int8":
        quantize_layers(model)
    return model
