"""The report of a benchmark: its text and its plots."""

import importlib.util

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from fspad.bench import plots
from fspad.bench.measuring import Answer
from fspad.bench.plot_style import COLORS
from fspad.bench.records import PLAIN, AnswerRecord
from fspad.bench.report import results_table, write_report
from fspad.bench.summary import summarize_methods
from helpers.bench_records import RECORDS

SETUP = {"head": "some", "machine": "Some CPU, 2 cores", "early_exit": None, "methods": ["plain", "fspad"]}


def test_table():
    assert results_table(summarize_methods(RECORDS))[:5] == [
        "| Temperature | Task | Method | Questions | Tokens/s | Speedup | Median | Least | tau | Same as plain | Drafting "
        "| Steps | Other | Efficiency |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 0 (greedy) | all | plain | 3 | 5.0 |  |  |  | 1.00 |  |  | 71% | 29% |  |",
        "| 0 (greedy) | all | fspad | 3 | 8.9 | 2.27x | 2.00x | 0.80x | 3.57 | 3 of 4 | 14% | 50% | 36% | 64% |",
        "| 0 (greedy) | all | prompt-lookup | 1 | 4.7 | 0.94x | 0.94x | 0.94x | 3.60 | 2 of 2 |  | 71% | 29% | 76% |",
    ]


def test_report_has_setup_table_and_plots(tmp_path):
    path = write_report(RECORDS, SETUP, tmp_path / "new" / "folder")
    text = path.read_text()
    assert text.startswith(
        "# Benchmark: some\n\n- head: some\n- machine: Some CPU, 2 cores\n- methods: plain, fspad\n\n| Temp"
    )
    for name in (plots.SPEEDUP, plots.ACCEPTED, plots.TIME, plots.EFFICIENCY):
        assert f"]({name})" in text
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")


def test_only_what_is_known_is_drawn(tmp_path):
    plain = AnswerRecord("some", 1, 0.0, PLAIN, Answer([7], 1.0))
    path = write_report([plain], {}, tmp_path)
    assert not list(tmp_path.glob("*.png"))
    assert "![" not in path.read_text()
    assert "| 0 (greedy) | all | plain | 1 | 1.0 | 1.00 |\n" in path.read_text()


def pixels_of(path):
    return np.round(matplotlib.image.imread(path)[..., :3] * 255).astype(int)


def height_of_bars(path, color):
    """Pixels of the tallest bar of a colour; the legend's are not as tall."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels_of(path) == wanted).all(axis=-1).sum(axis=0).max())


@pytest.fixture
def axes():
    return matplotlib.figure.Figure().subplots()


def test_speedups_are_bars_by_task(axes):
    rows = [row for row in summarize_methods(RECORDS) if row.temperature == 0 and row.method != PLAIN]
    plots._draw_speedups(axes, rows, ["fspad", "prompt-lookup"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all", "math", "RAG"]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights["fspad"] == pytest.approx([6.8 / 3, 2.0, 2.4])
    assert heights["prompt-lookup"] == pytest.approx([4 / 4.25] * 2), "no answer to RAG"


def test_efficiencies_are_bars_by_task(axes):
    rows = [row for row in summarize_methods(RECORDS) if row.temperature == 0 and row.method != PLAIN]
    plots._draw_efficiencies(axes, rows, ["fspad", "prompt-lookup"])
    heights = [bar.get_height() for bar in axes.containers[0]]
    expected = [row.comparison.efficiency for row in rows if row.method == "fspad"]
    assert heights == pytest.approx(expected)


def test_accept_lengths_are_shares_of_steps(axes):
    assert plots.accept_length_shares([1, 1, 2, 13]) == {1: 0.5, 2: 0.25, **dict.fromkeys(range(3, 10), 0.0), 10: 0.25}
    rows = [row for row in summarize_methods(RECORDS) if row.task is None and row.method == "fspad"]
    plots._draw_accept_lengths(axes, rows[:1], ["fspad"])
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert heights == pytest.approx([3 / 7, 0, 0, 2 / 7, 1 / 7, 0, 0, 0, 1 / 7, 0])
    assert axes.get_xticklabels()[-1].get_text() == "10 or more"


def test_times_are_stacked(axes):
    rows = [row for row in summarize_methods(RECORDS) if row.task is None and row.temperature == 0]
    plots._draw_time(axes, rows, [])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain", "fspad", "prompt-lookup"]
    draft, steps, other = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert draft == pytest.approx([0, 1000 * 0.4625 / 29, 0])
    totals = [sum(widths) for widths in zip(draft, steps, other, strict=True)]
    assert totals == pytest.approx([1000 * 6 / 30, 1000 * 3.25 / 29, 1000 * 4.25 / 20])


def test_files_have_a_panel_for_each_temperature(tmp_path):
    rows = summarize_methods(RECORDS)
    assert plots.draw_plots(rows, tmp_path) == [plots.SPEEDUP, plots.ACCEPTED, plots.TIME, plots.EFFICIENCY]
    assert pixels_of(tmp_path / plots.SPEEDUP).shape[:2] == (1035, 1200)
    assert pixels_of(tmp_path / plots.EFFICIENCY).shape[:2] == (555, 1200), "times were recorded at one temperature"
    assert height_of_bars(tmp_path / plots.SPEEDUP, COLORS[0]) > height_of_bars(tmp_path / plots.SPEEDUP, COLORS[1])


def test_settings_of_the_program_stay_as_they_are(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.draw_plots(summarize_methods(RECORDS), tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "fspad\[bench\]"'):
        write_report(RECORDS, SETUP, tmp_path)
