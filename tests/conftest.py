"""Shared settings of the tests: one BLAS thread each, helpers importable by name, hypothesis without deadlines."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent / "train"))
sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import settings

settings.register_profile("limbeck", deadline=None, max_examples=40)
settings.load_profile("limbeck")
