"""The programs in `examples/`, on tiny models."""

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fspad import FSPADModel
from helpers.dialogues import make_tokenizer
from helpers.models import make_target


@pytest.fixture
def load_example(monkeypatch):
    def load(name):
        path = Path(__file__).parents[2] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        # For the dataclasses, whose annotations are looked up there
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        if hasattr(module, "load_smollm2"):
            monkeypatch.setattr(module, "load_smollm2", lambda dtype: (make_target().to(dtype), make_tokenizer()))

        def run(*arguments):
            monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
            module.main()

        return module, run

    return load


def test_task_prompts(tmp_path, monkeypatch, load_example):
    task_prompts, run = load_example("task_prompts")
    monkeypatch.setattr(task_prompts, "TOPICS", ["tea", "tides"])
    # Of the target's 512 positions
    synthesize = task_prompts.synthesize
    monkeypatch.setattr(
        task_prompts, "synthesize", lambda *args, **kw: synthesize(*args, **{**kw, "max_new_tokens": 9})
    )
    written = []
    for _ in range(2):  # the second time, every passage is there
        run("--output_dir", tmp_path, "--num_translations", 5, "--batch_size", 3)
        written.append((tmp_path / "prompts.jsonl").read_text())
    assert written[0] == written[1]
    passages = [
        json.loads(line)["messages"][-1]["content"] for line in (tmp_path / "passages.jsonl").read_text().splitlines()
    ]
    assert len(passages) == 2 * len(task_prompts.FORMS)
    prompts = [json.loads(line)["prompt"] for line in written[0].splitlines()]
    assert len(set(prompts)) == len(prompts)
    assert all(sum(passage in prompt for prompt in prompts) >= 2 for passage in passages), "a summary and a question"
    assert not any("{" in prompt for prompt in prompts if not any(passage in prompt for passage in passages))
    assert sum("erman" in prompt or "English" in prompt for prompt in prompts) >= 5


def test_train_smollm2(tmp_path, monkeypatch, capsys, load_example):
    _, train_smollm2 = load_example("train_smollm2")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    questions = ["hello you", "hello", "you", "bye now", "hi you", "hi"]
    prompts, dialogues, held_out = (tmp_path / f"{name}.jsonl" for name in ("prompts", "dialogues", "held_out"))
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    held_out.write_text(json.dumps({"prompt": "bye now"}) + "\n" + json.dumps({"prompt": "hello "}) + "\n")
    rows = [
        {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "hi"}],
            "prompt_ids": [2, 5, number],
            "response_ids": [7, 8, 9, 1],
            "source": "here",
        }
        for number, text in enumerate(["hi", "hello"])
    ]
    dialogues.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = tmp_path / "head"
    arguments = ["--output_dir", head, "--prompts", prompts, "--dialogs", dialogues, "--exclude", held_out]
    arguments += [
        "--max_new_tokens",
        12,
        "--num_eval_dialogs",
        1,
        "--draft_vocab_size",
        40,
        "--features_dir",
        head / "f",
    ]
    arguments += ["--save_steps", 1, "--eval_strategy", "no", "--num_draft_tokens", "auto"]
    train_smollm2(*arguments, "--max_steps", 1)
    answered = [
        json.loads(line)["messages"][0]["content"] for line in (head / "dialogs.jsonl").read_text().splitlines()
    ]
    assert sorted(answered) == ["hello you", "hi you", "you"]
    # Of the given dialogues one is held out, and one of all is evaluated on
    assert json.loads((head / "f" / "train" / "features.json").read_text())["rows"] == 3
    config = FSPADModel.from_pretrained(head).config
    assert (config.draft_vocab_size, config.draft_depth, config.num_draft_tokens) == (40, 4, "auto")
    assert "scores 40 of 97 tokens" in capsys.readouterr().out
    train_smollm2(*arguments, "--max_steps", 2, "--resume_from_checkpoint", "true")
    assert (head / "checkpoint-2").is_dir()
    arguments = ["--output_dir", tmp_path / "more", "--head", head, "--dialogs", dialogues, "--num_eval_dialogs", 0]
    train_smollm2(*arguments, "--eval_strategy", "no", "--num_draft_tokens", "auto", "--max_steps", 1)
    assert FSPADModel.from_pretrained(tmp_path / "more").config.draft_vocab_size == 40


