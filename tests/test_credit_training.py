"""Credit inside real GRPO steps: uniform is plain TRL, no forward is added, both places give the same weights."""

import pytest
import torch
from conftest import torchrun
from peft import LoraConfig
from test_trl_contract import policy, trained  # noqa: F401
from trl import GRPOTrainer

from rlattn import AttentionGRPOTrainer
from rlattn.credit import CREDIT_RULES
from rlattn.credit.base import compute_credit
from rlattn.errors import UserError
from rlattn.recipe.load import load_recipe
from rlattn.run.build import prepare
from rlattn.types import AttentionOptions, Credit, CreditOptions, Signals

MODES = {
    "aligned": {"max_steps": 5},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "misaligned": {"steps_per_generation": 2, "max_steps": 4},
    "accumulated": {"gradient_accumulation_steps": 2},
    "reference": {"beta": 0.04},
    "checkpointed": {"gradient_checkpointing": True},
}


DIAGNOSTICS = {
    f"credit/{name}" for name in (
        "mean", "max", "share_amplified", "gini", "effective_tokens", "share_undefined", "anchor_preplan_overlap",
        "waad_entropy_coupling", "fai_waad_coupling", "strength", "nonfinite_rows", "refused_rows",
    )
}  # fmt: skip


def credited(rule, **arguments):
    """A trainer class that counts its forwards and keeps the advantages its loss read."""

    class Credited(AttentionGRPOTrainer if rule != "plain" else GRPOTrainer):
        forwards, seen = 0, []

        def __init__(self, *args, **kwargs):
            own = {} if rule == "plain" else {"credit": rule and CREDIT_RULES[rule](), **arguments}
            super().__init__(*args, **kwargs, **own)
            type(self).forwards, type(self).seen = 0, []
            self.model.register_forward_pre_hook(lambda *_: setattr(type(self), "forwards", type(self).forwards + 1))

    return Credited


@pytest.mark.parametrize("mode", MODES)
def test_uniform_is_plain_trl_bit_for_bit_and_adds_no_forward(policy, tmp_path, mode):  # noqa: F811
    plain_class, uniform_class = credited("plain"), credited("uniform")
    plain = trained(plain_class, policy, tmp_path / "a", **MODES[mode])
    ours = trained(uniform_class, policy, tmp_path / "b", **MODES[mode])
    assert uniform_class.forwards == plain_class.forwards
    for (name, expected), actual in zip(plain.model.state_dict().items(), ours.model.state_dict().values()):
        assert torch.equal(expected, actual), name
    assert ours.state.log_history[0]["credit/mean"] == 1


@pytest.fixture(scope="module")
def of_grpo(policy, tmp_path_factory):  # noqa: F811
    """The weights after training without credit."""
    return trained(AttentionGRPOTrainer, policy, tmp_path_factory.mktemp("grpo")).model.state_dict()


@pytest.mark.parametrize("rule", [name for name in CREDIT_RULES if name != "uniform"])
def test_every_rule_trains_logs_its_diagnostics_and_differs_from_grpo(policy, of_grpo, tmp_path, rule):  # noqa: F811
    ours = trained(credited(rule, attention=AttentionOptions(horizon=(2, 8))), policy, tmp_path / "b")
    logs = ours.state.log_history[0]
    assert logs["credit/max"] == pytest.approx(1.75 if rule in ("coupled_rhythm", "shuffled") else 1.5)  # terms add
    assert 0.1 < logs["credit/share_amplified"] < 0.9
    assert logs["credit/nonfinite_rows"] == 0
    assert logs.keys() >= DIAGNOSTICS
    assert any(not torch.equal(of_grpo[name], weights) for name, weights in ours.model.state_dict().items())


LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


@pytest.mark.parametrize(
    ("options", "peft"),
    [({}, None), ({"beta": 0.04}, None), ({"beta": 0.04}, LORA), ({"beta": 0.04, "num_iterations": 2}, LORA)],
    ids=["plain", "reference", "adapter, reference", "adapter, reference, two iterations"],
)
def test_the_weights_are_those_of_the_policy_that_wrote_the_rollouts(policy, tmp_path, options, peft):  # noqa: F811
    pairs = []

    class Checked(AttentionGRPOTrainer):
        def __init__(self, *args, **kwargs):
            attention = AttentionOptions(horizon=(2, 8))
            super().__init__(
                *args, **kwargs, peft_config=peft, credit=CREDIT_RULES["coupled_rhythm"](), attention=attention
            )
            weigh = self.reader._weights

            def kept(*forward):
                self.used = weigh(*forward)
                return self.used

            self.reader._weights = kept

        def _compute_loss(self, model, inputs):
            before = inputs["advantages"].clone()
            loss = super()._compute_loss(model, inputs)
            assert torch.equal(inputs["advantages"], before), "TRL's buffer stays as it was"
            if self.state.global_step % self.num_iterations == 0:  # the policy has not moved since
                used, read = self.used, []
                with self.reader.reading(read.append, lambda: None):
                    self.port.reread(inputs)
                pairs.append((used, read[0]))
            return loss

    trained(Checked, policy, tmp_path, **{"max_steps": 4, **options})
    assert len(pairs) == 4 // options.get("num_iterations", 1)
    for used, own in pairs:
        assert sorted(used.tolist()) == sorted(own.tolist())  # TRL shuffles what it trains on more than once
    assert any((weights != 1).any() for weights, _ in pairs)


