"""Rewards inside real GRPO steps: failures, second rollouts, moving weights, token masks, state in checkpoints."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from lethal_rewards import Dying, EndsOnArrival, Hanging
from test_trl_contract import policy  # noqa: F401
from trl import GRPOConfig

from rlattn import AttentionGRPOTrainer
from rlattn.errors import UserError
from rlattn.formats.effort import EffortDraw
from rlattn.grpo.reward_function import RewardFunction
from rlattn.grpo.reward_hooks import RewardOptions
from rlattn.grpo.trl_rows import train_data
from rlattn.recipe.schema import Policy
from rlattn.report.alarms import find_alarms
from rlattn.rewards import REWARDS
from rlattn.rewards.adaptive_effort import AdaptiveEffort
from rlattn.tasks import Arithmetic


def trained(policy, tmp_path, rewards, *, trainer_class=AttentionGRPOTrainer, resume=False, options=None, **settings):  # noqa: F811
    from transformers import AutoTokenizer

    rows, at_epoch = settings.pop("rows", 32), settings.pop("at_epoch", None)
    task = Arithmetic(terms=(3, 3), train_rows=settings.pop("train_rows", 32))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(0)
    timeouts = {name: reward.timeout for name, reward in rewards.items() if hasattr(reward, "timeout")}
    trainer = trainer_class(
        model=str(policy),
        reward_funcs=[RewardFunction(n, r, task, tokenizer, {}, timeouts.get(n)) for n, r in rewards.items()],
        args=GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            gradient_checkpointing=False, learning_rate=1e-2, num_generations=4, per_device_train_batch_size=8,
            max_completion_length=24, **{"max_steps": 2, "save_strategy": "no", "logging_steps": 1, **settings},
        ),
        train_dataset=train_data(task, Policy(path=str(policy)), rows),
        at_epoch=at_epoch,
        processing_class=tokenizer,
        **({"reward_options": options} if options else {}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([value.flatten() for value in trainer.model.state_dict().values()])


class Parity:
    def score(self, rollout):
        return float(sum(rollout.completion_ids) % 2)


class Failing:
    """Fails for the first rollouts of every group of four."""

    def __init__(self, count, how=ZeroDivisionError):
        self.count, self.how, self.calls = count, how, 0

    def score(self, rollout):
        self.calls += 1
        if (self.calls - 1) % 4 < self.count:
            raise self.how("boom")
        return 1.0


def test_failures_are_counted_neutral_and_end_a_run_only_in_numbers(policy, tmp_path):  # noqa: F811
    half = RewardOptions(requires={}, ramps={}, max_failed_share=0.5)
    trainer = trained(policy, tmp_path, {"parity": Parity(), "shaky": Failing(2)}, options=half)
    log = trainer.state.log_history[0]
    assert log["rewards/shaky/failed"] == 4
    assert log["rewards/parity/failed"] == 0
    assert log["rewards/shaky/group_std"] == 0  # neutral is the mean of the rest
    plain = trained(policy, tmp_path, {"parity": Parity()})
    assert torch.equal(weights(trainer), weights(plain))
    with pytest.raises(UserError, match=r"rewards\.shaky: failed for 6 of 8 rollouts at step 1, first with Zero"):
        trained(policy, tmp_path, {"parity": Parity(), "shaky": Failing(3)}, options=half)
    with pytest.raises(
        UserError, match=r"failed for 2 of 8 rollouts at step 1, .* it gave the same number: if it fails"
    ):
        trained(policy, tmp_path, {"parity": Parity(), "shaky": Failing(1)})
    trained(policy, tmp_path, {"once": FailsOnce()})  # a single failure is borne,
    with pytest.raises(UserError, match=r"rewards\.once: failed for 1 of 8"):  # but for the strictest
        trained(
            policy, tmp_path, {"once": FailsOnce()}, options=RewardOptions(requires={}, ramps={}, max_failed_share=0)
        )
    trained(policy, tmp_path, {"shaky": Failing(3)}, options=RewardOptions(requires={}, ramps={}, max_failed_share=1))


class FailsOnce(Parity):
    calls = 0

    def score(self, rollout):
        self.calls += 1
        return 1 / (self.calls - 3)


class FailsOnOdd(Parity):
    """Raises where `Parity` pays 0, else says how long the rollout is."""

    def score(self, rollout):
        return len(rollout.completion_ids) / super().score(rollout)


def test_failures_that_hide_low_reward_are_told(policy, tmp_path):  # noqa: F811
    rewards = {"parity": Parity(), "picky": FailsOnOdd()}
    with pytest.raises(
        UserError, match=r"picky: failed for \d of 8 .* Failures and low reward go together: what it fai"
    ):
        trained(policy, tmp_path, rewards, reward_weights=[1.0, 0.0])
    borne = RewardOptions(requires={}, ramps={}, max_failed_share=1)
    trainer = trained(policy, tmp_path, rewards, options=borne, reward_weights=[1.0, 0.0], max_steps=4)
    rows = trainer.state.log_history[:4]
    assert all(row["rewards/picky/failed_gap"] < -1 for row in rows) and "rewards/parity/failed_gap" not in rows[0]
    found = [alarm for alarm in find_alarms(rows) if alarm.name == "rewards/picky/failed, bias"]
    assert len(found) == 1 and "Failures and low reward go together" in str(found[0])
    assert not any(
        "bias" in alarm.name for alarm in find_alarms([{**r, "rewards/picky/failed_gap": 0.1} for r in rows])
    )


def test_a_score_that_hangs_or_ends_its_process_costs_only_itself():
    from rlattn.rewards.timeout import ScoreWorker
    from rlattn.types import Rollout

    def rollout(token):
        return Rollout(prompt="", prompt_text="", completion="", completion_ids=(token,), row={}, task=None)

    worker = ScoreWorker(Hanging(), 0.5)
    assert worker.score([rollout(2), rollout(3), rollout(4)]) == [(1, ""), (None, "took longer than 0.5 s"), (1, "")]
    worker.stop()
    worker = ScoreWorker(Dying(), 5)
    assert worker.score([rollout(2)]) == [(None, "ended its process")]
    worker.stop()


def test_a_score_whose_process_cannot_start_is_told_as_that(capfd):
    from rlattn.rewards.timeout import ScoreWorker
    from rlattn.types import Rollout

    rollout = Rollout(prompt="", prompt_text="", completion="", completion_ids=(2,), row={}, task=None)
    worker = ScoreWorker(EndsOnArrival(), 5)
    ((score, note), again) = worker.score([rollout, rollout])
    assert score is None and note.startswith("its process did not start: ") and again == (None, note)
    assert worker.process is None and worker.pipe is None


@dataclass
class Second:
    """Asks for second rollouts and keeps them, with a state for the checkpoint."""

    lag: int = 2
    seen: list = field(default_factory=list)
    total: int = 0

    def prepare(self, batch):
        prompts = [rollout.prompt_text for rollout in batch.rollouts]
        old = batch.generate(prompts, max_new_tokens=6, lagged_policy=True)
        now = batch.generate(prompts, max_new_tokens=6)
        self.seen.append((batch.step, old, now))
        self.total += len(batch.gather([1] * len(prompts)))
        batch.log("second/same", float(old == now))
        return old

    def score(self, rollout):
        return float(len(rollout.note) % 3) if rollout.note is not None else None

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


class LogOnly(Second):
    def score(self, rollout):
        return 1.0


def test_second_rollouts_come_from_the_lagged_or_the_current_policy_and_leave_training_alone(policy, tmp_path):  # noqa: F811
    reward = LogOnly()
    trainer = trained(policy, tmp_path, {"parity": Parity(), "second": reward}, max_steps=4)
    same = [old == now for _, old, now in reward.seen]
    assert same == [True, False, True, False]  # refreshed at steps 0, 2, 4
    assert [log["second/same"] for log in trainer.state.log_history[:4]] == [1, 0, 1, 0]
    plain = trained(policy, tmp_path / "plain", {"parity": Parity()}, max_steps=4)
    assert torch.equal(weights(trainer), weights(plain))


def test_state_and_lagged_weights_survive_a_resume(policy, tmp_path):  # noqa: F811
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = LogOnly(lag=3)
    trained(policy, tmp_path / "a", {"parity": Parity(), "second": whole}, max_steps=3)
    trained(policy, tmp_path / "b", {"parity": Parity(), "second": LogOnly(lag=3)}, **{**saving, "max_steps": 2})
    resumed = LogOnly(lag=3)
    trained(policy, tmp_path / "b", {"parity": Parity(), "second": resumed}, resume=True, **saving)
    assert resumed.total == whole.total == 24
    # the policy of step 0 writes the same text about the same prompts, whenever it is asked
    assert resumed.seen[0][0] == 2
    assert resumed.seen[0][1] != resumed.seen[0][2]


class Moving(Parity):
    multiplier = 0.0


def test_ramps_gates_and_multipliers_move_the_weight(policy, tmp_path):  # noqa: F811
    options = RewardOptions(requires={}, ramps={"parity": (1.0, 0.0)})
    trainer = trained(policy, tmp_path, {"parity": Parity(), "moving": Moving()}, options=options)
    assert [log["rewards/parity/weight"] for log in trainer.state.log_history[:2]] == [0, 0.5]
    assert trainer.state.log_history[0]["rewards/moving/weight"] == 0
    gates = RewardOptions(requires={"parity": "accuracy"}, ramps={})
    gated = trained(policy, tmp_path, {"parity": Parity(), "accuracy": REWARDS["accuracy"]()}, options=gates)
    log = gated.state.log_history[0]
    assert log["rewards/accuracy/mean"] == log["reward"] == 0 < log["rewards/parity/mean"]  # no answer is right


class Half(Parity):
    """Says nothing about every other rollout."""

    def score(self, rollout):
        return None if sum(rollout.completion_ids) % 2 else 0.5


def test_means_are_those_of_what_was_scored_before_gates_and_neutral_entries(policy, tmp_path):  # noqa: F811
    options = RewardOptions(requires={"turns": "parity"}, ramps={})
    rewards = {"parity": Parity(), "half": Half(), "turns": FirstToken()}
    log = trained(policy, tmp_path, rewards, options=options, max_steps=1).state.log_history[0]
    assert log["rewards/half/mean"] == 0.5 and log["rewards/half/std"] == 0 and 0 < log["rewards/half/neutral"] < 8
    assert log["rewards/turns/mean"] == 3 and 0 < log["rewards/parity/mean"] < 1


class FirstToken(Parity):
    def score(self, rollout):
        return 3.0


class FirstHalf(Parity):
    def tokens(self, rollout):
        length = len(rollout.completion_ids)
        return [place < length // 2 for place in range(length)]


class Turns(Parity):
    part_count, part_weight = 2, 0.5

    def parts(self, rollout):
        length = len(rollout.completion_ids)
        return [(float(rollout.completion_ids[0]), [place < 3 for place in range(length)])]


def test_rewards_that_name_tokens_move_only_their_advantage(policy, tmp_path):  # noqa: F811
    seen = []

    class Spy(AttentionGRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append((inputs["advantages"], inputs["completion_mask"]))
            return super()._compute_loss(model, inputs)

    trained(policy, tmp_path, {"half": FirstHalf()}, trainer_class=Spy, max_steps=1)
    advantage_BT, mask_BT = seen.pop()
    for advantage_T, mask_T in zip(advantage_BT, mask_BT):
        half = int(mask_T.sum()) // 2
        assert (advantage_T[:half] == advantage_T[0]).all()
        torch.testing.assert_close(advantage_T[half : int(mask_T.sum())].abs().max(), torch.tensor(0.0))
    assert advantage_BT.abs().max() > 0
    trained(policy, tmp_path, {"parity": Parity()}, trainer_class=Spy, max_steps=1)
    trained(policy, tmp_path, {"turns": Turns()}, trainer_class=Spy, max_steps=1)
    (plain_BT, _), (turns_BT, _) = seen
    difference_BT = (turns_BT - plain_BT).sort(dim=0).values  # TRL shuffles rows
    assert difference_BT.shape == plain_BT.shape
    assert torch.equal(turns_BT[:, 3:], plain_BT[:, 3:])
    assert not torch.equal(turns_BT[:, :3], plain_BT[:, :3])


def test_what_parts_add_counts_in_a_rewards_share_and_as_a_signal(policy, tmp_path):  # noqa: F811
    options = {"multi_objective_aggregation": "sum_then_normalize", "reward_weights": [1.0, 0.0], "max_steps": 1}
    log = trained(policy, tmp_path, {"parity": Parity(), "turns": Turns()}, **options).state.log_history[0]
    assert 0.05 < log["rewards/turns/share"] < 0.6  # it has no weight: by its parts alone
    assert log["rewards/turns/share"] + log["rewards/parity/share"] == pytest.approx(1)
    options["reward_weights"] = [0.0, 0.0]
    log = trained(policy, tmp_path, {"parity": Parity(), "turns": Turns()}, **options).state.log_history[0]
    assert log["rewards/turns/share"] == 1 and log["groups_without_signal"] < 1


class Misbehaving(Parity):
    part_count, part_weight, multiplier = 1, 1.0, "x"

    def __init__(self, mask, parts):
        self.mask, self.given = mask, parts

    def tokens(self, rollout):
        return self.mask

    def parts(self, rollout):
        return self.given

    def state_dict(self):
        return {1j: self}


@pytest.mark.parametrize(
    ("mask", "parts"),
    [("abc", []), ([None], []), (None, [("x", [])]), (None, [1]), (None, [(1.0, [True])] * 2), (3, 4)],
)
def test_tokens_and_parts_that_make_no_sense_are_counted_and_neutral(policy, tmp_path, mask, parts):  # noqa: F811
    odd = Misbehaving(mask, parts)
    options = RewardOptions(requires={}, ramps={}, max_failed_share=1)
    trainer = trained(policy, tmp_path, {"odd": odd}, options=options, max_steps=1, save_strategy="steps", save_steps=1)
    assert trainer.state.log_history[0]["rewards/odd/failed"] == 8


class SeenEfforts(AttentionGRPOTrainer):
    """Keeps what every generation batch was asked, as (prompt, effort)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = []

    def _calculate_rewards(self, inputs, prompts, completions, ids):
        assert all(f"Effort: {e['row']['effort']:.2f}\n" in e["prompt"][-1]["content"] for e in inputs)
        self.asked.append([(e["row"]["prompt"], e["row"]["effort"]) for e in inputs])
        return super()._calculate_rewards(inputs, prompts, completions, ids)


