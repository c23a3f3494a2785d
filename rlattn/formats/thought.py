"""Where a thought ends and what is said begins: `<think> thought </think> answer`. Pure.

A thought that is left open, as in a completion that was cut, has nothing after it: an answer in it is no final answer.
Chat templates may end a prompt in `<think>`; the completion then begins inside the thought.
"""

OPEN, CLOSE = "<think>", "</think>"


def after_thought(text: str) -> str:
    """What is said aloud: what follows the last `</think>`; nothing where a thought is left open."""
    said = text.rpartition(CLOSE)[2]
    return "" if OPEN in said else said


def opens_thought(prompt_text: str) -> bool:
    """Whether what follows the prompt begins inside a thought."""
    return prompt_text.rstrip().endswith(OPEN)


def with_opened_thought(completion: str, prompt_text: str) -> str:
    """A completion as a verifier reads it: a `<think>` that the prompt ends in is written before it."""
    return f"{OPEN}{completion}" if opens_thought(prompt_text) else completion
