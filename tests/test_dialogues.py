"""Dialogues inside real GRPO steps: whose tokens are whose, credit a turn, tool calls, two ranks, evaluation."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import rlattn, torchrun
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

from rlattn import AttentionGRPOTrainer
from rlattn.credit import CREDIT_RULES
from rlattn.credit.advantages import part_advantages
from rlattn.errors import UserError
from rlattn.formats.transcript import read_transcript, runs
from rlattn.grpo.dialogues import check_dialogues
from rlattn.grpo.held_out import evaluate
from rlattn.grpo.reward_function import RewardFunction
from rlattn.grpo.trl_rows import eval_examples, train_data
from rlattn.policy.chat_tokens import completion_text, encode_dialogue, reply_ids
from rlattn.policy.tiny import tiny_policy
from rlattn.recipe.schema import Policy
from rlattn.rewards import REWARDS
from rlattn.tasks import Questions
from rlattn.types import Credit, WarmStart

TASK = Questions(train_rows=16, eval_rows=6, turn_tokens=12, list_choices=False)
SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
    "gradient_checkpointing": False, "learning_rate": 1e-3, "num_generations": 4, "per_device_train_batch_size": 8,
    "max_completion_length": 90, "max_steps": 1, "save_strategy": "no", "per_device_eval_batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(TASK, warm_start=WarmStart(steps=16, batch_size=8, learning_rate=1e-2, noise=1.0))


class Spy(AttentionGRPOTrainer):
    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        masks = [[bool(own) for own in mask] for mask in self._own_masks]
        self.seen.append([inputs, completion_ids_list, masks])
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        self.seen[-1].append(out)
        return out


def trained(policy, tmp_path, rewards, task=TASK, tokenizer=None, model=None, **options):
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(0)
    settings = {**SETTINGS, **options.pop("settings", {})}
    weights = options.pop("weights", None)
    trainer = Spy(
        model=model or str(policy),
        reward_funcs=[RewardFunction(name, reward, task, tokenizer, {}) for name, reward in rewards.items()],
        args=GRPOConfig(output_dir=str(tmp_path), reward_weights=weights, **settings),
        train_dataset=train_data(task, Policy(path=str(policy))),
        processing_class=tokenizer,
        dialogue=task,
        measure=task.metrics,
        **options,
    )
    trainer.train()
    return trainer


def test_a_written_dialogue_has_the_tokens_it_is_held_in(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    row = TASK.rows("eval")[0]
    ids, own = encode_dialogue(tokenizer, read_transcript(TASK.gold(row)))
    assert TASK.verify(completion_text(tokenizer, ids, own), row) == 1
    for _, end, policys in runs(own):
        assert policys == (ids[end - 1] == tokenizer.eos_token_id)  # every turn ends itself
    messages = [{"role": "user", "content": row["prompt"]}]
    for turn, reply in read_transcript(TASK.gold(row)):
        messages.append({"role": "assistant", "content": turn})
        messages += [{"role": "user", "content": reply}] if reply else []
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert whole[-len(ids) :] == ids


def test_rollouts_are_dialogues_whose_replies_are_not_the_policys(policy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rewards = {"accuracy": REWARDS["accuracy"](), "gain": REWARDS["information_gain"]()}
    trainer = trained(policy, tmp_path, rewards, weights=[1.0, 0.0])
    inputs, completions, masks, out = trainer.seen[0]
    assert any(not all(mask) for mask in masks)
    for example, ids, mask in zip(inputs, completions, masks, strict=True):
        assert len(ids) == len(mask) <= SETTINGS["max_completion_length"]
        segments = runs(mask)
        assert segments[0][2]
        assert segments[-1][2]
        assert len(segments) <= 2 * TASK.questions + 1
        for (start, end, own), (low, high, _) in pairwise(segments):
            if own:  # what follows is the customer's answer to it, and nothing else
                turn = completion_text(tokenizer, ids[start:end], [True] * (end - start))
                told = reply_ids(tokenizer, TASK.reply(turn, example["row"]), {})
                assert ids[low:high] in (told, [tokenizer.eos_token_id, *told])
            else:
                assert high - low <= TASK.turn_tokens
    lengths = out["completion_mask"].sum(dim=1)
    trained_tokens = (out["tool_mask"] * out["completion_mask"]).sum(dim=1)
    assert trained_tokens.tolist() == [sum(mask) for mask in masks]
    assert (trained_tokens < lengths).any()
    log = trainer.state.log_history[0]
    assert {"task/gain", "task/gain_share", "task/malformed", "task/opened_best"} <= set(log)
    assert log["rewards/gain/failed"] == 0


def by_hand(task, tokenizer, completions, masks, cost, length, group=4):
    """What turn credit adds, from the transcripts alone."""
    values = torch.full((len(completions), 64), math.nan)
    for row, (ids, mask) in enumerate(zip(completions, masks)):
        for turn, told in enumerate(task.replay(completion_text(tokenizer, ids, mask))):
            values[row, turn] = 0.0 if told.kind == "specification" else told.gain - cost
    added = torch.zeros(len(completions), length)
    for row, mask in enumerate(masks):
        for turn, (start, end) in enumerate((s, e) for s, e, own in runs(mask) if own):
            added[row, start:end] = part_advantages(values, group)[row, turn]
    return added


@pytest.mark.parametrize("credit", [None, "random"])
def test_every_turn_is_paid_for_its_own_gain(policy, tmp_path, credit):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rewards = {"flat": Flat(), "gain": REWARDS["information_gain"](turn_cost=0.2, turn_weight=0.5)}
    trainer = trained(policy, tmp_path, rewards, weights=[1.0, 0.0], credit=CREDIT_RULES[credit]() if credit else None)
    _, completions, masks, out = trainer.seen[0]
    length = out["advantages"].shape[1]
    expected = 0.5 * by_hand(TASK, tokenizer, completions, masks, 0.2, length)
    assert expected.abs().max() > 0.2
    torch.testing.assert_close(out["advantages"], expected)


def test_credit_reads_the_policy_s_own_tokens_alone(policy, tmp_path):
    read = []

    class Equal:
        def __call__(self, signals):
            read.append(signals.mask_BN)
            return Credit(weights_BN=torch.ones_like(signals.waad_BN), metrics={})

    trainer = trained(policy, tmp_path, {"flat": Flat()}, credit=Equal())
    out = trainer.seen[0][3]
    own_BT = (out["completion_mask"] * out["tool_mask"]).bool()
    assert (own_BT.sum(dim=1) < out["completion_mask"].sum(dim=1)).any()
    assert sorted(read[0][:, -own_BT.shape[1] :].tolist()) == sorted(own_BT.tolist())


class Flat:
    def score(self, rollout):
        return 1.0


def test_held_out_dialogues_are_greedy_and_leave_training_alone(policy, tmp_path):
    rewards = {"accuracy": REWARDS["accuracy"]()}
    trainer = trained(policy, tmp_path, rewards)
    examples = eval_examples(TASK, Policy(path=str(policy)))
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, samples = evaluate(trainer.port, TASK, examples, samples=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    again, _ = evaluate(trainer.port, TASK, examples)
    assert first == again
    assert first.rows == 6
    assert {"gain", "gain_share", "turns", "attributes_right"} <= set(first.measured)
    assert "<reply>" in samples[0]["completion"]


GATHERED = """
import json, sys
from pathlib import Path
import conftest, test_dialogues as t
from rlattn.rewards import REWARDS
policy, out = sys.argv[1:]
rewards = {"accuracy": REWARDS["accuracy"](), "gain": REWARDS["information_gain"]()}
settings = {"per_device_train_batch_size": 6}  # with groups of 4, one straddles the ranks
trainer = t.trained(policy, out, rewards, weights=[1.0, 0.0], settings=settings)
_, completions, masks, batch = trainer.seen[0]
found = {"completions": completions, "masks": masks, "advantages": batch["advantages"].tolist(),
         "rows": trainer.rows_in_hand}
