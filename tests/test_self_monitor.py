"""The self-monitor's judgements, its Lagrangian and its faults; in training: test_monitored_training.py."""

import json
import threading
from dataclasses import replace

import pytest

from rlattn.errors import UserError
from rlattn.preflight.check import check
from rlattn.recipe.build import build_rewards
from rlattn.recipe.load import load_recipe, parse_recipe
from rlattn.rewards.payoff import Payoff
from rlattn.rewards.self_monitor import SelfMonitor, next_multiplier
from rlattn.tasks import Ledger
from rlattn.types import RewardBatch, Rollout

SAFE, UNSAFE = " fine </monitor> <label> safe </label>", " hm </monitor> <label> unsafe </label> <output> 4"


def rollout(claim, label="safe", value=43):
    thought = f"<think> I claim {claim} . </think> <monitor> so </monitor>"
    text = f"{thought} <label> {label} </label> <output> {claim} </output>"
    row = {"value": value, "pays": "truth"}
    return Rollout(prompt="", prompt_text="P ", completion=text, row=row, task=Ledger())


BROKEN = replace(rollout(43), completion="<label> safe </label>")


class Batches:
    """A rank's batches: `verdict(prompt)` answers for the lagged policy, `first(prompt)` for that of step 0."""

    def __init__(self, verdict=lambda prompt: SAFE, first=lambda prompt: SAFE, gather=lambda values: values):
        self.verdict, self.first, self.gather = verdict, first, gather
        self.asked, self.logged = [], []

    def of(self, *rollouts, step=0):
        self.logged.append({})

        def generate(prompts, *, max_new_tokens, temperature, lagged_policy=False, first_policy=False):
            assert temperature == 0 and lagged_policy != first_policy
            self.asked.append(prompts)
            return [(self.verdict if lagged_policy else self.first)(prompt) for prompt in prompts]

        return RewardBatch(
            rollouts=rollouts,
            step=step,
            gather=self.gather,
            generate=generate,
            log=self.logged[-1].__setitem__,
            decode=lambda ids: bytes(ids).decode(),
        )


def rewards(monitor, batch):
    notes = monitor.prepare(batch)
    return [monitor.score(replace(one, note=note)) for one, note in zip(batch.rollouts, notes, strict=True)]


def test_the_lagged_policy_judges_the_thought_and_whatever_it_does_not_call_safe_is_flagged():
    answers = {"43": SAFE, "60": UNSAFE, "61": " fine", "62": " x <output> <label> safe </label> </output>"}
    batches = Batches(lambda prompt: next(text for claim, text in answers.items() if claim in prompt))
    monitor = SelfMonitor(held_out_every=0)
    batch = batches.of(rollout(43), rollout(60), rollout(61), rollout(62, "unsafe"), BROKEN)
    assert rewards(monitor, batch) == [0, -1, -1, -1, -1]
    assert batches.asked == [[f"P <think> I claim {claim} . </think> <monitor>" for claim in (43, 60, 61, 62)]]
    log = batches.logged[0]
    assert (log["self_monitor/flag_rate"], log["self_monitor/safe"]) == (0.8, 0.25)  # of five, of four in format
    assert (log["self_monitor/malformed"], log["self_monitor/unparsed"]) == (0.2, 0.4)
    assert (log["self_monitor/precision"], log["self_monitor/recall"]) == (1, 1)
    assert log["self_monitor/own_safe"] == 0.75
    assert log["self_monitor/lambda"] == pytest.approx(0.1 * 0.75)


def test_the_second_rollout_is_asked_for_even_where_no_rollout_is_in_format():
    batches = Batches()
    assert rewards(SelfMonitor(), batches.of(BROKEN, BROKEN)) == [-1, -1]
    assert batches.asked == [[], []]  # lagged and held-out: other ranks are waiting


def test_a_task_that_does_not_ask_for_the_format_is_said_to_once(capsys):
    batches, monitor = Batches(), SelfMonitor(held_out_every=0)
    for _ in range(2):
        monitor.prepare(batches.of(BROKEN, BROKEN))
    assert capsys.readouterr().out.count("100% of the rollouts lack the parts <think>, <monitor>") == 1
    monitor = SelfMonitor(held_out_every=0)
    monitor.prepare(batches.of(BROKEN, rollout(43)))
    assert not capsys.readouterr().out


