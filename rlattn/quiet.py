"""Other libraries' chatter, kept off the terminal."""

import logging
import os
import warnings


def quiet() -> None:
    """Silences other libraries before and after their import; rlattn's own warnings stay. Imports transformers."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|trl|peft|datasets)\b")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed otherwise warns that it found no other
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
