"""Write the card of a head, and its plots, from recorded facts and measured answers.

    python examples/write_card.py --head examples/heads/smollm2-135m-instruct --results results.jsonl

Results are JSON lines, one for each measured answer, with the fields of `fspad.bench.records.AnswerRecord`; what of them
is not known is left out. `card.yaml` in the head's folder (or `--facts FILE`) holds fields of `FSPADModelCard`, and under
`training` those of `Training` and under `measured` the `machine`, `dtype` and `threads` of the results.
`--trainer_state trainer_state.json` of the last checkpoint adds steps, epochs and what was measured in training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from fspad import FSPADConfig
from fspad.bench.records import read_records
from fspad.hub_cards import FSPADModelCard, Training, read_evaluations, summarize


def read_training(facts: dict[str, Any], trainer_state: Path | None) -> Training:
    """Facts of the training, which overrule those of the trainer's state."""
    values: dict[str, Any] = {}
    if trainer_state is not None:
        state = json.loads(trainer_state.read_text(encoding="utf-8"))
        values = {
            "steps": state["global_step"],
            "epochs": round(state["epoch"], 2),
            "evaluations": read_evaluations(state["log_history"]),
        }
    return Training(**{**values, **facts})


def make_card(head: Path, facts: dict[str, Any], results: list[Path], trainer_state: Path | None) -> FSPADModelCard:
    """Put everything together that is known of a head."""
    facts = dict(facts)
    training = read_training(facts.pop("training", {}), trainer_state)
    measured = facts.pop("measured", {})
    records = [record for path in results for record in read_records(path)]
    config = FSPADConfig.from_pretrained(head)
    return FSPADModelCard(config, training=training, measurements=summarize(records, **measured), **facts)


def main() -> None:
    """Write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True, help="folder of the head; gets README.md and PNG files")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="JSON-lines files of measured answers")
    parser.add_argument("--facts", type=Path, help="YAML file of facts; by default card.yaml in the head's folder")
    parser.add_argument("--trainer_state", type=Path, help="trainer_state.json of the training")
    options = parser.parse_args()
    facts_file = options.facts or options.head / "card.yaml"
    facts = yaml.safe_load(facts_file.read_text(encoding="utf-8"))
    print(make_card(options.head, facts, options.results, options.trainer_state).save(options.head))


if __name__ == "__main__":
    main()
