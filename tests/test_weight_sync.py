"""What vLLM is sent of a policy with adapters. vLLM itself, which wants a GPU, is stood in for by a recorder.

Run as a script under torchrun it syncs weights that are spread over ranks.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, leave_ranks, torchrun
from datasets import Dataset
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from rlattn import AttentionGRPOTrainer
from rlattn.errors import UserError
from rlattn.grpo.port import Port
from rlattn.grpo.weight_sync import keep_base
from rlattn.policy.tiny import tiny_policy
from rlattn.processes.phases import Phases
from rlattn.tasks import Arithmetic
from rlattn.types import WarmStart

LINEAR = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 32, "target_modules": LINEAR}
KINDS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "lora with biases": LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, lora_bias=True),
    "lora of an embedding": LoraConfig(**{**LORA, "target_modules": ["embed_tokens", "k_proj"]}),
    "lora of parameters": LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj"], target_parameters=["up_proj.weight"]
    ),
    "a module of its own": LoraConfig(**LORA, modules_to_save=["norm"]),
    "ia3": IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, alpha=32, target_modules=LINEAR),
    "layer norms": LNTuningConfig(target_modules=["input_layernorm"]),
}


def policy_of(kind="lora", dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    policy = get_peft_model(Qwen2ForCausalLM(config).to(dtype), copy.deepcopy(KINDS[kind]))
    train(policy)
    return policy


@torch.no_grad()
def train(policy):
    for weight in policy.parameters():
        if weight.requires_grad:
            weight += 0.05 * torch.randn_like(weight)


class Engine:
    """Keeps what it is sent and reads it when all has come, as the packed transfer to a server does."""

    def __init__(self, fails_at=None):
        self.sent, self.fails_at = {}, fails_at

    def load_weights(self, named):
        self.update_named_params(None, named)

    def update_named_params(self, metadata, named):
        for name, tensor in named:
            assert name not in self.sent
            self.sent[name] = tensor
            if name == self.fails_at:
                raise RuntimeError("the engine has gone")
        if metadata is not None:
            assert metadata == [(n, str(t.dtype).removeprefix("torch."), [*t.shape]) for n, t in self.sent.items()]

    def reset_prefix_cache(self):
        pass

    @property
    def llm_engine(self):
        runner = SimpleNamespace(model=self)
        return SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)))


def trainer_of(policy, mode="colocate", keep=keep_base, zero_stage=0, fsdp_version=None, **options):
    """TRL's engine as GRPOTrainer sets it up around vLLM's."""
    state = SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(zero_stage=zero_stage) if zero_stage else None,
        fsdp_plugin=SimpleNamespace(fsdp_version=fsdp_version) if fsdp_version else None,
    )
    accelerator = SimpleNamespace(state=state, is_main_process=True, device=torch.device("cpu"))
    engine = VLLMGeneration.__new__(VLLMGeneration)
    vars(engine).update(
        model=policy, accelerator=accelerator, mode=mode, enable_sleep_mode=False, _weight_metadata=None,
        llm=Engine(**options), vllm_client=Engine(**options),
    )  # fmt: skip
    engine._dist = vllm_generation.DistributedBackend(engine.accelerator)
    trainer = SimpleNamespace(vllm_generation=engine, accelerator=engine.accelerator, use_vllm=True)
    keep(Port(trainer, Phases()))
    return trainer


def sync(trainer):
    """What is sent, as it is when all of it has come."""
    engine = trainer.vllm_generation
    side = engine.vllm_client if engine.mode == "server" else engine.llm
    side.sent = {}
    engine.sync_weights()
    return {name: tensor.clone() for name, tensor in side.sent.items()}


def base_of(policy):
    return {name: weight for name, weight in policy.named_parameters() if not weight.requires_grad}


def merged(policy):
    """PEFT's own merge, of a fresh copy."""
    return dict(copy.deepcopy(policy).merge_and_unload().named_parameters())


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy(Arithmetic(), warm_start=WarmStart(steps=0)))


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sync_sends_the_merged_policy_and_leaves_the_base_as_it_is(kind, mode):
    policy = policy_of(kind)
    trainer, weights, before = trainer_of(policy, mode), base_of(policy), copy.deepcopy(base_of(policy))
    sent = sync(trainer)
    assert_same(sent, merged(policy))
    assert [name for name, weight in base_of(policy).items() if weight is not weights[name]] == []
    assert_same(base_of(policy), before)


