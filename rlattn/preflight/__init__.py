"""Everything that is refused before weights load, once (`preflight.py`)."""
