"""Runs every case on every type of causal and vision-language model, and writes the support matrix `docs/support.md`.

    python tests/families/matrix.py [TYPE ...]

Results go to JSON lines; types that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from families.cases import CASES, cases_of, check  # noqa: E402
from families.tiny_models import TinyType, all_types  # noqa: E402


def main() -> None:
    """Run what has not run yet, and write the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "types", nargs="*", type=TinyType.parse, help="only these types, e.g. 'gemma3' 'llava (image)'"
    )
    parser.add_argument("--results", type=Path, default=Path("support.jsonl"), help="where results are kept")
    parser.add_argument("--document", type=Path, default=HERE.parents[1] / "docs" / "support.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    run_types(arguments.types or list(all_types()), arguments.results)
    arguments.document.write_text(document(read(arguments.results)))
    print(f"wrote {arguments.document}")


def run_types(types: list[TinyType], path: Path) -> None:
    """Run all cases of types; results are appended type by type."""
    done = {row["type"] for row in read(path)}
    columns = TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with path.open("a") as file, Progress(*columns) as progress:
        task = progress.add_task("", total=len(types))
        for tiny_type in types:
            progress.update(task, description=str(tiny_type))
            if str(tiny_type) not in done:
                results = [check(tiny_type, case) for case in cases_of(tiny_type)]
                file.writelines(json.dumps(result.to_dict()) + "\n" for result in results)
                file.flush()
            progress.advance(task)


def read(path: Path) -> list[dict]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


WRONG = ("different", "crashed")
HEADER = """# Supported targets

Every type of causal and of vision-language model in transformers {transformers}, as a tiny random model in fp32 on a CPU
(torch {torch}), decoded plainly and with a head. `python tests/families/matrix.py` writes this file.

*Identical* counts the cases in which every token, and whatever else was asked for, is that of plain `generate`. *Near ties* are
differences where the two tokens' scores are less than 1e-4 apart and that are gone in fp64. Cases in which plain decoding
fails too are not counted. The cases are: {cases}.

{summary}

| Type | Verified by | Cases | Identical | Near ties | Refused | Different |
|---|---|---|---|---|---|---|
{rows}

## Why not the tree

{reasons}

## Differences

{differences}

## Not tried

{untried}
"""


def document(rows: list[dict]) -> str:
    """The support matrix as Markdown.

    Args:
        rows: All results.
    """
    by_type: dict[str, list[dict]] = {}
    for row in rows:
        by_type.setdefault(row["type"], []).append(row)
    tried = {name: [r for r in own if r["outcome"] != "not applicable"] for name, own in by_type.items()}
    counted = [row for own in tried.values() for row in own]
    totals = Counter(row["outcome"] for row in counted)
    reasons = {name: sorted({r["reason"] for r in own if r["reason"]}) for name, own in tried.items()}
    return HEADER.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        cases=", ".join(CASES),
        summary=f"{sum(map(bool, tried.values()))} types and {len(counted)} cases: "
        + ", ".join(f"{number} {outcome}" for outcome, number in totals.most_common())
        + ".",
        rows="\n".join(_table_row(name, own) for name, own in tried.items() if own),
        reasons=_list(f"{name}: {'; '.join(said)}" for name, said in reasons.items() if said),
        differences=_list(f"{r['type']}, {r['case']}: {r['detail']}" for r in counted if r["outcome"] in WRONG),
        untried=_list(f"{name}: {by_type[name][0]['detail']}" for name, own in tried.items() if not own),
    )


def _table_row(name: str, rows: list[dict]) -> str:
    count = Counter(row["outcome"] for row in rows)
    modes = ", ".join(sorted({row["mode"] for row in rows if row["mode"]})) or "-"
    wrong = sum(count[outcome] for outcome in WRONG)
    numbers = [len(rows), count["identical"], count["near tie"], count["refused"], wrong]
    return f"| {name} | {modes} | {' | '.join(map(str, numbers))} |"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "None."


if __name__ == "__main__":
    main()
