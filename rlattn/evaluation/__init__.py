"""`rlattn eval`: a policy on a task or on the user's data, with intervals, against another, under probes.

command.py -> subjects.py (which model) -> plan.py (which items, how answered) -> answers.py (glue: the model writes)
-> figures.py (shares, intervals, comparison) -> show.py (terminal, files). statistics.py: pure.
"""
