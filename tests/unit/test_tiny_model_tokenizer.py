"""The tokenizer of tiny models: any text and any token ids work, as do the chat template and JSON-schema grammars."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import SPECIAL_TOKENS, TinyModelSpec

EOS = SPECIAL_TOKENS.index("<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_model(TinyModelSpec(layers=1, hidden=16, heads=2, intermediate=16), path)
    return AutoTokenizer.from_pretrained(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_the_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", "a , b .  c !", "\t\r\n\x00", "naïve café 日本語 🙂‍↕️", '{"a": [1, 2.5e-3]}', "x" * 5000, "don 't we"]
)
def test_awkward_text_survives_the_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_token_ids_detokenize(tokenizer: Any) -> None:
    generator = random.Random(3)
    for _ in range(200):
        ids = [generator.randrange(len(tokenizer)) for _ in range(generator.randrange(1, 20))]
        assert isinstance(tokenizer.decode(ids), str)
        assert isinstance(tokenizer.decode(ids, skip_special_tokens=True), str)


@pytest.mark.parametrize("vocab_size", [260, 261, 2048, 5000])
def test_vocabulary_has_the_size_of_the_model_and_all_bytes(tmp_path: Path, vocab_size: int) -> None:
    write_tiny_model(TinyModelSpec(layers=1, hidden=16, heads=2, intermediate=16, vocab_size=vocab_size), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    assert tuple(tokenizer.convert_ids_to_tokens(range(4))) == SPECIAL_TOKENS
    every_byte_sequence_length = "".join(map(chr, (*range(0x100), 0x7FF, 0x20AC, 0xFFFF, 0x1F642, 0x10FFFF)))
    assert tokenizer.decode(tokenizer.encode(every_byte_sequence_length)) == every_byte_sequence_length
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == vocab_size


def test_english_takes_fewer_tokens_than_characters(tokenizer: Any) -> None:
    text = "Write a short story about the people of a small city and their animals."
    assert len(tokenizer.encode(text)) < len(text) / 3


def test_chat_template(tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer.encode(expected)
    assert ids.count(EOS) == 2
    assert tokenizer.eos_token_id == EOS
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected.removesuffix("<|im_start|>assistant\n")


def test_json_schema_grammar(tokenizer: Any) -> None:
    """Random tokens under the mask of a compiled schema end in valid JSON."""
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer), stop_token_ids=[EOS])
    assert info.vocab_type == xgrammar.VocabType.BYTE_LEVEL
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "size": {"enum": [1, 20, "größer"]}},
        "required": ["name", "size"],
    }
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema))
    generator = random.Random(5)
    for _ in range(20):
        matcher = xgrammar.GrammarMatcher(compiled)
        ids: list[int] = []
        while not matcher.is_terminated():
            mask = xgrammar.allocate_token_bitmask(1, len(tokenizer))
            matcher.fill_next_token_bitmask(mask)
            allowed = [id for id in range(len(tokenizer)) if mask[0, id // 32].item() >> (id % 32) & 1]
            ids.append(generator.choice(allowed))
            assert matcher.accept_token(ids[-1])
            assert len(ids) < 300
        # xgrammar lets raw control characters into strings, hence not strict.
        answer = json.loads(tokenizer.decode(ids, skip_special_tokens=True), strict=False)
        assert isinstance(answer["name"], str)
        assert answer["size"] in [1, 20, "größer"]
