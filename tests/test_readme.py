"""What the README and the files in `docs/` show works."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from fspad.bench.smollm2 import find_smollm2
from fspad.cli import app
from fspad.cli.train import parse
from helpers.models import make_head, make_target

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))


def python_blocks(document: str, heading: str) -> list[str]:
    section = re.split(rf"^#+ {re.escape(heading)}$", (ROOT / document).read_text(), flags=re.MULTILINE)[1]
    return re.findall(r"```python\n(.*?)```", re.split(r"^##+ ", section, flags=re.MULTILINE)[0], re.DOTALL)


@pytest.mark.smollm2
@pytest.mark.skipif(find_smollm2() is None, reason="SmolLM2 is not here: `fspad demo` fetches it")
@pytest.mark.usefixtures("smollm2_is_loaded_once")
def test_generate(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    block = python_blocks("README.md", "Generate")[0]
    assert "max_new_tokens=128" in block
    names = {}
    exec(block.replace("max_new_tokens=128", "max_new_tokens=6"), names)
    assert names["output"].accept_lengths.sum() == 5
    text, accept_lengths = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert text.strip()
    assert accept_lengths == str(names["output"].accept_lengths.tolist())


def test_draft_source():
    source = python_blocks("docs/draft-sources.md", "A draft source of one's own")[0]
    names = {}
    exec(source, names)
    target = make_target()
    head = make_head(target)
    head.__class__ = names["HeadWithPhrases"]
    head.config.num_draft_tokens, head.config.lookup = 8, False
    prompt = torch.tensor([[5, 17, 3, 60]])
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    plain = target.generate(prompt, **options).sequences
    without = target.generate(prompt, assistant_model=head, **options)
    head.phrases = [plain[0, 4:].tolist(), [int(plain[0, 4]), 1, 2]]
    assisted = target.generate(prompt, assistant_model=head, **options)
    assert assisted.sequences.equal(plain)
    assert without.sequences.equal(plain)
    assert assisted.accept_lengths[0] > max(1, without.accept_lengths[0]), "the phrase is a part of the tree"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        if link and "://" not in link:
            assert (document.parent / link).exists(), link
    for name in re.findall(r"`((?:examples|docs|tests|bench)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_anchors(document):
    for path, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]+)\)", document.read_text()):
        other = (document.parent / path if path else document).read_text()
        titles = re.findall(r"^#+ (.*)$", other, flags=re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


def commands(document: Path) -> list[list[str]]:
    """The words of each `fspad` command in the shell blocks of a document."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words and words[0] == "fspad"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_have_the_options_that_are_shown(document, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    group = get_command(app)
    for name, *arguments in commands(document):
        if name == "train":
            parse(arguments)
        else:
            group.commands[name].make_context(name, arguments, parent=group.context_class(group))


def test_commands_are_found():
    found = [command for document in DOCUMENTS for command in commands(document)]
    assert {"demo", "synthesize", "train", "bench", "convert", "export"} <= {name for name, *_ in found}
    with pytest.raises(ValueError, match="unknown arguments: --no-such-option"):
        parse(["--output-dir", "head", "--no-such-option"])
