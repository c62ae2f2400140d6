"""To be imported first: finds what tests and benchmarks share (`harness` and others, in the folder above)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
