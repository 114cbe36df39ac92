"""Prompts with something to copy from: summaries, questions about a text, translations, and short questions.

    python examples/task_prompts.py --output_dir task-prompts

A head that was trained on free answers only drafts badly where the target copies from a long prompt. The texts of these
prompts are written by the target itself, the rest is put together from the lists below, always in the same way. The
output folder gets `passages.jsonl`, which is gone on with after an interruption, and `prompts.jsonl` for
`train_smollm2.py --prompts` or `fspad synthesize --prompts`.
"""

# ruff: noqa: SIM905  # lists read better as prose
from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path

import torch

from fspad.bench.smollm2 import load_smollm2
from fspad.trainer.synthesize import synthesize

TOPICS = (
    "a flood in a river town, a bank robbery, the election of a mayor, a record in the long jump, a strike of bus drivers, "
    "the opening of a museum, a forest fire, a new treaty between two states, a football final, a missing sailing boat, "
    "the trial of a banker, a rescue in the mountains, the price of bread, a new vaccine, an earthquake, a lost painting, "
    "the retirement of a famous goalkeeper, a power cut, a heat wave, a school that teaches outdoors, a bridge that was "
    "closed, the launch of a satellite, a merger of two airlines, a court ruling on privacy, a festival of short films, "
    "the Baltic Sea, the steam engine, honey bees, the violin, the Roman road network, photosynthesis, the game of chess, "
    "volcanoes in Iceland, the history of tea, the human heart, whales, glass making, the printing press, deserts, "
    "the planet Saturn, cotton, the siege of a medieval city, lighthouses, penicillin, the Silk Road, the metric system, "
    "coral reefs, the bicycle, jazz, the Aztec calendar, the periodic table, bridges, the moon landing, a jungle river, "
    "the potato, paper money, the marathon, snow leopards, opera houses, tides, the compass, the invention of zero"
).split(", ")
FORMS = (
    "Write a detailed news report about {}. Give names, places and numbers.",
    "Write three paragraphs about {} as an encyclopedia would.",
    "Write a long article about {} with quotes from several people.",
    "Explain {} to a curious reader. Mention dates, people and places.",
)
SUMMARIES = (
    "Summarize: {}",
    "Summarize the following text.\n\n{}",
    "{}\n\nGive a short summary of this text.",
    "Give me the main points of this article:\n\n{}",
)
QUESTIONS = (
    "Who is {}?",
    "When did {} first appear?",
    "Where does {} come from?",
    "What does the text say about {}?",
    "How is {} described?",
    "Why is {} important?",
)
TRANSLATIONS = (
    "Translate German to English: {}",
    "Translate this sentence into English: {}",
    "What does this mean in English? {}",
    "Please translate from German:\n{}",
)
GERMAN = (
    "Der Minister aus {place} sagte am {day} , dass {number} Menschen betroffen seien .",
    "Die Polizei in {place} sucht seit {day} nach {number} gestohlenen Fahrrädern .",
    "Nach dem Spiel in {place} feierten die Anhänger bis spät in die Nacht .",
    "Seit {number} Jahren wird die alte Brücke bei {place} nicht mehr repariert .",
    "„ Wir haben lange auf diesen Tag gewartet “ , erklärte {person} vor dem Rathaus .",
    "Im Sommer fahren viele Familien an die Küste , obwohl die Preise gestiegen sind .",
    "{person} schrieb das Buch in {place} , verkaufte es aber erst {number} Jahre später .",
    "Das neue Krankenhaus soll im kommenden Frühling eröffnet werden , teilte {person} mit .",
    "Wegen des starken Regens wurde der Zug nach {place} am {day} gestrichen .",
    "Die Schülerinnen und Schüler übten {number} Wochen lang für das Konzert .",
    "Vergessen Sie nicht , die Fenster zu schließen , bevor Sie das Haus verlassen .",
    "Der Verein hat inzwischen {number} Mitglieder und sucht einen größeren Raum .",
    "{person} behauptet , die Rechnung sei schon am {day} bezahlt worden .",
    "Kein anderes Tier in diesem Wald ist so selten wie die Wildkatze .",
    "Die Forscher aus {place} untersuchten das Wasser des Sees über {number} Monate .",
    "Am {day} beginnt in {place} die größte Messe für Möbel und Beleuchtung .",
    "Obwohl er müde war , ging {person} noch einmal in die Werkstatt zurück .",
    "Die Gemeinde will die Gebühren für Kindergärten um {number} Prozent senken .",
    "Frisches Obst , gutes Brot und ein Spaziergang am Morgen helfen gegen schlechte Laune .",
    "Unser Hotel liegt ruhig am Rande von {place} und bietet {number} freundliche Zimmer .",
    "Die Verhandlungen zwischen den beiden Gewerkschaften wurden ohne Ergebnis abgebrochen .",
    "{person} wurde {number} geboren und lebte bis zu seinem Tod in {place} .",
    "Bitte schicken Sie uns die Unterlagen spätestens bis {day} zurück .",
    "Mit dieser Entscheidung hatte in {place} niemand gerechnet , auch {person} nicht .",
)
FILLERS = {
    "place": "Bremen, Graz, Leipzig, Zürich, Kassel, Lübeck, Innsbruck, Potsdam, Mainz, Rostock".split(", "),
    "day": "Montag, Dienstag, Mittwoch, Donnerstag, Freitag, Samstag, Sonntag".split(", "),
    "person": "Frau Keller, Herr Brandt, Anna Vogel, Peter Lindner, Doktor Weiss, Sabine Roth".split(", "),
}
SHORT_QUESTIONS = (
    (
        "Who wrote {}?",
        "the first novel, the song about the yellow river, the national anthem of Norway, the Odyssey, Faust",
    ),
    (
        "When was {} built?",
        "the Eiffel Tower, the Panama Canal, the opera house in Sydney, London Bridge, the first dam",
    ),
    (
        "Where is {} located?",
        "the Black Forest, Lake Titicaca, Timbuktu, the Gobi desert, the island of Elba, Cape Horn",
    ),
    ("What is {} made of?", "bronze, a violin bow, cement, the crust of the earth, a candle, nylon, a comet, soap"),
    ("How many {} are there?", "keys on a piano, players in a rugby team, moons of Mars, bones in the hand, oceans"),
    ("What is the capital of {}?", "Bolivia, Kenya, Finland, Mongolia, Portugal, New Zealand, Ghana, Vietnam"),
    ("Who plays {} in the film?", "the captain, the older sister, the detective, the piano teacher, the robot"),
    ("When did {} end?", "the gold rush, the Thirty Years War, the last ice age, the silent film era, the space race"),
    ("What does {} do in the body?", "the liver, insulin, the spleen, vitamin D, the inner ear, iron, the thyroid"),
    ("Which country has {}?", "the longest coast, the most lakes, the oldest university, the highest railway"),
)