def test_compare_recipes(tmp_path, monkeypatch, capsys, load_example):
    compare_recipes, run = load_example("compare_recipes")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    recipe = compare_recipes.Recipe
    recipes = {"fspad": recipe(draft_vocab_size=40), "eagle": recipe(False, False, draft_vocab_size=20)}
    monkeypatch.setattr(compare_recipes, "RECIPES", recipes)
    dialogues, prompts, questions = (tmp_path / f"{name}.jsonl" for name in ("dialogues", "held-out", "questions"))
    rows = [{"prompt_ids": [2, 5, number], "response_ids": [7, 8, 9, number, 1]} for number in range(4)]
    dialogues.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text(json.dumps({"prompt": "hello"}) + "\n" + json.dumps({"prompt": "you"}) + "\n")
    questions.write_text(json.dumps({"question_id": 1, "category": "qa", "turns": ["bye now", "hi"]}) + "\n")
    arguments = ["--output_dir", tmp_path / "runs", "--dialogs", dialogues, "--prompts", prompts]
    arguments += ["--questions", questions, "--num_dialogs", 4, "--recipes", *recipes]
    arguments += ["--max_new_tokens", 6, "--batch_size", 2, "--max_steps", 2, "--curve", 1]
    trained = []
    stock = compare_recipes.train

    def train_until_interrupted(recipe, seed, *rest):
        if (recipe.partial_alignment, seed) == (False, 1):
            raise KeyboardInterrupt
        trained.append((recipe.draft_vocab_size, seed))
        return stock(recipe, seed, *rest)

    monkeypatch.setattr(compare_recipes, "train", train_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, "--seeds", 0, 1)
    assert trained == [(40, 0), (20, 0), (40, 1)]
    monkeypatch.setattr(compare_recipes, "train", stock)
    before = (tmp_path / "runs" / "fspad-0.json").read_text()
    run(*arguments, "--seeds", 0, 1)
    assert (tmp_path / "runs" / "fspad-0.json").read_text() == before, "what is there is kept"
    result = json.loads((tmp_path / "runs" / "eagle-1.json").read_text())
    measured = {(row["prompts"], row["tree"], row["temperature"]): row for row in result["measured"]}
    assert len(measured) == len(result["measured"]) == 2 * 2 * 2
    # The first token of each answer comes before the first step.
    assert sum(measured["held-out", "tree of 59", 0.0]["accept_lengths"]) == 2 * 5
    assert sum(measured["Spec-Bench", "automatic tree", 1.0]["accept_lengths"]) == 5
    assert [sum(lengths) for lengths in result["curve"].values()] == [2 * 5]
    capsys.readouterr()
    run("--output_dir", tmp_path / "runs", "--seeds", 0, 1, 2, "--recipes", *recipes, "--only_report")
    assert capsys.readouterr().out.count("(2)") == 2 * 8, "of three seeds two are there"
    assert (tmp_path / "runs" / "tau_over_steps.png").is_file()
    with pytest.raises(ValueError, match=r"expected the settings of .*, got others \(max_new_tokens 6, now 7\)"):
        run(*arguments, "--max_new_tokens", 7)


def test_record_demo(tmp_path, load_example):
    _, run = load_example("record_demo")
    FSPADModel.from_target(make_target()).save_pretrained(tmp_path / "head")
    record, picture = tmp_path / "demo.json", tmp_path / "demo.svg"
    files = ["--record", record, "--output", picture]
    run(*files, "--head", tmp_path / "head", "--prompt", "hello you", "--dtype", "float32", "--max_new_tokens", 9)
    measured = json.loads(record.read_text())
    assert len(measured["plain"]["pieces"]) == len(measured["fspad"]["pieces"]) == 9
    assert sum(measured["fspad"]["accept_lengths"]) == 8
    before = picture.read_text()
    assert "@font-face" not in before
    assert "hello" in before
    run(*files, "--draw")
    assert picture.read_text() == before
    # The faster one is done, the other is not
    measured["plain"]["seconds"], measured["fspad"]["seconds"] = 3.0, 1.0
    record.write_text(json.dumps(measured))
    run(*files, "--draw")
    text = picture.read_text().replace("&#160;", " ")
    assert "after 1.0 seconds" in text
    assert " 3 tokens" in text
    assert " 9 tokens" in text
    assert "3.00x the speed" in text


def test_draft_size_on_paper(monkeypatch, capsys, load_example):
    paper, run = load_example("draft_size_on_paper")
    monkeypatch.setattr(paper, "NUM_STEPS", 80)  # a head that is of no use is asked in the first 20 or so
    known, _, calculated, _ = paper.MACHINES.items()
    monkeypatch.setattr(paper, "MACHINES", dict([known, calculated]))
    run("--know_scores")
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 5 * len(paper.MACHINES)
    assert all(float(row[5]) > 0.9 for row in rows), "plain steps are always there"
    assert float(rows[4][5]) > 2, "a sure head pays"


class FakeServer(BaseHTTPRequestHandler):
    """Answers of five tokens in two steps, and the counters of it."""

    answered = 0
    lock = threading.Lock()

    def do_GET(self):
        steps, tokens = 2 * self.answered, 5 * self.answered
        names = {
            "generation_tokens": tokens,
            "spec_decode_num_drafts": steps,
            "spec_decode_num_accepted_tokens": 3 * self.answered,
        }
        metrics = "".join(f"vllm:{name}_total {value}\n" for name, value in names.items())
        self.answer(json.dumps({"data": [{"id": "model"}]}) if self.path == "/v1/models" else metrics)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (body["model"], body["max_tokens"]) == ("model", 7)
        with self.lock:
            FakeServer.answered += 1
        self.answer(json.dumps({"usage": {"completion_tokens": 5}}))

    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


def test_serving_load(tmp_path, monkeypatch, capsys, load_example):
    _, run = load_example("serving/load")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n' * 6)
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("COLUMNS", "120")
    options = ("--urls", url, "--prompts", prompts, "--num_prompts", 4, "--concurrency", 1, 2, "--max_tokens", 7)
    run(*options, "--repeats", 2)
    assert FakeServer.answered == 4 + 2 * 2 * 4, "a round to warm up, and two rounds of two"
    rows = [line for line in capsys.readouterr().out.splitlines() if url in line]
    assert len(rows) == 2
    assert all("2.50" in row for row in rows)
    run(*options, "--seconds", 0)
    assert "Stopped" in capsys.readouterr().out
    server.shutdown()
    server.server_close()
    for wrong in (("--urls", "http://example.org"), ("--num_prompts", 1000), ("--concurrency", 500)):
        with pytest.raises(SystemExit):
            run("--prompts", prompts, *wrong)
