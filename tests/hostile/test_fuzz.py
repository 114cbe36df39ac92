"""A few dozen hostile files of every kind; `tests/hostile/fuzz.py` has as many as wanted."""

import subprocess
import sys
from pathlib import Path


def test_hostile_files_do_nothing_but_give_messages():
    script = Path(__file__).with_name("fuzz.py")
    result = subprocess.run([sys.executable, script, "--seed", "7", "--count", "54"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert "54 inputs, 0 problems" in result.stdout
