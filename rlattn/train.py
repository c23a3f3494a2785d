"""`torchrun … -m rlattn.train RECIPE` trains on many ranks: `rlattn train` for launchers that start a module."""

import sys

from rlattn.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
