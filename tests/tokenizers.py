"""Text files of models in the formats of the real ones: small vocabularies, trained on the spot, in faithful structure.

Each family has what its published `tokenizer.json` has around the vocabulary (normalizer, pre-tokenizer, decoder,
frame, added tokens with their flags), a `tokenizer_config.json`, a `generation_config.json` and a chat template in its
style.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "The kettle sings while the rain keeps falling on the tin roof, and nobody in the house is in a hurry.\n",
    "Die Brücke über den Fluß wurde größer, schöner und älter; die Vögel störte es nicht.\n",
    "Été comme hiver, le café était déjà fermé — « à bientôt », disait l'écriteau.\n",
    "Дом стоит на холме, и вечером видно море. Потом идёт снег.\n",
    "雨の日は本を読みます。山の上に小さな家があります。天气很好,我们去公园。\n",
    "    for index, value in enumerate(values):\n        total += value * 2  # 1234567\n    return total\n",
    "Party 🎉🎉 with 👩‍👩‍👧 and naïve coöperation: I've, you'll, they'd, IT'S 3 x 100.\n",
)
SYSTEM, CHAT = "You are terse.", "What is 2 + 2?"

Roles = Sequence[str]


@dataclass(frozen=True)
class Family:
    """A model's files of text. `conversations` are the orders of roles that its chat template takes."""

    tokenizer: Tokenizer
    chat_template: str
    bos_token: str | None
    eos_token: str
    unk_token: str | None = None
    template_in_config: bool = False
    end_of_text: Sequence[str] = ()  # tokens of generation_config.json besides `eos_token`
    conversations: Sequence[Roles] = (("user",), ("user", "assistant", "user"), ("system", "user"))
    kwargs: dict[str, Any] = field(default_factory=dict)  # of its chat template

    def write(self, directory: Path) -> Path:
        """Write the files into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(directory / "tokenizer.json"))
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token, "unk_token": self.unk_token}
        config: dict[str, Any] = {
            **tokens,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        if self.template_in_config:
            config["chat_template"] = self.chat_template
        else:
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        ends = [self.tokenizer.token_to_id(token) for token in (self.eos_token, *self.end_of_text)]
        generation = {"eos_token_id": ends if self.end_of_text else ends[0], "temperature": 0.6, "top_p": 0.9}
        (directory / "generation_config.json").write_text(json.dumps(generation))
        return directory


def _control(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def _plain(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=False, normalized=False) for text in texts]


def _frame(tokenizer: Tokenizer, token: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )


# --- SentencePiece BPE: Llama 2, Mistral's first ----------------------------------------------------------------------


def _sentencepiece() -> Tokenizer:
    """`<unk>`, `<s>`, `</s>`, the bytes, the pieces that were merged, then single characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trained.train_from_iterator(CORPUS[:4], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    merged = dict.fromkeys(left + right for left, right in merges)
    characters = [piece for piece in model["vocab"] if piece not in merged]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *characters]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_control("<unk>", "<s>", "</s>"))
    tokenizer.post_processor = _frame(tokenizer, "<s>")
    return tokenizer


