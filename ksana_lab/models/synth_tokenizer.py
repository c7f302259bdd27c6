"""A byte-level BPE tokenizer for a synthetic checkpoint, trained on ``corpus.txt`` beside this file, so that it is the same everywhere.

It has the vocabulary size and the special ids of the family it stands in for. Every id decodes to text: a model with random weights
answers with any of its 151,936 ids, and a server that got no text for most of them would stream nothing. Ids beyond what training
found are invented words, which no text is ever encoded to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_MAX_TRAINED = 3000  # tokens; the corpus yields no more that are useful
_CORPUS = Path(__file__).with_name("corpus.txt")

# How Qwen cuts text into words before BPE. transformers 5 rebuilds Qwen2 tokenizers around it whatever tokenizer.json says, so a
# tokenizer that cut otherwise would encode differently there and here.
_WORDS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class SpecialTokens:
    ids: dict[str, int]
    bos: str
    eos: str  # ends a turn of a chat
    pad: str
    also_ends: tuple[str, ...]  # end generation, too
    adds_bos: bool  # the tokenizer puts bos before every text
    chat_template: str

    @property
    def bos_id(self) -> int:
        return self.ids[self.bos]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return tuple(self.ids[token] for token in (self.eos, *self.also_ends))


def special_tokens(arch: str, vocab_size: int) -> SpecialTokens:
    """Names and ids: the published ones where they fit into the vocabulary, else its last ids."""
    if arch == "llama":
        names = {
            "<|begin_of_text|>": 128000,
            "<|end_of_text|>": 128001,
            "<|start_header_id|>": 128006,
            "<|end_header_id|>": 128007,
            "<|eot_id|>": 128009,
        }
        return SpecialTokens(
            _fitted(names, vocab_size), "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", ("<|end_of_text|>",), True, _LLAMA3_CHAT
        )
    names = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    return SpecialTokens(_fitted(names, vocab_size), "<|endoftext|>", "<|im_end|>", "<|endoftext|>", ("<|endoftext|>",), False, _CHATML)


def _fitted(names: dict[str, int], vocab_size: int) -> dict[str, int]:
    if max(names.values()) < vocab_size:
        return names
    return {name: vocab_size - len(names) + i for i, name in enumerate(names)}


def write_tokenizer(out: Path, arch: str, vocab_size: int, max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` as ``transformers.AutoTokenizer`` reads them."""
    special = special_tokens(arch, vocab_size)
    build_tokenizer(special, vocab_size).save(str(out / "tokenizer.json"), pretty=False)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": special.chat_template,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_tokenizer(special: SpecialTokens, vocab_size: int) -> Tokenizer:
    trained, merges = _train(min(_MAX_TRAINED, vocab_size - len(special.ids)))
    tokenizer = Tokenizer(models.BPE(vocab=_fill_vocabulary(trained, special.ids, vocab_size), merges=merges))
    _set_words(tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.ids])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if special.adds_bos:
        with_bos = processors.TemplateProcessing(
            single=f"{special.bos} $A", pair=f"{special.bos} $A {special.bos} $B", special_tokens=[(special.bos, special.bos_id)]
        )
        tokenizer.post_processor = processors.Sequence([byte_level, with_bos])
    else:
        tokenizer.post_processor = byte_level
    return tokenizer


def _set_words(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _train(vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens in order of their ids (the 256 bytes first), and merges."""
    tokenizer = Tokenizer(models.BPE())
    _set_words(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS.read_text(encoding="utf-8").splitlines(keepends=True), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]  # older versions write "a b"
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [(left, right) for left, right in merges]


def _fill_vocabulary(trained: list[str], special: dict[str, int], vocab_size: int) -> dict[str, int]:
    """Trained tokens take the lowest ids that are not special; invented words take the rest."""
    taken = set(special.values())
    free = (i for i in range(vocab_size) if i not in taken)
    vocabulary = dict(special)
    vocabulary.update(zip(trained, free, strict=False))
    words = (word for word in _invented_words() if word not in vocabulary)  # training may have found one, like "decode"
    vocabulary.update({word: token_id for token_id, word in zip(free, words, strict=False)})
    return vocabulary


def _invented_words() -> Iterator[str]:
    """A million words of three syllables, in a fixed order; the leading Ġ is byte-level BPE's space."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
    for first in syllables:
        for second in syllables:
            for third in syllables:
                yield f"Ġ{first}{second}{third}"
