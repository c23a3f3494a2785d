"""From YAML to a frozen Recipe (`schema.py`, `load.py`), then to tasks, rewards and rules (`build.py`). No torch."""