Path(out, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(found))
conftest.leave_ranks()
"""


def test_two_ranks_credit_the_same_rollouts_as_one_would(policy, tmp_path):
    (tmp_path / "gathered.py").write_text(GATHERED)
    result = torchrun("gathered.py", str(policy), str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    completions, masks, rows = (ranks[0][key] + ranks[1][key] for key in ("completions", "masks", "rows"))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    length = max(len(ids) for ids in completions)
    expected = by_hand(TASK, tokenizer, completions, masks, 0.1, length)
    right = torch.tensor(
        [TASK.verify(completion_text(tokenizer, i, m), r) for i, m, r in zip(completions, masks, rows)]
    )
    grouped = right.view(-1, 4)
    accuracy = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    start = 0
    for rank in ranks:
        for advantage, mask in zip(rank["advantages"], rank["masks"]):
            whole = expected[start] + accuracy[start]
            torch.testing.assert_close(torch.tensor(advantage)[: len(mask)], whole[: len(mask)], atol=1e-4, rtol=1e-4)
            start += 1


# --- tool calls: a small byte-pair tokenizer with Qwen3's own chat template ---

TOOLS = Questions(style="tools", turn_limit=2, train_rows=8, eval_rows=4)


@pytest.fixture(scope="module")
def caller():
    import trl

    template = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>"]
    special += ["</tool_response>", "<think>", "</think>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [text for row in TOOLS.rows("train") for text in (row["prompt"], TOOLS.gold(row))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=special[1:2],
        padding_side="left",
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def call(question):
    return f'<tool_call>\n{{"name": "ask", "arguments": {{"question": "{question}"}}}}\n</tool_call>'


class Scripted(Spy):
    """Real tool loop, template and loss; only the sampling is replaced, by what each rollout says in turn."""

    def _generate_single_turn(self, prompt_ids, *rest, **more):
        asked = [self._tokenizer.decode(ids).count("<tool_response>") for ids in prompt_ids]
        scripts = [SCRIPTS[index % len(SCRIPTS)] for index in range(len(prompt_ids))]
        turns = [script[min(n, len(script) - 1)] for script, n in zip(scripts, asked)]
        return [self._tokenizer(f"{turn}<|im_end|>")["input_ids"] for turn in turns], None


# TRL's error repeats the argument's name to the policy, and that is no answer of the customer's
FORGED = (
    '<tool_call>\n{"name": "ask", "arguments": {"The size is large.": "What is the size of the parcel?"}}\n</tool_call>'
)
SCRIPTS = [
    [call("Where does the parcel go?"), call("What is the size of the parcel?"), "<spec> size = small </spec>"],
    [call("Must somebody sign for the parcel?"), FORGED, "<spec> size = small </spec>"],
    [call("Where does the parcel go?"), call("Where does the parcel go?"), "<spec> size = small </spec>"],
    [call("What is the size of the parcel?"), call("How will the customer pay?"), "<spec> size = small </spec>"],
]


def test_tool_calls_are_credited_turn_by_turn_as_free_text_is(caller, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(caller), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=caller.pad_token_id, eos_token_id=caller.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "policy")
    caller.save_pretrained(tmp_path / "policy")
    monkeypatch.setitem(globals(), "Spy", Scripted)
    check_dialogues(TOOLS, caller, {})
    rewards = {"accuracy": REWARDS["accuracy"](), "gain": REWARDS["information_gain"]()}
    trainer = trained(
        tmp_path / "policy", tmp_path, rewards, task=TOOLS, weights=[1.0, 0.0], settings={"max_completion_length": 300},
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "policy"),
    )  # fmt: skip
    inputs, completions, masks, out = trainer.seen[0]
    tokenizer = trainer._tokenizer
    texts = [completion_text(tokenizer, ids, mask) for ids, mask in zip(completions, masks)]
    turns = [TOOLS.replay(text) for text in texts]
    assert [[turn.attribute for turn in dialogue] for dialogue in turns[:4]] == [
        ["destination", "size", None],
        ["signature", "size", None],
        ["destination", "destination", None],
        ["size", "payment", None],
    ]
    assert turns[2][0].gain > 2
    assert turns[2][1].gain == 0
    assert "The size is large." in tokenizer.decode(completions[1])
    assert (turns[1][1].gain, turns[1][1].problem) == (0, "unparsed")
    assert inputs[0]["row"]["specification"]["destination"] in texts[0]
    assert trainer.state.log_history[0]["rewards/gain/failed"] == 0
    added = by_hand(TOOLS, tokenizer, completions, masks, 0.1, out["advantages"].shape[1])
    assert added.abs().max() > 0.5
    torch.testing.assert_close(out["advantages"], added)  # accuracy is 0 for all
    examples = eval_examples(TOOLS, Policy(path=str(tmp_path / "policy")))
    found, samples = evaluate(trainer.port, TOOLS, examples, samples=1)
    assert found.measured["turns"] == 2
    assert "It goes to" in samples[0]["completion"]


def test_templates_that_cannot_carry_a_dialogue_are_refused(policy, caller):
    tiny = AutoTokenizer.from_pretrained(policy)
    check_dialogues(TASK, tiny, {})
    with pytest.raises(UserError, match=r"policy\.path: its chat template cannot carry tool calls"):
        check_dialogues(TOOLS, tiny, {})
    tiny.chat_template = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    with pytest.raises(UserError, match="cannot carry a dialogue: TemplateError: one turn only"):
        check_dialogues(TASK, tiny, {})
    tiny.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="leaves a reply of the user's out"):
        check_dialogues(TASK, tiny, {})
    unknown = AutoTokenizer.from_pretrained(policy)
    unknown.chat_template = caller.chat_template + " "
    with pytest.raises(UserError, match="TRL cannot read tool calls in its chat template"):
        check_dialogues(TOOLS, unknown, {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rewards={information_gain: {weight: 0}}"],
            "rewards.information_gain: comes without a reward for the answer",
        ),
        (
            ["rewards={information_gain: {weight: 0}, brevity: {}}"],
            "rewards.information_gain: comes without a reward for",
        ),
        (["rewards.information_gain.turn_credit=false"], "rewards.information_gain.weight: 0 leaves nothing of it"),
        (["task.efforts=[0.5, 1.0]"], "task.efforts: says how long one answer's thought may be"),
        (["rewards.specification.weight=0"], "rewards.information_gain: comes without a reward for the answer"),
        (
            ["rewards.information_gain.weight=1"],
            "rewards.information_gain.weight: 1 would count the gain a second time",
        ),
        (["rewards.information_gain.requires=specification"], "rewards.information_gain.requires: bears on a reward's"),
        (["rewards.information_gain.turn_weight=1e39"], "rewards.information_gain.turn_weight: expected 0 to 1e+06"),
        (["trainer.importance_sampling_level=sequence"], "trainer.importance_sampling_level: sequence spreads"),
        (["task={kind: arithmetic}"], "speaks of dialogues, and Arithmetic has none"),
        (["task.style=tools"], "task.style: tiny-reasoner's chat template cannot carry tool calls"),
        (["task.turn_limit=4"], "task.turn_limit: expected 1 to 3, half of the 6 attributes, found 4"),
        (["task.path=data/task_spaces/none.yaml"], "task.path: no file"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(overrides, message, tmp_path):
    result = rlattn("check", "questions_tiny", *overrides, cwd=tmp_path)
    assert result.returncode == 2, result.stdout
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_both_recipes_check(tmp_path):
    assert rlattn("check", "questions_tiny", cwd=tmp_path).returncode == 0
    big = rlattn("check", "questions_4b_lora", "--ranks", "4", "--gpu-memory", "80", cwd=tmp_path)
    assert big.returncode == 0, big.stderr


def test_a_bound_on_turns_of_free_text_is_refused_where_tools_carry_them(tmp_path):
    result = rlattn("check", "questions_4b_lora", "task.turn_tokens=4", cwd=tmp_path)
    assert result.returncode == 2 and "task.turn_tokens: bounds turns of free text" in result.stderr
