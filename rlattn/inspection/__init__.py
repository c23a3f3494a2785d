"""`rlattn inspect`: the rhythm of a text in a model's attention.

inputs.py (texts and model, checked) -> rhythm.py (every text's signals) -> report.py (one JSON object) -> figures.py,
terminal.py.
"""
