import random
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from forked import PYTHON
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlattn.policy.tiny import _Float32, tiny_policy, train_supervised
from rlattn.tasks.arithmetic import Arithmetic
from rlattn.tasks.countdown import Countdown
from rlattn.types import WarmStart

TASK = Arithmetic(train_rows=300, eval_rows=20)
WARM_START = WarmStart(steps=2, batch_size=2)


def make(cache, task=TASK, seed=0, **options):
    return tiny_policy(task, warm_start=replace(WARM_START, seed=seed), cache_dir=cache, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(cache):
    folder = make(cache)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_policy_has_a_million_parameters_and_writes(loaded):
    model, tokenizer = loaded
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.padding_side == "left"
    prompt = tokenizer(["What is 12 + 13?"], return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("task", [TASK, Countdown(train_rows=300, eval_rows=50)])
def test_tokenizer_knows_its_task(cache, task):
    tokenizer = AutoTokenizer.from_pretrained(make(cache, task))
    rng = Random(1)
    for row in [*task.rows("train"), *task.rows("eval")]:
        for text in (row["prompt"], task.gold(row), task.trace(row, rng, 0.5)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
        assert tokenizer.decode(tokenizer(task.gold(row))["input_ids"]) == task.gold(row)


def test_responses_have_60_to_200_tokens(loaded):
    _, tokenizer = loaded
    rng = Random(0)
    for row in TASK.rows("train"):
        assert 60 <= len(tokenizer(TASK.trace(row, rng, 0.1))["input_ids"]) <= 200


def test_chat_template_keeps_prefixes_and_drops_out_of_decoded_text(loaded):
    _, tokenizer = loaded
    messages = [
        {"role": "system", "content": "Work in <think>."},
        {"role": "user", "content": "What is 12 + 13?"},
        {"role": "assistant", "content": "<answer> 25 </answer>"},
        {"role": "user", "content": "What is 2?"},
    ]

    def ids(count, generate=False):
        return tokenizer.apply_chat_template(messages[:count], add_generation_prompt=generate, return_dict=False)

    for count in (1, 2, 3):
        assert ids(4)[: len(ids(count))] == ids(count)
    assert ids(4)[: len(ids(2, generate=True))] == ids(2, generate=True)
    answer = tokenizer("<answer> 25 </answer>")["input_ids"]
    assert ids(3) == [*ids(2, generate=True), *answer, tokenizer.eos_token_id]
    assert tokenizer.decode(ids(3), skip_special_tokens=True).endswith("What is 12 + 13 ? <answer> 25 </answer>")


def test_second_call_finds_the_folder_and_options_change_it(cache, loaded):
    def fail(*_):
        raise AssertionError("trained again")

    folder = make(cache, progress=fail)
    assert folder.is_dir()
    assert make(cache, seed=1) != folder
    assert make(cache, Arithmetic(train_rows=300, eval_rows=20, largest=50)) != folder
    assert make(cache, system_prompt="Think.") != folder
    assert not list(cache.glob(".tiny-*"))


def test_same_seed_gives_the_same_weights_and_leaves_the_random_state(cache, loaded, tmp_path):
    torch.manual_seed(5), random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    folder = make(tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert folder.name == make(cache).name
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, value in loaded[0].state_dict().items():
        assert torch.equal(value, again[name]), name


def test_two_processes_at_once_get_one_folder(tmp_path):
    program = f"import test_tiny; print(test_tiny.make({str(tmp_path)!r}))"
    started = [subprocess.Popen([*PYTHON, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = [Path(process.communicate()[0].strip()) for process in started]
    assert folders[0] == folders[1]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == folders[:1]


def test_supervised_training_learns_and_stops_at_its_budget(loaded):
    model, tokenizer = loaded
    losses, seen = [], []
    options = {"noise": 0.1, "batch_size": 4, "learning_rate": 3e-3, "seed": 0}
    train_supervised(
        model, tokenizer, TASK, **options, steps=20, progress=lambda step, steps, loss: losses.append(loss)
    )
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    tokens = train_supervised(
        model, tokenizer, TASK, **options, token_budget=1000, progress=lambda *now: seen.append(now)
    )
    assert 1000 <= tokens < 1000 + 4 * 180
    assert seen[-1][:2] == (1000, 1000)
    with pytest.raises(ValueError, match="either"):
        train_supervised(model, tokenizer, TASK, **options)


@pytest.mark.parametrize("options", [{"steps": -1}, {"noise": 1.5}, {"learning_rate": 0}, {"batch_size": 0}])
def test_bad_warm_start_options_are_named(options):
    with pytest.raises(ValueError, match=list(options)[0]):
        WarmStart(**options)


def test_a_warm_start_orthogonalises_in_float32_on_every_device():
    torch.manual_seed(0)
    gradient = torch.randn(4, 8)
    expected = gradient / gradient.norm()
    for _ in range(5):  # Newton-Schulz, as Muon has it
        square = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * square + 2.0315 * square @ square) @ expected
    steps = {}
    for name, context in (("ours", _Float32()), ("torch's own", nullcontext())):
        weight = torch.nn.Parameter(torch.zeros(4, 8))
        weight.grad = gradient.clone()
        with context:
            torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        steps[name] = -weight.detach() / (0.2 * 8**0.5)
    assert torch.allclose(steps["ours"], expected, atol=1e-5)
    assert not torch.allclose(steps["torch's own"], expected, atol=1e-4)  # where not, _Float32 is of no use any more
