"""Ids to text exactly as the tokenizer's own full decode, token by token; stop strings across tokens; chat templates as elsewhere."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import bpe, write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, processors

from ksana_lab.errors import CheckpointError, InvalidRequest
from ksana_lab.server.tokenizing import TextStream, Tokenizer, WindowDetokenizer

BACKEND = Backend.from_str(bpe())
TOKENIZER = Tokenizer(Backend.from_str(bpe()), {}, None, [])
any_ids = st.lists(st.integers(0, BACKEND.get_vocab_size() + 3), max_size=40)  # invalid UTF-8, special and unknown ids included


@given(any_ids, st.booleans())
@settings(max_examples=300, deadline=None)
def test_deltas_join_to_the_full_decode(ids, skip):
    detokenizer = TOKENIZER.detokenizer(skip_special_tokens=skip)
    text = "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()
    assert text == BACKEND.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_no_delta_of_valid_text_holds_half_a_character(text):
    detokenizer = TOKENIZER.detokenizer()
    deltas = [detokenizer.push(i) for i in TOKENIZER.encode(text)]
    assert "".join(deltas) == text and (all("\ufffd" not in d for d in deltas) or "\ufffd" in text)


@given(any_ids)
@settings(max_examples=200, deadline=None)
def test_what_prefill_sent_and_what_decode_did_not_suppress_is_the_whole(ids):
    if not ids:
        return
    stop = ["st", "o s"]
    prefill, decode, mixed = (TextStream(TOKENIZER.detokenizer(), stop) for _ in range(3))
    first = prefill.push(ids[0])
    assert decode.push(ids[0]) == first
    rest = "".join([decode.push(i) for i in ids[1:]]) + decode.finish()
    assert first + rest == "".join([mixed.push(i) for i in ids]) + mixed.finish()


def sentencepiece_like():
    """Byte fallback and a dropped leading space, as Llama 2 decodes."""
    words = ["▁the", "▁fox", "x", "▁"] + [f"<0x{b:02X}>" for b in range(256)]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="x"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


# Whole characters only: byte fallback judges a run of bytes as a whole, so one bad byte changes text that is already out.
pieces = st.sampled_from([[0], [1], [2], [3], *([4 + b for b in char.encode()] for char in "é東🙂")])


@given(st.lists(pieces, max_size=20))
@settings(max_examples=200, deadline=None)
def test_window_decoding_of_other_decoders_joins_to_the_full_decode(parts):
    backend, ids = sentencepiece_like(), [i for part in parts for i in part]
    detokenizer = WindowDetokenizer(backend.decode, [])
    text = "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()
    assert text == backend.decode(ids)


def test_a_byte_token_of_any_vocabulary_is_its_byte():
    tokenizer = Tokenizer(sentencepiece_like(), {}, None, [])
    assert [tokenizer.token_bytes(4 + byte) for byte in (0x0A, 0xE6, 0x9D)] == [b"\n", b"\xe6", b"\x9d"]


def test_window_decoding_keeps_the_space_after_the_prompt():
    detokenizer = Tokenizer(sentencepiece_like(), {}, None, []).detokenizer(prompt_token_ids=[0])
    assert detokenizer.push(1) == " fox"


def test_window_stays_short():
    sizes = []
    detokenizer = WindowDetokenizer(lambda ids: sizes.append(len(ids)) or "ab" * len(ids), [])
    for i in range(500):
        detokenizer.push(i)
    assert max(sizes) <= 2


@pytest.mark.parametrize(
    ("text", "stop", "seen", "by"),
    [
        ("one STOP two", ["STOP"], "one ", "STOP"),
        ("one STOx two", ["STOP"], "one STOx two", None),
        ("a b c", ["c", "b"], "a ", "b"),
        ("tail ST", ["STOP"], "tail ST", None),
        ("aaab", ["aab"], "a", "aab"),
        ("STOP", ["STOP"], "", "STOP"),
    ],
)
def test_stop_strings_cut_and_hold_back(text, stop, seen, by):
    stream = TextStream(ByCharacter(), stop)
    deltas = [stream.push(ord(c)) for c in text]
    assert "".join(deltas) + stream.finish() == seen and stream.stopped_by == by


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_nothing_of_a_stop_string_is_ever_shown(text, stop):
    stream = TextStream(ByCharacter(), stop)
    seen = "".join([stream.push(ord(c)) for c in text])
    assert not any(s in seen for s in stop)
    seen += stream.finish()
    assert text.startswith(seen) and (seen == text or stream.stopped_by is not None)


def test_min_tokens_shields_early_text_and_the_stop_string_can_be_kept():
    stream = TextStream(ByCharacter(), ["ab"], min_tokens=2, include_stop=True)
    assert "".join([stream.push(ord(c)) for c in "ababx"]) == "abab" and stream.stopped_by == "ab"


class ByCharacter:
    """A detokeniser whose token ids are code points."""

    push = staticmethod(chr)

    def flush(self):
        return ""


# ---- the directory ---------------------------------------------------------------------------------------------------


def test_a_directory_gives_eos_ids_of_tokenizer_and_generation_config(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    eos = BACKEND.token_to_id("<|endoftext|>")
    assert Tokenizer.load(tmp_path).eos_token_ids == tuple(sorted({7, 9, eos}))


@pytest.mark.parametrize("broken", ["missing", "garbage", "template"])
def test_an_unusable_directory_is_named(tmp_path, broken):
    directory = tmp_path / "model"
    if broken != "missing":
        write_tokenizer(directory, chat_template="{% for %}")
    if broken == "garbage":
        (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="template" if broken == "template" else str(directory)):
        Tokenizer.load(directory)


@pytest.mark.parametrize("special", [False, True])
async def test_long_prompts_are_tokenised_in_a_thread_with_the_same_result(special):
    backend = Backend.from_str(bpe())
    backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 512)])
    text = "naïve 東京 🙂 the quick<|im_end|> fox " * 200
    expected = backend.encode(text, add_special_tokens=special).ids
    tokenizer = Tokenizer(backend, {}, None, [])
    assert await tokenizer.encode_async(text, add_special_tokens=special) == expected
    tokenizer.close()


@pytest.mark.parametrize("without", [[], ["encode_batch_fast"]])
async def test_the_thread_for_long_prompts_lets_go_of_the_interpreter(without):
    """``encode`` does not, in any version; a batch does."""
    backend = Only(Backend.from_str(bpe()), without=["encode", *without])
    tokenizer = Tokenizer(backend, {}, None, [])
    text = "the quick brown fox " * 200
    assert await tokenizer.encode_async(text) == BACKEND.encode(text).ids
    tokenizer.close()


class Only:
    """A tokenizer that lacks some methods."""

    def __init__(self, backend, without):
        self._backend, self._without = backend, without

    def __getattr__(self, name):
        if name in self._without:
            raise AttributeError(name)
        return getattr(self._backend, name)


def test_chat_templates_render_as_transformers_does(tmp_path):
    template = (
        "{%- for m in messages %}\n    {%- if m.role == 'system' %}{{ bos_token }}{% continue %}{% endif %}\n"
        "<{{ m.role }}>{{ m.content | trim }} {{ m | tojson }}\n    {% generation %}x{% endgeneration %}\n"
        "{% endfor %}\n{{ eos_token if add_generation_prompt }}{{ enable_thinking }}"
    )
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(tmp_path, chat_template=template)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " é <b> "}, {"role": "assistant", "content": "y"}]
    oracle = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert Tokenizer.load(tmp_path).render_chat(messages, {"enable_thinking": False}, created_s=0) == expected


def test_a_template_that_refuses_is_the_requests_fault(tmp_path):
    write_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        Tokenizer.load(tmp_path).render_chat([{"role": "user", "content": "x"}], created_s=0)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages.x.y.z }}", "{{ range(10 ** 9) }}", "{{ strftime_now('%Y') }}"])
def test_a_template_that_fails_is_the_requests_fault_too(tmp_path, template):
    write_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        Tokenizer.load(tmp_path).render_chat([], created_s=10**12 - 1)  # the year 33658


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/Los_Angeles"])
def test_what_a_template_takes_for_now_is_the_requests_time_in_any_time_zone(tmp_path, monkeypatch, zone):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    template = "{% macro today() %}{{ strftime_now('%d %b %Y %H:%M') }}{% endmacro %}Today Date: {{ today() }}"
    write_tokenizer(tmp_path, chat_template=template)
    assert Tokenizer.load(tmp_path).render_chat([], created_s=1735689540) == "Today Date: 31 Dec 2024 23:59"
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("name", ["self", "messages", "add_generation_prompt", "strftime_now"])
def test_a_variable_with_a_name_of_ours_is_the_requests_fault(tmp_path, name):
    write_tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match=f"cannot set {name}"):
        Tokenizer.load(tmp_path).render_chat([{"role": "user", "content": "x"}], {name: 1}, created_s=0)


def test_a_directory_without_tokenizer_json_is_converted(tmp_path):
    source = json.loads(bpe())
    merges = [m if isinstance(m, str) else " ".join(m) for m in source["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(source["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert Tokenizer.load(tmp_path).encode("the quick fox") == TOKENIZER.encode("the quick fox")