@pytest.mark.parametrize(("scope", "extra"), [("sequence", 0), ("calibrated", 1), ("batch", 3)])
def test_only_wider_head_sets_cost_a_forward(policy, tmp_path, scope, extra):  # noqa: F811
    plain_class = credited("plain")
    scoped_class = credited("coupled_rhythm", attention=AttentionOptions(scope=scope, horizon=(2, 8)))
    trained(plain_class, policy, tmp_path / "a")
    trained(scoped_class, policy, tmp_path / "b")
    assert scoped_class.forwards == plain_class.forwards + extra


def test_sign_and_schedule_change_the_run(policy, tmp_path):  # noqa: F811
    def final(**options):
        chosen = credited(
            "coupled_rhythm", attention=AttentionOptions(horizon=(2, 8)), credit_options=CreditOptions(**options)
        )
        trainer = trained(chosen, policy, tmp_path / str(options))
        strengths.append(trainer.state.log_history[0]["credit/strength"])
        state = trainer.model.state_dict()
        return torch.cat([value.flatten() for value in state.values()])

    strengths = []
    finals = [final(), final(sign="positive"), final(sign="negative"), final(warmup=1.0)]
    for index, one in enumerate(finals):
        assert not any(torch.equal(one, other) for other in finals[index + 1 :])
    assert strengths == [1, 1, 1, 0]


def test_sequence_level_ratios_are_refused(policy, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="importance_sampling_level"):
        trained(credited("local_chunk"), policy, tmp_path, importance_sampling_level="sequence", loss_type="grpo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_triton_backend_is_refused_without_a_gpu_before_anything_is_made():
    recipe = load_recipe("quickstart", ["credit={kind: local_chunk}", "attention.backend=triton"])
    with pytest.raises(UserError, match=r"attention\.backend: triton"):
        prepare(recipe)


def test_weights_that_are_not_finite_leave_grpo_and_are_counted(policy, tmp_path):  # noqa: F811
    class Broken:
        def __call__(self, signals):
            from rlattn.types import Credit

            return Credit(weights_BN=torch.full_like(signals.waad_BN, float("nan")), metrics={})

    class Trainer(AttentionGRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, credit=Broken())

    ours = trained(Trainer, policy, tmp_path / "a", gradient_accumulation_steps=2)
    plain = trained(GRPOTrainer, policy, tmp_path / "b", gradient_accumulation_steps=2)
    assert ours.state.log_history[0]["credit/refused_rows"] == 16  # of a step, whatever its batches
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), ours.model.state_dict().values()))


def test_calibrated_heads_are_kept_by_a_checkpoint(policy, tmp_path):  # noqa: F811
    scoped = credited("coupled_rhythm", attention=AttentionOptions(scope="calibrated", horizon=(2, 8)))
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = trained(scoped, policy, tmp_path, max_steps=1, **saving)
    resumed = trained(scoped, policy, tmp_path, resume=True, max_steps=2, **saving)
    assert all(torch.equal(a, b) for a, b in zip(first.reader.heads, resumed.reader.heads))
    assert first.reader.heads[0].any()


