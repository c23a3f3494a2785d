"""Speed, memory and kills; both sides are measured in one run."""
