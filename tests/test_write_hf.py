"""Generation from a plain model: ends, stop strings, padding, and no settings of the model's own."""

import pytest
from test_inspect import save_model, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlattn.policy.generate import write_hf

PROMPTS = ["Two and two?", "A longer prompt than that one: how many?", "Why"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), "qwen3")
    save_tokenizer(folder)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def write(model, **options):
    policy, tokenizer = model
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return write_hf(policy, tokenizer, ids, max_new_tokens=12, **options)


def test_a_batch_is_what_each_prompt_gets_alone(model):
    policy, tokenizer = model
    for prompt, written in zip(PROMPTS, write(model), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        alone = policy.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
        assert written == alone.tolist()


def test_any_of_a_models_end_tokens_ends_it_and_is_kept(model):
    policy, _ = model
    first = write(model)[0]
    kept = policy.generation_config
    policy.generation_config = GenerationConfig(eos_token_id=[257, first[3]], repetition_penalty=9.0)
    try:
        assert write(model)[0] == first[: first.index(first[3]) + 1]  # the penalty is not the recipe's
    finally:
        policy.generation_config = kept


def test_a_stop_string_ends_it_without_padding(model):
    _, tokenizer = model
    first = write(model)[0]
    text = tokenizer.decode(first[2:4])
    written = write(model, stop_strings=[text])[0]
    assert text in tokenizer.decode(written)
    assert text not in tokenizer.decode(written[:-1])
    assert written == first[: len(written)]


def test_sampling_differs_from_greedy_and_a_tokenizer_needs_no_padding_token(model):
    import torch

    _, tokenizer = model
    torch.manual_seed(0)
    sampled = write(model, temperature=5.0)
    assert sampled != write(model)
    pad, tokenizer.pad_token = tokenizer.pad_token, None
    try:
        assert len(write(model)) == 3
    finally:
        tokenizer.pad_token = pad
