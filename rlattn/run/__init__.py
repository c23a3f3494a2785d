"""One run, from start to end: `run.py`."""
