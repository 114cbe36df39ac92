"""Tiny targets that write dialogues, and what they wrote."""

import json

from typer.testing import CliRunner

from fspad.cli import app
from helpers.dialogues import MARKERS, WORDS, make_tokenizer
from helpers.models import make_target

PROMPTS = ["hello you", "bye", "hi hi hi now", "you", "now bye hello"]


def make_pair(family="llama", **kwargs):
    """A target whose vocabulary is that of its tokenizer."""
    target = make_target(family, **{"vocab_size": len(WORDS), "sharpness": 3.0, **kwargs})
    target.generation_config.eos_token_id = 1
    return target, make_tokenizer(MARKERS)


def save_pair(folder):
    """A tiny target and its tokenizer, saved."""
    target, tokenizer = make_pair(sharpness=1.0)
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(path):
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(output, *arguments):
    """Run `fspad synthesize`."""
    return CliRunner().invoke(app, ["synthesize", "--output", *map(str, (output, *arguments))])
