"""Loading a model and its tokenizer, prompts and chat tokens, plain generation, and the built-in tiny policy."""
