"""What a push of a head is: two commits, of files and of a card that pins them."""

import ast
import re
from pathlib import Path

import fspad

HEAD = "user/head"
CODE = {path.name for path in Path(fspad.modeling_fspad.__file__).parent.glob("*.py")} - {"__init__.py"}
SAVED = {"config.json", "model.safetensors", "custom_generate/generate.py", *CODE}


def commits(hub, ref="main", repo=HEAD):
    """The commits of a branch without the first one, which is empty."""
    return hub.repositories[repo].refs[ref][1:]


def pinned(commit) -> str | None:
    """The one revision of the head in the snippets of a card: where it is loaded, and where the target loads it."""
    blocks = re.findall(r"```python\n(.*?)```", commit.files["README.md"].decode(), re.DOTALL)
    calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    revisions = []
    for call in calls:
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        name = (
            call.args[0] if ast.unparse(call.func) == "AutoModel.from_pretrained" else options.get("custom_generate")
        )
        if name is not None:
            assert ast.literal_eval(name) == HEAD
            revisions.append(options["revision"].value if "revision" in options else None)
    assert len(revisions) == 2
    (revision,) = set(revisions)
    return revision


def check_two_commits(files, card, names=SAVED):
    """Check that a push is one commit of the files `names`, and one of a card that names the first."""
    assert set(files.files) == names
    assert set(card.files) == {*names, "README.md"}
    assert pinned(card) == files.oid
    assert files.lfs == card.lfs == {"model.safetensors"}