def llama_2() -> Family:
    """Spaces become ▁ in the normalizer, which also puts one before the text; no pre-tokenizer."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    template = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set preamble = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set preamble = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn['role'] == 'user') != loop.index is odd %}
        {{- raise_exception('A user speaks first, then user and assistant take turns.') }}
    {%- endif %}
    {%- set text = (preamble if loop.first else '') + turn['content'] %}
    {%- if turn['role'] == 'user' %}
        {{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + text.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
    return Family(tokenizer, template, "<s>", "</s>", "<unk>", template_in_config=True)


def mistral_v1() -> Family:
    """The same pieces; Metaspace pre-tokenizer, which puts a ▁ before the first piece alone (`legacy: false`)."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    template = """\
{{- bos_token }}
{%- for turn in messages %}
    {%- if turn.role == 'user' and loop.index0 % 2 == 0 %}
        {{- '[INST] ' ~ turn.content ~ ' [/INST]' }}
    {%- elif turn.role == 'assistant' and loop.index0 % 2 == 1 %}
        {{- turn.content ~ eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant speak here, in turns.') }}
    {%- endif %}
{%- endfor %}"""
    conversations = (("user",), ("user", "assistant", "user"))
    return Family(tokenizer, template, "<s>", "</s>", "<unk>", template_in_config=True, conversations=conversations)


# --- byte-level BPE: Llama 3, Mistral's tekken, Qwen ------------------------------------------------------------------

LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(split: str, *, ignore_merges: bool = False, first: Sequence[AddedToken] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama_3() -> Family:
    """Whole words of the vocabulary are taken without merges; many control tokens, some of them only reserved."""
    tokenizer = _byte_level(LLAMA_3_SPLIT, ignore_merges=True)
    named = ("begin_of_text", "end_of_text", "reserved_special_token_0", "start_header_id", "end_header_id")
    tokenizer.add_special_tokens(_control(*(f"<|{name}|>" for name in (*named, "eom_id", "eot_id", "python_tag"))))
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _frame(tokenizer, "<|begin_of_text|>")]
    )
    template = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "01 Jan 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nDate: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
    return Family(
        tokenizer,
        template,
        "<|begin_of_text|>",
        "<|eot_id|>",
        template_in_config=True,
        end_of_text=("<|end_of_text|>", "<|eom_id|>"),
        kwargs={"date_string": "24 Dec 2025"},
    )


def mistral_tekken() -> Family:
    """Control tokens come first in the vocabulary; `[INST]` and its like are among them."""
    named = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<pad>")
    tokenizer = _byte_level(TEKKEN_SPLIT, ignore_merges=True, first=_control(*named))
    tokenizer.post_processor = _frame(tokenizer, "<s>")
    template = """\
{%- set has_system = messages[0].role == "system" %}
{%- set turns = messages[1:] if has_system else messages %}
{%- set spoken = namespace(last_user=-1) %}
{%- for turn in turns if turn.role in ("user", "assistant") %}
    {%- if (turn.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("user and assistant must take turns, not " ~ turn.role ~ " at " ~ loop.index0) }}
    {%- endif %}
    {%- if turn.role == "user" %}
        {%- set spoken.last_user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role == "user" %}
        {%- if has_system and loop.index0 == spoken.last_user %}
            {{- "[INST]" + messages[0].content + "\\n\\n" + turn.content + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + turn.content + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- turn.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
    return Family(tokenizer, template, "<s>", "</s>", "<unk>")


def qwen_2() -> Family:
    """NFC before all else; no begin of text. Who sends no system message gets one."""
    tokenizer = _byte_level(QWEN_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(_control("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    template = """\
{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nAnswer well.<|im_end|>\\n' }}
{%- endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""
    return Family(tokenizer, template, None, "<|im_end|>", template_in_config=True, end_of_text=("<|endoftext|>",))


def qwen_3() -> Family:
    """The same with added tokens that are no control tokens, and a template that thinks unless told not to."""
    family = qwen_2()
    family.tokenizer.add_tokens(_plain("<tool_call>", "</tool_call>", "<think>", "</think>"))
    template = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(last_question=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if seen.searching and message.role == "user" and message.content is string %}
        {%- set seen.searching = false %}
        {%- set seen.last_question = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set answer = message.content %}
        {%- if '</think>' in answer and loop.index0 < seen.last_question %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + answer + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
    return Family(
        family.tokenizer,
        template,
        None,
        "<|im_end|>",
        end_of_text=("<|endoftext|>",),
        kwargs={"enable_thinking": False},
    )


FAMILIES: dict[str, Callable[[], Family]] = {
    "Llama 2": llama_2,
    "Mistral v1": mistral_v1,
    "Llama 3": llama_3,
    "Mistral tekken": mistral_tekken,
    "Qwen 2": qwen_2,
    "Qwen 3": qwen_3,
}