UNIFORM_ON_TWO_RANKS = """
import sys, torch
import conftest, rlattn.grpo.credit_reader
import test_trl_contract as contract
from pathlib import Path
from rlattn import AttentionGRPOTrainer
from rlattn.credit import CREDIT_RULES
from rlattn.types import AttentionOptions
from trl import GRPOTrainer

class Uniform(AttentionGRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, credit=CREDIT_RULES["uniform"]())

policy, folder = sys.argv[1:]
# with groups of 4, the second of every three straddles the ranks
options = {"max_steps": 5, "per_device_train_batch_size": 6}
plain, ours = (contract.trained(c, policy, Path(folder) / c.__name__, **options) for c in (GRPOTrainer, Uniform))
states = plain.model.state_dict(), ours.model.state_dict()
assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
assert ours.state.log_history[0]["credit/mean"] == 1
assert any(log.get("grad_norm", 0) > 0 for log in ours.state.log_history)

class WholeBatch(AttentionGRPOTrainer):
    def __init__(self, *args, **kwargs):
        attention = AttentionOptions(horizon=(2, 8), scope="batch")
        super().__init__(*args, **kwargs, credit=CREDIT_RULES["coupled_rhythm"](), attention=attention)

seen, batch_heads = [], rlattn.grpo.credit_reader.batch_heads
rlattn.grpo.credit_reader.batch_heads = lambda span_BLH, share: (
    seen.append(span_BLH) or batch_heads(span_BLH, share)
)
contract.trained(WholeBatch, policy, Path(folder) / "whole", **{**options, "max_steps": 1})
(span_BLH,) = seen
assert len(span_BLH) == 12, "the heads of a batch are chosen by the rollouts of every rank"
print("equal")
conftest.leave_ranks()
"""


def test_two_ranks_train_as_plain_trl_for_five_steps_and_agree_on_a_batch_s_heads(policy, tmp_path):  # noqa: F811
    (tmp_path / "two.py").write_text(UNIFORM_ON_TWO_RANKS)
    result = torchrun("two.py", str(policy), str(tmp_path), cwd=tmp_path)
    assert result.stdout.count("equal") == 2, result.stderr


class Raises:
    def __call__(self, signals):
        raise RuntimeError("boom")


class Exits:
    def __call__(self, signals):
        raise SystemExit(3)


class Nothing:
    def __call__(self, signals):
        return None


class WrongShape:
    def __call__(self, signals):
        return Credit(weights_BN=signals.waad_BN[:, :3], metrics={})


class OddMetrics:
    def __call__(self, signals):
        return Credit(weights_BN=torch.ones_like(signals.waad_BN), metrics={"loss": signals.waad_BN})


class Enormous:
    def __call__(self, signals):
        return Credit(weights_BN=torch.full_like(signals.waad_BN, 1e38), metrics={})


FAILING = [Raises, Exits, Nothing, WrongShape, OddMetrics]
SIGNALS = Signals(waad_BN=torch.rand(3, 5), fai_BN=torch.rand(3, 5), mask_BN=torch.ones(3, 5, dtype=torch.bool))


@pytest.mark.parametrize("rule", [*FAILING, Enormous])
def test_a_rule_that_has_worked_and_fails_leaves_equal_credit_and_is_counted(rule):
    credit = compute_credit(rule(), SIGNALS, proven=True)
    assert torch.equal(credit.weights_BN, torch.ones(3, 5))
    assert credit.metrics["credit/refused_rows"] == 3


@pytest.mark.parametrize("rule", FAILING)
def test_a_rule_that_fails_at_once_is_the_users_mistake(rule):
    with pytest.raises(UserError, match=f"credit: the rule {rule.__name__} fails on its first step: ") as raised:
        compute_credit(rule(), SIGNALS)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("proven", [False, True])
def test_a_built_in_rule_that_fails_raises_its_own_error(proven):
    with pytest.raises(ValueError, match="the signals have no entropy"):
        compute_credit(CREDIT_RULES["entropy"](), SIGNALS, proven=proven)  # which lack the entropies


class FailsFrom:
    """Equal credit, until the call of that number."""

    def __init__(self, call):
        self.calls_left = call

    def __call__(self, signals):
        self.calls_left -= 1
        if self.calls_left < 1:
            raise RuntimeError("boom")
        return Credit(weights_BN=torch.ones_like(signals.waad_BN), metrics={})


def failing_from(call):
    class Trainer(AttentionGRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, credit=FailsFrom(call))

    return Trainer


def test_a_rule_that_fails_after_its_first_step_leaves_grpo(policy, tmp_path):  # noqa: F811
    ours, plain = trained(failing_from(2), policy, tmp_path / "a"), trained(GRPOTrainer, policy, tmp_path / "b")
    assert [log.get("credit/refused_rows") for log in ours.state.log_history] == [0, 8, 8, None]
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), ours.model.state_dict().values()))


def test_a_rule_that_fails_later_in_its_first_step_ends_the_run(policy, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"credit: .*RuntimeError: boom"):
        trained(failing_from(2), policy, tmp_path, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"credit": CREDIT_RULES["random"]}, "credit"),
        ({"credit": "random"}, "credit"),
        ({"attention": {}}, "attention"),
    ],
)
def test_a_wrong_argument_is_said_before_training(policy, tmp_path, arguments, message):  # noqa: F811
    class Trainer(AttentionGRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, **arguments)

    with pytest.raises(TypeError, match=f"{message}: expected"):
        trained(Trainer, policy, tmp_path)
