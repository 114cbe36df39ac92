"""Of long texts no more is tokenized than is trained on, and it is tokenized as in the whole text."""

import random

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import fspad.trainer.marked_text as module
from fspad.trainer.rows import dialogue_rows, window_start

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
)
WORDS = ["the", "of", "tokens", "are", "naïve", "日本語", "東京", "e\u0301te\u0301", "👍🏽", "return", "x1", "don't"]
LONG = 100_000  # characters


def random_text(rng, length):
    """Words, and runs of spaces, digits, letters and lines, some of them longer than any token."""
    parts, size = [], 0
    while size < length:
        run = rng.choice([1, 2, 3, 7, 40, 300])
        letters = rng.choice([" ", "\n", "0123456789", "=-", "a", "abcXYZ+/"])
        is_run = rng.random() < 0.1
        parts.append("".join(rng.choices(letters, k=run)) if is_run else " " + rng.choice(WORDS))
        size += len(parts[-1])
    return "".join(parts)


def byte_pairs():
    tokenizer = Tokenizer(models.BPE())
    words = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=800, initial_alphabet=letters, show_progress=False)


def unigrams():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(vocab_size=400, unk_token="<?>", special_tokens=["<?>"])


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<?>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=600, special_tokens=["<?>"], show_progress=False)


@pytest.fixture(scope="module", params=[byte_pairs, unigrams, word_pieces])
def tokenizer(request):
    """A tokenizer that puts tokens of its own before and after a text."""
    tokenizer, trainer = request.param()
    rng = random.Random(0)
    tokenizer.train_from_iterator([random_text(rng, 2000) for _ in range(30)], trainer)
    tokenizer.add_special_tokens(["<s>", "</s>", "<user>", "<assistant>"])
    own = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=own)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def random_dialogue(rng):
    """The form of a row and its values."""
    lengths = rng.choices([1, 30, 3000, 20_000], k=8)
    texts = [random_text(rng, length) for length in lengths]
    if rng.random() < 0.3:
        return ("prompt", "completion"), texts[:2]
    # Answers of one token have nothing to learn
    texts = [rng.choice(["a", text]) if i % 2 else text for i, text in enumerate(texts)]
    texts = texts[: rng.choice([2, 3, 8])]
    return ("messages",), [[{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]]


def to_row(tokenizer, form, values, max_length, has_features=False):
    columns = [[value] for value in values]
    rows = dialogue_rows(*columns, form=form, tokenizer=tokenizer, max_length=max_length, has_features=has_features)
    return rows["input_ids"][0], rows["assistant_mask"][0]


@pytest.mark.parametrize("template", [PLAIN, BLOCKS])
def test_rows_are_the_same_as_of_the_whole_text(tokenizer, template, monkeypatch):
    tokenizer.chat_template = template
    parts, stock = [], module._tokenize_part
    monkeypatch.setattr(module, "_tokenize_part", lambda *arguments: parts.append(stock(*arguments)) or parts[-1])
    rng = random.Random(1)
    for _ in range(30):
        form, values = random_dialogue(rng)
        ids, mask = to_row(tokenizer, form, values, None)
        for max_length in rng.sample([1, 2, 3, 4, 7, 20, 100, 500], 4):
            has_features = rng.random() < 0.2
            start = 0 if has_features else window_start(mask, max_length)
            window = slice(start, start + max_length)
            expected = ids[window], [0, *mask[window][1:]]
            assert to_row(tokenizer, form, values, max_length, has_features) == expected
    assert len(parts) > 50  # whole texts were not all there was


def runs(text):
    return [
        (("messages",), [[{"role": "user", "content": user}, {"role": "assistant", "content": answer}]])
        for user, answer in (("hi", text), (text, "so be it"), (text, text))
    ] + [(("prompt", "completion"), ["hi", text]), (("prompt", "completion"), [text, "so be it"])]


@pytest.mark.parametrize("run", [" ", "\n", "7", "a", "日本"])
def test_runs_that_are_longer_than_what_is_looked_at_first(tokenizer, run):
    tokenizer.chat_template = PLAIN
    for form, values in runs("why " + run * 15_000 + " so be it then"):
        ids, mask = to_row(tokenizer, form, values, None)
        for max_length in (3, 30):
            start = window_start(mask, max_length)
            window = slice(start, start + max_length)
            got = to_row(tokenizer, form, values, max_length)
            assert got == (ids[window], [0, *mask[window][1:]])


@pytest.mark.parametrize("template", [PLAIN, BLOCKS])
def test_little_of_a_long_text_is_tokenized(tokenizer, template, monkeypatch):
    tokenizer.chat_template = template
    lengths, stock = [], module._encode
    monkeypatch.setattr(module, "_encode", lambda *a, **kw: lengths.append(len(a[1])) or stock(*a, **kw))
    for form, values in runs(random_text(random.Random(2), 20 * LONG)):
        lengths.clear()
        ids, mask = to_row(tokenizer, form, values, 256)
        assert len(ids) == 256
        assert 0 < sum(mask) < 256
        assert sum(lengths) < LONG


@pytest.mark.parametrize("end", ["", "bye"])
def test_masks_of_nothing_but_ones_are_looked_at_to_the_end(tokenizer, end):
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}" + end
    )
    messages = [{"role": "assistant", "content": random_text(random.Random(3), LONG)}]
    if end:
        assert to_row(tokenizer, ("messages",), [messages], 20)[1] == [0] + [1] * 19
    else:
        with pytest.raises(ValueError, match="got ones for all"):
            to_row(tokenizer, ("messages",), [messages], 20)


def test_errors_show_the_beginning_of_a_long_dialogue(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    text = random_text(random.Random(4), 20 * LONG)
    with pytest.raises(ValueError, match="can render") as caught:
        to_row(tokenizer, ("messages",), [[{"role": "user", "content": text}]], 20)
    assert len(str(caught.value)) < 1000


def test_tokenizers_that_do_not_tell_where_tokens_are():
    tokenizer = ByT5Tokenizer()
    # Three special tokens come before the bytes, and each text gets the second of them at its end
    ids = [*range(ord("a") + 3, ord("f") + 3), 1, *range(ord("f") + 3, ord("i") + 3), 1]
    row = to_row(tokenizer, ("prompt", "completion"), ["abcde", "fgh"], 7)
    assert row == (ids[3:], [0, 0, 0, 1, 1, 1, 1])
    tokenizer.chat_template = PLAIN
    with pytest.raises(ValueError, match="tells where in a text its tokens are, got ByT5Tokenizer, which"):
        to_row(tokenizer, ("messages",), [[{"role": "user", "content": "hi"}]], 8)
