"""The recorder script is importable, and the content of a folder comparable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
