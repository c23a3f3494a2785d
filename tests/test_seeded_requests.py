"""What vLLM is asked for, in TRL's own call of it. vLLM itself, which wants a GPU, is stood in for by a recorder."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from rlattn.grpo import second_rollouts as generation
from rlattn.grpo.multimodal_prompts import Asked
from rlattn.grpo.port import Port
from rlattn.grpo.second_rollouts import seed_requests
from rlattn.processes.phases import Phases


class Recorder:
    """Takes requests as `vllm.LLM.generate` does, and answers each with one token."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        of_rows = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        assert len(of_rows) == len(prompts)
        self.asked.append(of_rows)
        token = SimpleNamespace(token_ids=[7], logprobs=[{7: SimpleNamespace(rank=1, logprob=-0.5)}])
        return [SimpleNamespace(prompt_token_ids=p["prompt_token_ids"], outputs=[token]) for p in prompts]


class Params(SimpleNamespace):
    seed = None


@pytest.fixture(autouse=True)
def _sampling_params(monkeypatch):
    monkeypatch.setattr(vllm_generation, "SamplingParams", Params, raising=False)


def trainer_of(*, step=0, seed=3, process=0, tensor_parallel=1, **settings):
    """A trainer with TRL's engine, as `GRPOTrainer` sets it up around vLLM's."""
    given = {
        "accelerator": SimpleNamespace(process_index=process), "mode": "colocate", "enable_sleep_mode": False,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "logprobs": 0,
        "max_completion_length": 16, "structured_outputs_regex": None, "generation_kwargs": {},
        "model": torch.nn.Identity(), "tensor_parallel_size": tensor_parallel, "llm": Recorder(), **settings,
    }  # fmt: skip
    engine = VLLMGeneration.__new__(VLLMGeneration)
    vars(engine).update(given)
    trainer = SimpleNamespace(
        vllm_generation=engine, _step=step, args=SimpleNamespace(seed=seed), use_vllm=True,
        accelerator=engine.accelerator,
    )  # fmt: skip
    seed_requests(Port(trainer, Phases()))
    return trainer


def seeds(trainer, rows=4):
    """Of one call, through TRL's code."""
    engine = trainer.vllm_generation
    prompts, completions, _, _ = engine.generate([[1, 2]] * rows, None, 4, contextlib.nullcontext())
    assert (prompts, completions) == ([[1, 2]] * rows, [[7]] * rows)
    return [params.seed for params in engine.llm.asked[-1]]


def test_every_request_has_a_seed_of_its_own_and_keeps_the_other_settings():
    trainer = trainer_of(generation_kwargs={"frequency_penalty": 0.5})
    found = seeds(trainer) + seeds(trainer)  # two calls of a step, such as two turns
    trainer._step += 4
    found += seeds(trainer) + seeds(trainer_of(process=1)) + seeds(trainer_of(seed=4))
    assert len(set(found)) == len(found) == 20
    asked = vars(trainer.vllm_generation.llm.asked[0][0])
    assert asked["n"] == 1 and asked["max_tokens"] == 16 and asked["frequency_penalty"] == 0.5


def test_a_run_that_goes_on_asks_what_the_unbroken_one_asks():
    unbroken = trainer_of()
    seeds(unbroken)
    unbroken._step += 4
    with Port(unbroken, Phases()).settings(temperature=0.0):
        assert seeds(unbroken) == [None] * 4  # evaluated before the checkpoint
    assert seeds(unbroken) == seeds(trainer_of(step=4))


def test_the_ranks_of_one_engine_agree_and_other_engines_differ():
    asked = []
    for process in (2, 3, 0):
        llm = trainer_of(process=process, tensor_parallel=2).vllm_generation.llm
        llm.generate([{"prompt_token_ids": [1]}] * 3, sampling_params=Params(temperature=1.0))
        asked.append([params.seed for params in llm.asked[0]])
    assert asked[0] == asked[1]
    assert not set(asked[0]) & set(asked[2])


def test_a_server_is_left_to_trl():
    engine = SimpleNamespace(mode="server")
    seed_requests(Port(SimpleNamespace(vllm_generation=engine, use_vllm=True), Phases()))
    assert vars(engine) == {"mode": "server"}


def test_a_rank_with_fewer_prompts_asks_as_many_as_the_others(monkeypatch):
    """TRL deals the answers of a vLLM server out by rank x number of prompts."""
    asked, shown = [], []

    def single_turn(prompt_ids, images, fields, _):
        asked.append(prompt_ids)
        shown.append((images, fields))
        return [[ord("a") + i] for i in range(len(prompt_ids))], [[-0.5]] * len(prompt_ids)

    monkeypatch.setattr(generation, "gather_object", lambda counts: [*counts, 3])
    special = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    tokenizer = SimpleNamespace(**special, decode=lambda ids, **_: "".join(map(chr, ids)))
    model, device = torch.nn.Identity(), SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(
        use_vllm=True, vllm_generation=SimpleNamespace(temperature=1.0, max_completion_length=8), model=model,
        accelerator=device, _tokenizer=tokenizer, eos_token_ids=[0], _generate_single_turn=single_turn,
    )  # fmt: skip
    port = Port(trainer, Phases())
    assert generation.generate_texts(port, Asked(prompt_ids=[[5, 6], [7, 8]]), max_new_tokens=4) == ["a", "b"]
    seen = Asked(prompt_ids=[[9]], images=[["a picture"]], fields={"pixel_values": [0.5]})
    assert generation.generate_texts(port, seen, max_new_tokens=4) == ["a"]
    assert shown == [(None, {}), ([["a picture"], None, None], {"pixel_values": [0.5]})]
    asked.pop()
    assert generation.generate_greedy(port, [[5]]) == [[ord("a")]]
    assert generation.generate_turn(port, [[5]], max_new_tokens=4, greedy=True) == ([[ord("a")]], [[-0.5]])
    assert asked == [[[5, 6], [7, 8], [0]], [[5], [0], [0]], [[5], [0], [0]]]
