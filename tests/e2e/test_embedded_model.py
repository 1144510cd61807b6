"""What the embedded model promises: small, splittable, and enough of a Python writer."""

import ast
import json
import re
from collections.abc import Callable, Iterator

import httpx
import pytest
from safetensors import safe_open

from engine.protocol.config import EMBEDDED_MODEL
from engine.protocol.model_config import ModelConfig
from tests.oracle import Comparison, Reference
from tests.service_process import ServiceProcess

PROMPTS = (
    "def is_prime(n):",
    "def fibonacci(n):",
    "class Stack:",
    "def read_file(path):",
    "import os",
    "def factorial(n):",
    "for i in range(10):",
    "class Point:",
    "def test_add(self):",
    "try:",
)
LEAST_LINES = 2


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    with ServiceProcess("--dtype", "float32") as service:
        yield service


def parsing_lines(prompt: str, completion: str) -> int:
    """Return the most lines of the completion after which the text so far is whole Python."""
    lines = completion.split("\n")
    for count in range(len(lines) - 1, 0, -1):
        try:
            ast.parse(prompt + "\n".join(lines[:count]) + "\n")
        except SyntaxError:
            continue
        return count
    return 0


def test_it_is_small_and_can_be_split_over_four_ranks() -> None:
    config = ModelConfig.from_directory(EMBEDDED_MODEL)
    config.check_tensor_parallel_size(4)
    assert config.num_attention_heads % 4 == 0
    assert config.max_position_embeddings >= 1024
    weights = EMBEDDED_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 16 * 2**20
    with safe_open(weights, framework="pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    assert sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in sizes) <= 8_000_000


def test_it_has_what_a_chat_needs() -> None:
    assert json.loads((EMBEDDED_MODEL / "tokenizer_config.json").read_text())["chat_template"]
    assert "eos_token_id" in json.loads((EMBEDDED_MODEL / "generation_config.json").read_text())


def test_it_writes_what_transformers_would_with_everything_that_the_machine_computes_with(each_kernels: str) -> None:
    with ServiceProcess("--dtype", "float32", "--kernels", each_kernels) as service:
        prompt = httpx.post(f"{service.url}/tokenize", json={"prompt": PROMPTS[0]}).json()["tokens"]
        written = service.complete(prompt=prompt, max_tokens=24, temperature=0, return_token_ids=True)["token_ids"]
    assert re.search(rf"^  kernels +{each_kernels}$", service.stderr, re.MULTILINE)
    assert len(written) == 24
    Reference(EMBEDDED_MODEL).check_greedy(prompt, written, Comparison())


@pytest.mark.slow
def test_most_greedy_completions_parse_when_cut_at_a_lines_end(
    service: ServiceProcess, tell: Callable[[str], None]
) -> None:
    counts = {}
    for prompt in PROMPTS:
        text = service.complete(prompt=prompt, max_tokens=96, temperature=0)["text"]
        counts[prompt] = parsing_lines(prompt, text)
    tell(f"embedded model, lines of the completion that parse: {counts}")
    assert sum(count >= LEAST_LINES for count in counts.values()) >= 6
