"""The tokenizer of tiny models: byte-level BPE with every byte in the vocabulary, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.tiny_model_spec import SPECIAL_TOKENS

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Learned first, so that prompts of tests and JSON answers have about the tokens per word that real tokenizers give.
_COMMON_TEXT = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then
them these so some her would make like him into time has look two more write go see number no way could people my
than first water been call who oil its now find long down day did get come made may part new sound take only little
work know place year live me back give most very after thing our just name good sentence man think say great where
help through much before line right too mean old any same tell boy follow came want show also around form three small
set put end does another well large must big even such because turn here why ask went men read need land different
home us move try kind hand picture again change off play spell air away animal house point page letter mother answer
Hello world! What is the capital of France? Write a short story about a city, please. Once upon a time, there was.
{"name": "value", "items": [1, 2, 3], "ok": true, "none": null, "size": 10.5}
def main(self): return None  # if x == 0: print(x)
naïve café Größe señor Привет мир 日本語 中文 → €
"""
_COMMON_TEXT_WEIGHT = 50

_ONSETS = "b c d f g h j k l m n p r s t v w z st tr ch sh br pl".split()
_VOWELS = "a e i o u ai ea ou".split()
_CODAS = ("", "", "n", "r", "s", "l", "t", "nd")


def build_tokenizer(vocab_size: int, max_length_tokens: int) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of exactly `vocab_size` tokens, which depends on that number only.

    Encoding adds no special token, so a prompt has exactly the tokens it was made of. Needs at least 256 tokens for
    the bytes and those of SPECIAL_TOKENS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(vocab_size), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        # Ids that the model can produce and the tokenizer does not know would fail in detokenization, later.
        raise InvariantError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not the {vocab_size} asked for")
    pad, bos, im_start, im_end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=im_end,
        pad_token=pad,
        additional_special_tokens=[im_start],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=max_length_tokens,
    )


def unprintable_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids whose text alone is not text: special tokens, control characters, and parts of multi-byte characters."""
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    return [token for token, text in enumerate(texts) if not _is_text(text)]


def _is_text(text: str) -> bool:
    return text.replace("\n", " ").isprintable() and text != "" and "\N{REPLACEMENT CHARACTER}" not in text


def _corpus(vocab_size: int) -> Iterator[str]:
    for _ in range(_COMMON_TEXT_WEIGHT):
        yield _COMMON_TEXT
    # Of `random`, only the sequence of random() is promised to stay the same in later versions of Python.
    uniform = random.Random(0).random
    for _ in range(2 * vocab_size):  # made-up words; one per token is about enough to learn that many
        syllables = 1 + int(3 * uniform())
        yield " " + "".join(
            part[int(uniform() * len(part))] for _ in range(syllables) for part in (_ONSETS, _VOWELS, _CODAS)
        )