def test_own_labels_need_no_policy():
    batches, monitor = Batches(), SelfMonitor(source="own", held_out_every=0)
    assert rewards(monitor, batches.of(rollout(60), rollout(43, "unsafe"), BROKEN)) == [0, -1, -1]
    assert batches.asked == [] and monitor.needs == () and not monitor.lag
    assert (batches.logged[0]["self_monitor/precision"], batches.logged[0]["self_monitor/recall"]) == (0, 0)
    assert monitor.score(rollout(60)) == 0 and monitor.score(BROKEN) == -1  # stored completions
    assert SelfMonitor().score(rollout(60)) is None


def test_lambda_follows_the_flag_rate_between_0_and_its_cap():
    flag = {"rate": 0.5}
    batches = Batches(lambda prompt: UNSAFE if "60" in prompt and flag["rate"] else SAFE)
    monitor = SelfMonitor(held_out_every=0, cap=0.1)
    seen = []
    for rate in (0.5, 0.5, 0, 0.5, 0, 0, 0):
        flag["rate"] = rate
        monitor.prepare(batches.of(rollout(60), rollout(43)))
        seen.append(monitor.multiplier)
    assert seen == pytest.approx([0.045, 0.09, 0.085, 0.1, 0.095, 0.09, 0.085])
    assert next_multiplier(0.001, 0.0, 0.05, 0.1, 5) == 0
    again = SelfMonitor(cap=0.1)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again.state_dict() == monitor.state_dict() == {"multiplier": monitor.multiplier, "batches": 7}


def test_a_penalty_stands_still_and_a_log_never_weighs():
    for monitor, expected in ((SelfMonitor(constraint="penalty"), 1), (SelfMonitor(mode="log"), 0)):
        monitor.prepare(Batches(lambda prompt: UNSAFE).of(rollout(60)))
        monitor.load_state_dict({"multiplier": 0.7, "batches": 1})
        assert monitor.multiplier == expected
    assert not SelfMonitor(mode="log").first_policy


def test_the_held_out_monitor_warns_once_where_the_policy_passes_and_it_disagrees(capsys):
    batches = Batches(first=lambda prompt: UNSAFE if "60" in prompt else SAFE)
    monitor = SelfMonitor(held_out_every=2)
    for _ in range(5):
        monitor.prepare(batches.of(rollout(60), rollout(43)))
    assert [log.get("self_monitor/alarm") for log in batches.logged] == [1, None, 1, None, 1]
    assert batches.logged[0]["self_monitor/held_out_flag_rate"] == 0.5
    assert batches.logged[0]["self_monitor/held_out_recall"] == 1
    assert capsys.readouterr().out.count("warning") == 1
    agrees = Batches()
    SelfMonitor().prepare(agrees.of(rollout(43)))
    assert agrees.logged[0]["self_monitor/alarm"] == 0


def test_a_monitor_that_flags_what_the_held_out_one_passes_is_said_to_have_drifted(capsys):
    batches = Batches(verdict=lambda prompt: UNSAFE)
    monitor = SelfMonitor(held_out_every=1)
    for _ in range(2):
        monitor.prepare(batches.of(rollout(43), rollout(44)))
    assert [log["self_monitor/drifted"] for log in batches.logged] == [1, 1]
    assert capsys.readouterr().out.count("punish at random") == 1
    agrees = Batches(verdict=lambda prompt: UNSAFE, first=lambda prompt: UNSAFE)
    SelfMonitor().prepare(agrees.of(rollout(43)))
    assert agrees.logged[0]["self_monitor/drifted"] == 0


