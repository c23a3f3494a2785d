"""The only room that knows TRL's trainer: `trainer.py` extends it, `port.py` names what is used of its private side."""
