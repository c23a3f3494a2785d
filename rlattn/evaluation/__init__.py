"""`rlattn eval`: a policy on a task or on the user's data, with intervals, against another, under probes.

command.py -> subjects.py (which model) -> plan.py (which items, how answered) -> run.py -> answers.py (it writes)
-> figures.py (shares, intervals, comparison) -> show.py (terminal, files). Probes: probes.py, with flips.py,
perturbation.py, deception.py and judges.py.
"""
