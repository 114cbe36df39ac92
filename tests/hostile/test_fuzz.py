"""A few dozen hostile files of every kind; `tests/hostile/fuzz.py` has as many as wanted."""

from pathlib import Path

from helpers import fresh


def test_hostile_files_do_nothing_but_give_messages(tmp_path):
    fuzz = Path(__file__).with_name("fuzz.py")
    script = f"import runpy; runpy.run_path({str(fuzz)!r}, run_name='__main__')"
    output = fresh.run(script, tmp_path, "--seed", 7, "--count", 54)
    assert "54 inputs, 0 problems" in output