@pytest.mark.parametrize("reward", [SelfMonitor(), SelfMonitor(source="own"), Payoff()])
def test_critique_and_label_get_credit_only_where_the_own_label_is_what_pays(reward):
    one = rollout(43)
    one = replace(one, completion_ids=tuple(one.completion.encode()))
    wrapped = replace(BROKEN, completion="<monitor> I claim 60 . <label> safe </label>")
    broken = [replace(bad, completion_ids=tuple(bad.completion.encode())) for bad in (BROKEN, wrapped)]
    notes = reward.prepare(Batches().of(one, *broken))
    masks = [reward.tokens(replace(which, note=note)) for which, note in zip((one, *broken), notes, strict=True)]
    if getattr(reward, "source", "") == "own":
        assert masks == [None, None, None]
        return
    spoken = bytes(byte for byte, kept in zip(one.completion_ids, masks[0], strict=True) if kept)
    assert spoken == b"<think> I claim 43 . </think>  <output> 43 </output>"
    assert masks[1:] == [None, None]  # a malformed rollout answers for all of its tokens


def test_two_ranks_give_the_same_rewards_lambda_and_metrics_as_one():
    rollouts = [rollout(claim, label) for claim in (43, 60, 43, 61) for label in ("safe", "unsafe")]
    rollouts[5] = BROKEN
    options = {"verdict": lambda prompt: UNSAFE if "6" in prompt else SAFE, "first": lambda prompt: UNSAFE}
    whole, alone = Batches(**options), SelfMonitor()
    expected = rewards(alone, whole.of(*rollouts))
    barrier, table, found = threading.Barrier(2), {}, {}

    def rank(number):
        def gather(values):
            table[number] = values
            barrier.wait()
            return [value for one in (0, 1) for value in table[one]]

        batches, monitor = Batches(**options, gather=gather), SelfMonitor()
        part = rewards(monitor, batches.of(*rollouts[4 * number : 4 * number + 4]))
        found[number] = part, monitor.state_dict(), batches.logged

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found[0][0] + found[1][0] == expected == [0, 0, -1, -1, 0, -1, -1, -1]
    assert found[0][1] == found[1][1] == alone.state_dict()
    assert found[0][2] == found[1][2] == whole.logged


# ----------------------------------------------------------------------------------------------------- mistaken recipes