def test_fifty_syncs_in_bfloat16_leave_the_base_bit_for_bit():
    policy = policy_of()
    trainer, before = trainer_of(policy), copy.deepcopy(base_of(policy))
    for _ in range(50):
        train(policy)
        sent = sync(trainer)
    assert_same(base_of(policy), before)
    assert_same(sent, merged(policy))


def test_full_weights_are_sent_as_trl_sends_them():
    policy = policy_of().unload()
    assert_same(sync(trainer_of(policy)), dict(policy.named_parameters()))


def test_an_engine_that_fails_leaves_a_policy_to_save():
    policy = policy_of()
    before, wanted = copy.deepcopy(base_of(policy)), merged(policy)
    trainer = trainer_of(policy, fails_at="model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(RuntimeError, match="the engine has gone"):
        trainer.vllm_generation.sync_weights()
    assert_same(base_of(policy), before)
    assert_same(merged(policy), wanted)


def test_fsdp_1_is_refused():
    with pytest.raises(UserError, match="fsdp_config"):
        trainer_of(policy_of(), fsdp_version=1)


class Llm(Engine):
    """Answers as `vllm.LLM` does."""

    def load_weights(self, named):
        pass

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        token = [
            SimpleNamespace(
                token_ids=[5, 6, 7], logprobs=[{t: SimpleNamespace(rank=1, logprob=-1.0)} for t in (5, 6, 7)]
            )
        ]
        return [SimpleNamespace(prompt_token_ids=p["prompt_token_ids"], outputs=token) for p in prompts]


def test_training_with_vllm_leaves_the_base_of_the_adapter(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda engine: setattr(engine, "llm", Llm()))
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    policy = policy_of().unload()
    before = copy.deepcopy(policy.state_dict())
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=3,
        save_strategy="no", num_generations=2, per_device_train_batch_size=2, max_completion_length=4, use_vllm=True,
        learning_rate=0.5, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = AttentionGRPOTrainer(
        model=policy, args=config, processing_class=tokenizer, peft_config=LoraConfig(**LORA),
        reward_funcs=[lambda completion_ids, **_: [float(i) for i in range(len(completion_ids))]],
        train_dataset=Dataset.from_list([{"prompt": "1 + 1"}] * 8),
    )  # fmt: skip
    trainer.train()
    assert trainer._last_loaded_step == 2
    assert_same(trainer.model.unload().state_dict(), before)


def spread_under_zero3(policy):
    import deepspeed

    deepspeed.init_distributed()
    config = {"train_batch_size": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    deepspeed.zero.Init(module=policy, config_dict_or_path=config)
    assert all(weight.numel() == 0 for weight in policy.parameters())
    return {"zero_stage": 3}, lambda weight: weight.ds_tensor


def spread_under_fsdp2(policy):
    for layer in policy.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    return {"fsdp_version": 2}, lambda weight: weight.to_local()


SPREAD = {"zero3": spread_under_zero3, "fsdp2": spread_under_fsdp2}


def test_weights_spread_over_ranks():
    result = torchrun(__file__, cwd=REPO)
    assert result.returncode == 0, result.stderr
    assert [result.stdout.count(f"{kind}: as they are") for kind in SPREAD] == [2, 2]


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for kind, spread in SPREAD.items():
        policy = policy_of()
        wanted = merged(policy)
        options, own = spread(policy)
        trainer = trainer_of(policy, **options)
        before = {name: own(weight).clone() for name, weight in base_of(policy).items()}
        for _ in range(3):
            assert_same(sync(trainer), wanted)
        assert_same({name: own(weight) for name, weight in base_of(policy).items()}, before)
        print(f"{kind}: as they are", flush=True)
    leave_ranks()
