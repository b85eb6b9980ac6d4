"""Lets the tests of several processes import what each process does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
