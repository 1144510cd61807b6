"""Train the embedded model on the Python standard library's sources.

    python -m engine.embedded.train --minutes 60 --compile --out engine/embedded/model

The result is an ordinary Hugging Face directory: a Llama of some 5 M parameters with a byte-level BPE tokenizer, a
chat template and a generation config. Matrices are optimised by Muon (Jordan et al., 2024, "Muon: An optimizer for
hidden layers in neural networks"), everything else by AdamW. The held-out files are never seen by tokenizer or model.
"""

import argparse
import ast
import hashlib
import json
import lzma
import math
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

END_OF_TEXT = "<|endoftext|>"
# Words keep one leading space, digits stand alone, and line breaks with the blank lines between them are one piece. No
# other piece takes a line break: else the end of a prompt such as "def f(n):" would be a piece that no text ever has.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# The model knows code, not conversation: what people say becomes comments, what the assistant said stays code.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{ message['content'] + '\\n' }}"
    "{%- else %}{{ '# ' + (message['content'] | replace('\\n', '\\n# ')) + '\\n' }}{%- endif %}"
    "{%- endfor %}"
)
HELD_OUT_SHARE = 20  # one module in 20
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data"}  # other people's code; tables; prose
TEST_FOLDERS = {"test", "tests", "idle_test"}  # trained on, never held out: any compressor finds their repetitions


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    context: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_size = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map `[batch, length, hidden_size]` to the same shape."""
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        group = self.shape.num_heads // self.shape.num_kv_heads
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, length, hidden_size]` to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm transformer block, its modules named as in a Hugging Face Llama."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map `[batch, length, hidden_size]` to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """A Llama with tied embeddings, for training only."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.context), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.num_layers) if is_output else 0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map token ids `[batch, length]` to logits `[batch, length, vocab_size]`."""
        length = token_ids.shape[1]
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(x), self.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other, as Hugging Face Llamas do."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def read_corpus() -> tuple[list[str], list[str]]:
    """Return the standard library's sources as (training files, held-out files)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the test suite holds files in other encodings on purpose
        if not text.strip():
            continue
        bucket = int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:8]) % HELD_OUT_SHARE
        is_held_out = bucket == 0 and not TEST_FOLDERS.intersection(relative.parts)
        (held_out if is_held_out else training).append(text)
    return training, held_out


def without_docstrings(source: str) -> str:
    """Return `source` without the docstrings that stand on lines of their own; unchanged where it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # the test suite holds broken files on purpose
        return source
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            docstring, has_more = node.body[0], len(node.body) > 1
            if has_more and docstring.lineno > node.lineno and node.body[1].lineno > (docstring.end_lineno or 0):
                dropped.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return "\n".join(line for number, line in enumerate(source.split("\n"), 1) if number not in dropped)


def split_into_pieces() -> pre_tokenizers.Sequence:
    """Return what cuts a text into the pieces that BPE works within."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def resume(directory: Path, model: Llama) -> Tokenizer:
    """Load a checkpoint's weights into `model` and return its tokenizer, cutting texts as this script does now."""
    saved = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in saved.items()})
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.pre_tokenizer = split_into_pieces()
    return tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose post-processor puts the end-of-text token in front, as in training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split_into_pieces()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Encode each text; every list begins with the end-of-text token."""
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def batches(documents: list[list[int]], length: int, size: int, generator: torch.Generator) -> Tensor:
    """Pack shuffled documents and return one epoch of windows `[num_batches, size, length + 1]`."""
    order = torch.randperm(len(documents), generator=generator).tolist()
    stream = torch.tensor([token for i in order for token in documents[i]])
    offset = int(torch.randint(length, (1,), generator=generator))
    windows = stream[offset:].unfold(0, length + 1, length)
    windows = windows[torch.randperm(len(windows), generator=generator)]
    count = len(windows) // size
    return windows[: count * size].view(count, size, length + 1)


@torch.no_grad()
def bits_per_byte(model: Llama, documents: list[list[int]], texts: list[str], context: int) -> float:
    """Return held-out bits per byte; each document is scored in windows of `context` that overlap by half."""
    nats = 0.0
    for ids in documents:
        tokens = torch.tensor(ids)
        scored = 1
        while scored < len(tokens):
            start = 0 if scored < context else scored - context // 2
            window = tokens[start : start + context + 1]
            losses = F.cross_entropy(model(window[None, :-1])[0].float(), window[1:], reduction="none")
            nats += losses[scored - 1 - start :].sum().item()
            scored = start + len(window)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def make_optimizers(model: Llama, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embeddings and norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(
    model: Llama,
    shape: Shape,
    documents: list[list[int]],
    *,
    minutes: float,
    tokens_a_step: int,
    peak: float,
    compiled: bool,
    seed: int,
) -> None:
    """Train for a wall-clock budget: windows of half the context at first, of the whole context for the last third."""
    generator = torch.Generator().manual_seed(seed)
    optimizers = make_optimizers(model, peak)
    forward = torch.compile(model, dynamic=False) if compiled else model
    started, step, seen = time.monotonic(), 0, 0
    queue: list[Tensor] = []
    queued_length = 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        length = shape.context // 2 if progress < 2 / 3 else shape.context
        if not queue or queued_length != length:
            queue, queued_length = list(batches(documents, length, tokens_a_step // length, generator)), length
        tokens = queue.pop()
        rate = peak * min(1, (step + 1) / 40) * min(1, (1 - progress) / 0.6 + 0.02)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += tokens_a_step
        if step % 20 == 0:
            rate_seen = seen / (time.monotonic() - started)
            print(f"step {step} {100 * progress:.1f}% loss {loss.item():.3f} {rate_seen:.0f} tokens/s", flush=True)
        step += 1


def save(model: Llama, shape: Shape, tokenizer: Tokenizer, out: Path) -> None:
    """Write a Hugging Face directory."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": shape.context,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Train, measure against xz on the held-out files, and write the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the embedded model on the standard library's sources.")
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock budget of the training loop")
    parser.add_argument("--tokens-a-step", type=int, default=8192)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model (needs a C++ compiler; a third faster)"
    )
    parser.add_argument("--resume", type=Path, help="go on from this checkpoint, of the same shape")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of documents")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    shape = Shape()
    training, held_out = read_corpus()
    model = Llama(shape)
    tokenizer = resume(args.resume, model) if args.resume else train_tokenizer(training, shape.vocab_size)
    # Each file comes as it is and without docstrings: else the likeliest line after any def is prose.
    documents = encode(tokenizer, training + [without_docstrings(text) for text in training])
    held_out_documents = encode(tokenizer, held_out)
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {sum(map(len, documents))} training tokens, "
        f"{sum(len(text.encode()) for text in training)} bytes, {len(held_out)} held-out files",
        flush=True,
    )
    train(
        model,
        shape,
        documents,
        minutes=args.minutes,
        tokens_a_step=args.tokens_a_step,
        peak=args.learning_rate,
        compiled=args.compile,
        seed=args.seed,
    )
    save(model, shape, tokenizer, args.out)
    model.to(torch.bfloat16).float()  # what is measured is what was saved
    joined = "".join(held_out).encode()
    xz = 8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / len(joined)
    measured = bits_per_byte(model, held_out_documents, held_out, shape.context)
    print(f"held out: {len(joined)} bytes, {measured:.3f} bits per byte; xz -9e {xz:.3f}", flush=True)


if __name__ == "__main__":
    main()
