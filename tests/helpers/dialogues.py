"""A tokenizer of twelve words, its chat templates, and a dialogue with its token ids."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fspad.trainer.data import prepare_dataset

WORDS = [
    "<pad>",
    "</s>",
    "<user>",
    "<assistant>",
    "end",
    "hello",
    "you",
    "hi",
    "bye",
    "now",
    "<system>",
    "FSPAD-USER-TURN",
]
MARKERS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> end {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
GENERATION = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>"
    "{% endgeneration %}{% else %}{{ m.content }} </s>{% endif %} end {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHAT = [
    {"role": "user", "content": "hello you"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "bye now"},
]
# <user> hello you </s> end <assistant> hi </s> end <user> bye </s> end <assistant> bye now </s> end
CHAT_IDS = [2, 5, 6, 1, 4, 3, 7, 1, 4, 2, 8, 1, 4, 3, 8, 9, 1, 4]
CHAT_MASK = [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]


def make_tokenizer(chat_template=MARKERS):
    """A tokenizer that splits at spaces, with the words of `WORDS`."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens=["<user>", "<assistant>"],
        chat_template=chat_template,
    )


def prepare_one(row, **kwargs):
    """What `prepare_dataset` makes of a dataset of one row."""
    prepared = prepare_dataset(Dataset.from_list([row]), kwargs.pop("tokenizer", None), **kwargs)
    return prepared[0]


def features_dataset():
    """Three rows with features of two numbers."""
    rows = [(2, 6), (6, 2), (1, 3)]
    return Dataset.from_list(
        [
            {
                "input_ids": list(range(zeros + ones)),
                "assistant_mask": [0] * zeros + [1] * ones,
                "features": [[float(i), 0.5] for i in range(zeros + ones)],
            }
            for zeros, ones in rows
        ]
    )