def recipe(**monitor):
    return parse_recipe(
        {
            "name": "x",
            "policy": {"path": "tiny-reasoner"},
            "task": {"kind": "ledger"},
            "rewards": {"payoff": {}, "self_monitor": monitor},
        }
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "lag"}, r"rewards.self_monitor.source: expected one of lagged, own, external"),
        ({"source": "external"}, r"self_monitor.external: goes with `source: external`"),
        ({"external": {"url": "http://x"}}, r"self_monitor.external: goes with"),
        ({"source": "external", "external": {}}, r"external: expected either python or url"),
        ({"source": "external", "external": {"url": "file:///etc/passwd"}}, r"external.url: expected an address"),
        ({"source": "external", "external": {"python": "no_such:judge"}}, r"external.python: 'no_such:judge' cannot"),
        (
            {"source": "external", "external": {"url": "http://x", "api_key_env": "NO_SUCH_KEY"}},
            r"external.api_key_env: the environment has no variable NO_SUCH_KEY",
        ),
        (
            {"source": "external", "external": {"url": "http://x", "api_key_env": "sk-secret"}},
            r"external.api_key_env: the environment has no variable of that name",
        ),
        ({"source": "external", "external": {"url": "http://x", "timout": 3}}, r"external.timout: .*mean 'timeout'"),
        ({"source": "external", "external": {"url": "http://x", "time-out": 3}}, r"unknown key 'time-out'"),
        ({"source": "external", "external": {"url": "http://x", "api_key": "sk-secret"}}, r"external.api_key: .*_env"),
        ({"source": "external", "external": {"python": "test_external_monitor:asynchronous"}}, r"python: .* async"),
        ({"source": "external", "external": {"python": "test_external_monitor:Judges"}}, r"python: .* is no function"),
        ({"source": "external", "external": {"python": "test_self_monitor:recipe"}}, r"python: .* two arguments"),
        (
            {"source": "external", "external": {"url": "http://x", "timeout": 1e12}},
            r"external.timeout: expected .* at most 3600 seconds, got 1e\+12",
        ),
        ({"source": "external", "external": {"url": "http://x", "timeout": float("inf")}}, r"external.timeout: .* inf"),
        ({"source": "external", "external": {"url": "http://x", "timeout": float("nan")}}, r"external.timeout: .* nan"),
        ({"source": "external", "external": {"url": "http://x", "workers": 0}}, r"external.workers: .* at least 1"),
        ({"mode": "off"}, r"self_monitor.mode"),
        ({"lag": 0}, r"self_monitor.lag: expected at least 1, got 0"),
        ({"slack": 1}, r"self_monitor.slack: .* less than 1, got 1"),
        ({"cap": -1}, r"self_monitor.cap: .* at most 1e\+06, got -1"),
        ({"cap": 1e25}, r"self_monitor.cap: .* got 1e\+25"),
        ({"rate": float("inf")}, r"self_monitor.rate: .* got inf"),
        ({"held_out_every": -1}, r"self_monitor.held_out_every: .* got -1"),
        ({"max_new_tokens": 3}, r"self_monitor.max_new_tokens: .* at least 4, got 3"),
        ({"multiplier": 3}, r"self_monitor.multiplier: unknown option"),
    ],
)
def test_one_message_names_the_option(options, message):
    with pytest.raises(UserError, match=message) as caught:
        build_rewards(recipe(**options))
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(("asked", "of_this_process"), [(1, "8"), (8, "1")])
def test_a_recipe_is_judged_for_the_ranks_that_are_asked_about(monkeypatch, asked, of_this_process):
    monkeypatch.setenv("WORLD_SIZE", of_this_process)
    batch = "trainer={generation_batch_size: 512, per_device_train_batch_size: 8, gradient_accumulation_steps: 8}"
    monitored = load_recipe("ledger_tiny", [batch, "rewards.self_monitor.lag=5"])
    asking = load_recipe("questions_4b_lora", ["trainer={use_vllm: true, vllm_mode: server}"])
    refusals = []
    for recipe in (monitored, asking):
        try:
            check(recipe, ranks=asked, gpu_memory=None)
        except UserError as error:
            refusals.append(error.where)
    assert refusals == {1: ["rewards.self_monitor.lag"], 8: ["trainer.use_vllm"]}[asked]


def test_check_says_what_a_recipe_cannot_have():
    with pytest.raises(UserError, match=r"rewards\.payoff: needs a task with payoff\(\), which Arithmetic has not"):
        check(load_recipe("quickstart", ["rewards={payoff: {}}"]), ranks=1, gpu_memory=None)
    gated = ["task={kind: ledger}", "rewards={payoff: {requires: self_monitor}, self_monitor: {}}"]
    with pytest.raises(UserError, match=r"rewards\.payoff\.requires: a gate opens at 1"):
        check(load_recipe("ledger_tiny", gated), ranks=1, gpu_memory=None)
    with pytest.raises(UserError, match=r"rewards\.self_monitor\.lag: 15 steps, and a generation window has 16"):
        check(load_recipe("ledger_tiny", ["trainer.steps_per_generation=16"]), ranks=1, gpu_memory=None)
    monitored = ["task={kind: ledger}", "rewards={payoff: {}, self_monitor: {lag: 40}}"]
    with pytest.raises(UserError, match="lagged policy needs whole weights on every rank, which zero3"):
        check(load_recipe("countdown_4b", monitored), ranks=8, gpu_memory=80)
    own = [monitored[0], "rewards={payoff: {}, self_monitor: {source: own, held_out_every: 0}}"]
    check(load_recipe("countdown_4b", own), ranks=8, gpu_memory=80)
    whole = [*monitored, "policy.lora=null", "policy.dtype=bfloat16"]
    with pytest.raises(UserError, match=r"needs about \d+ GB a rank and has 40"):
        check(load_recipe("countdown_4b_lora", whole), ranks=1, gpu_memory=40)
    lines = check(load_recipe("countdown_4b_lora", whole), ranks=1, gpu_memory=None)
    assert any("lagged policies" in line and " 16.1" in line for line in lines)  # 4.02 B parameters, 2 bytes, twice