def test_a_group_shares_its_effort_epochs_differ_and_a_resume_goes_on(policy, tmp_path):  # noqa: F811
    draw = EffortDraw(efforts=(0.25, 0.5, 0.75, 1.0), seed=0)
    four_rows = {"trainer_class": SeenEfforts, "at_epoch": draw, "rows": 4, "max_steps": 8}
    reward = AdaptiveEffort()
    whole = trained(policy, tmp_path / "a", {"effort": reward}, **four_rows)  # two steps an epoch: four epochs
    efforts = {}
    for batch in whole.asked:
        assert batch[0] == batch[3] and batch[4] == batch[7]  # groups of 4
        for prompt, effort in (batch[0], batch[4]):
            efforts.setdefault(prompt, []).append(effort)
    assert len(efforts) == 4
    assert all(sorted(met) == [0.25, 0.5, 0.75, 1.0] for met in efforts.values())
    assert {f"effort/{r}/tokens" for r in ("0.25", "0.50", "0.75", "1.00")} <= {
        k for log in whole.state.log_history for k in log
    }

    saving = {"save_strategy": "steps", "save_steps": 3}
    trained(policy, tmp_path / "b", {"effort": AdaptiveEffort()}, **{**four_rows, **saving, "max_steps": 3})
    resumed_reward = AdaptiveEffort()
    resumed = trained(policy, tmp_path / "b", {"effort": resumed_reward}, resume=True, **{**four_rows, **saving})
    stored = json.loads((tmp_path / "b/checkpoint-3/rewards.json").read_text())["effort"]["averages"]
    assert len(stored) == 4 and resumed_reward.averages.keys() == stored.keys()
    assert resumed.asked == whole.asked[3:]
    assert [log["rewards/effort/failed"] for log in resumed.state.log_history if "reward" in log] == [0] * 8
