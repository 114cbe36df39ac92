"""Write the card of a head, and its plots, from recorded facts and measured answers.

    python examples/write_card.py --head examples/heads/smollm2-135m-instruct --results results.jsonl

Results are files that `fspad bench` wrote, one for each set of prompts. `card.yaml` in the head's folder (or `--facts
FILE`) holds fields of `FSPADModelCard`, and under `training` those of `Training` and under `measured` what overrules the
`machine`, `dtype` and `threads` of the results.
`--trainer_state trainer_state.json` of the last checkpoint adds steps, epochs and what was measured in training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from fspad import FSPADConfig
from fspad.bench.records import FSPAD, read_records, read_setup
from fspad.hub_cards import FSPADModelCard, Measurement, Training, read_evaluations, summarize


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


def read_measurements(path: Path, facts: dict[str, Any]) -> list[Measurement]:
    """What was measured, and on what."""
    setup = {name: value for name, value in read_setup(path).items() if name in ("machine", "dtype", "threads")}
    measurements = summarize(read_records(path), **{**setup, **facts})
    if not measurements:
        raise ValueError(
            f"expected answers of the method {FSPAD!r} in {path}, got none: let `fspad bench` measure it."
        )
    return measurements


def make_card(head: Path, facts: dict[str, Any], results: list[Path], trainer_state: Path | None) -> FSPADModelCard:
    """Put everything together that is known of a head."""
    facts = dict(facts)
    training = read_training(facts.pop("training", {}), trainer_state)
    measured = facts.pop("measured", {})
    measurements = [measurement for path in results for measurement in read_measurements(path, measured)]
    config = FSPADConfig.from_pretrained(head)
    return FSPADModelCard(config, training=training, measurements=measurements, **facts)


def main() -> None:
    """Write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True, help="folder of the head; gets README.md and PNG files")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="files that `fspad bench` wrote")
    parser.add_argument("--facts", type=Path, help="YAML file of facts; by default card.yaml in the head's folder")
    parser.add_argument("--trainer_state", type=Path, help="trainer_state.json of the training")
    options = parser.parse_args()
    facts_file = options.facts or options.head / "card.yaml"
    facts = yaml.safe_load(facts_file.read_text(encoding="utf-8"))
    print(make_card(options.head, facts, options.results, options.trainer_state).save(options.head))


if __name__ == "__main__":
    main()
