"""`kill -9` at random moments: the same command goes on, and ends as if nothing had happened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("commands", ["pocket train_1 train_2", "preprocess evaluate tutorial"])
def test_what_is_killed_goes_on(commands: str) -> None:
    """Two rounds of each; more by hand: `python tests/kill_anywhere.py --rounds 20`."""
    script = Path(__file__).with_name("kill_anywhere.py")
    line = [sys.executable, str(script), "--rounds", "2", "--only", *commands.split()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"2 rounds, [1-9]\d* kills, 0 runs differ", done.stdout)
