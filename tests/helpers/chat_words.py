"""A tokenizer whose tokens are words, so that rows can be read."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<?>", "</s>", "<user>", "<assistant>", "<tool>", "<think>", "</think>", "<call>", "<b>"]
WORDS = [*SPECIAL, "hello", "hi", "bye", "now", "why", "so", "two", "four"]


def make_word_tokenizer(template):
    """A tokenizer with a chat template."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<?>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", chat_template=template)


def shown(rows):
    """The words of rows, with brackets around what is masked."""
    texts = []
    for row in rows:
        assert row["length"] == len(row["input_ids"])
        words, before = [], 0
        for token, value in zip(row["input_ids"], row["assistant_mask"], strict=True):
            if before and not value:
                words[-1] += "]"
            words.append("[" * (value > before) + WORDS[token])
            before = value
        texts.append(" ".join(words) + "]" * before)
    return texts