def passage_prompts() -> list[str]:
    """What the target is asked to write."""
    return [form.format(topic) for topic, form in product(TOPICS, FORMS)]


def copying_prompts(passages: list[str], rng: random.Random) -> list[str]:
    """A summary of each passage, and a question about it with others around it."""
    prompts = [rng.choice(SUMMARIES).format(passage) for passage in passages]
    for passage in passages:
        names = [word.strip(".,;:'\"()*") for word in passage.split() if word[:1].isupper()]
        question = rng.choice(QUESTIONS).format(rng.choice(names or ["this"]))
        texts = [*rng.sample(passages, rng.choice((0, 1, 2))), passage]
        rng.shuffle(texts)
        prompts.append("\n".join(texts) + "\n" + question)
    return prompts


def translation_prompts(count: int, rng: random.Random) -> list[str]:
    """German sentences to translate, one or two at a time."""
    prompts = []
    for _ in range(count):
        values = {name: rng.choice(words) for name, words in FILLERS.items()} | {"number": rng.randint(3, 1990)}
        sentences = rng.sample(GERMAN, rng.choice((1, 1, 2)))
        prompts.append(rng.choice(TRANSLATIONS).format(" ".join(sentences).format(**values)))
    return prompts


def main() -> None:
    """Let the target write the passages, and write the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_translations", type=int, default=350, help="Prompts to translate.")
    parser.add_argument("--batch_size", type=int, default=32, help="Passages at once.")
    arguments = parser.parse_args()
    target, tokenizer = load_smollm2(torch.bfloat16)
    file = arguments.output_dir / "passages.jsonl"
    asked = passage_prompts()
    synthesize(target, tokenizer, asked, file, temperatures=[1.0], batch_size=arguments.batch_size, max_new_tokens=300)
    # In the order of the prompts, whatever the order of the answers was.
    rows = sorted(map(json.loads, file.read_text(encoding="utf-8").splitlines()), key=lambda row: row["index"])
    passages = [row["messages"][-1]["content"] for row in rows]
    rng = random.Random(0)
    prompts = copying_prompts(passages, rng) + translation_prompts(arguments.num_translations, rng)
    prompts += [frame.format(thing) for frame, things in SHORT_QUESTIONS for thing in things.split(", ")]
    rng.shuffle(prompts)
    lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in dict.fromkeys(prompts))
    (arguments.output_dir / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
