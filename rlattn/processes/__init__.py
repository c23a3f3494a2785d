"""Starting, watching and stopping the ranks of a run."""
