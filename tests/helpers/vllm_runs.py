"""One vLLM engine in a process of its own: what it writes, what its head drafts, and what it counts.

python -m helpers.vllm_runs RUN.json RESULT.json
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that the engine's parts can be looked at
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(TESTS),
}


@dataclass
class Run:
    """What an engine is to do.

    Args:
        target: Folder of the target.
        prompts: Token ids of each prompt.
        head: Folder of the exported head; `None` for plain decoding.
        num_draft_tokens: Tokens of a draft.
        one_by_one: Whether a prompt is answered before the next one is begun, so that drafts can be told apart.
        sampling: Arguments of `SamplingParams`.
        options: Arguments of `LLM`.
    """

    target: str
    prompts: list[list[int]]
    head: str | None = None
    num_draft_tokens: int = 4
    one_by_one: bool = False
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 32})
    options: dict[str, Any] = field(default_factory=dict)


def run(what: Run, folder: Path) -> dict[str, Any]:
    """Do it in a fresh process.

    Args:
        what: What to do.
        folder: Folder for files in between.

    Returns:
        `answers`, the token ids of each; `drafts`, for each prompt in the order of its steps; and `counters`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(asdict(what)))
    command = [sys.executable, "-m", "helpers.vllm_runs", str(folder / "run.json"), str(folder / "result.json")]
    done = subprocess.run(
        command,
        env={**os.environ, **ENVIRONMENT},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "result.json").read_text())


def main(run_file: str, result_file: str) -> None:
    """Do what the file says, and write what came of it."""
    from vllm import LLM, SamplingParams
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    what = Run(**json.loads(Path(run_file).read_text()))
    propose, drafts = SpecDecodeBaseProposer.propose, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        proposed = propose(*args, **kwargs)
        drafts[-1].append(proposed[0].tolist())
        return proposed

    speculation = None
    if what.head is not None:
        speculation = {"method": "eagle", "model": what.head, "num_speculative_tokens": what.num_draft_tokens}
        if what.one_by_one:
            SpecDecodeBaseProposer.propose = recorded
            drafts.append([])  # of the engine's own trial
    options = {"max_model_len": 512, "max_num_seqs": 64, "max_num_batched_tokens": 1024, "seed": 0, **what.options}
    engine = LLM(
        what.target,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        speculative_config=speculation,
        **options,
    )
    params = SamplingParams(**what.sampling, detokenize=False)
    prompts, answers = [{"prompt_token_ids": ids} for ids in what.prompts], []
    drafts.clear()
    for part in [[prompt] for prompt in prompts] if what.one_by_one else [prompts]:
        drafts.append([])
        answers += [list(answer.outputs[0].token_ids) for answer in engine.generate(part, params, use_tqdm=False)]
    counters = {
        metric.name: getattr(metric, "value", None) or getattr(metric, "values", None)
        for metric in engine.get_metrics()
        if "spec_decode" in metric.name
    }
    Path(result_file).write_text(json.dumps({"answers": answers, "drafts": drafts, "counters": counters}))


if __name__ == "__main__":
    main(*sys.argv[1:])
