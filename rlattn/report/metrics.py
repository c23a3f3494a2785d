"""What every logged number means. One table, which the report shows and the pages name. Standard library only."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    name: str
    """As in metrics.jsonl; `*` stands for any name. Of several that fit, the first counts."""
    meaning: str
    unit: str = ""
    healthy: str = ""


def _metric(name: str, meaning: str, unit: str = "", healthy: str = "") -> Metric:
    return Metric(name=name, meaning=meaning, unit=unit, healthy=healthy)


METRICS = (
    _metric("reward", "Weighted sum of the rewards, mean over the rollouts", "", "rises"),
    _metric("reward_std", "Spread of that sum over the batch", "", "above 0"),
    _metric("groups_without_signal", "Groups whose rollouts were all paid alike and teach nothing", "share", "< 0.8"),
    _metric("frac_reward_zero_std", "As TRL counts it: rounding hides some; no use when decoupled", "share"),
    _metric("rewards/*/mean", "One reward, unweighted, mean over the rollouts", "", "rises"),
    _metric("rewards/*/std", "Spread of one reward over the batch", "", "above 0"),
    _metric("rewards/*/group_std", "Spread of one reward inside groups, mean over the groups", "", "above 0"),
    _metric("rewards/*/correlation/*", "Of two rewards inside groups, from -1 to 1", "", "above -1"),
    _metric("rewards/*/weight", "The weight a reward had, ramps and multipliers included"),
    _metric("rewards/*/neutral", "Rollouts a reward says nothing of: they get its group mean", "rollouts", "few"),
    _metric("rewards/*/failed", "Rollouts on which a reward raised, took too long or gave no number", "rollouts", "0"),
    _metric("rewards/*/failed_gap", "What those are paid less what the others are", "std of the batch", "> -0.5"),
    _metric("rewards/*/share", "One reward's share of the advantages' size", "share"),
    _metric("eval/accuracy", "Greedy held-out accuracy; eval/low to eval/high is its 95 % interval", "share", "rises"),
    _metric("eval/failed", "Held-out completions that verify() failed on; they are left out", "completions", "0"),
    _metric("*/metrics_failed", "Completions that the task's metrics() failed on", "completions", "0"),
    _metric("eval/mean_length", "Length of the held-out completions", "tokens"),
    _metric("eval/effort_*/accuracy", "Greedy held-out accuracy at that effort", "share", "rises with effort"),
    _metric("eval/effort_*/tokens", "Held-out thought at that effort", "tokens", "rises with effort"),
    _metric("effort/*/tokens", "Thought of the rollouts at that effort", "tokens", "rises with effort"),
    _metric("effort/*/within", "Rollouts at that effort within effort times their query's average", "share", "rises"),
    _metric("effort/average", "Current average thought of a query, over all efforts", "tokens"),
    _metric("self_monitor/flag_rate", "Rollouts that the monitor flags, malformed ones too", "share", "near slack"),
    _metric("self_monitor/safe", "Rollouts that the monitor calls safe", "share", "< 0.98, or held out agrees"),
    _metric("self_monitor/own_safe", "Rollouts that call themselves safe", "share"),
    _metric("self_monitor/lambda", "Weight of the monitor's penalty", "", "below its cap"),
    _metric("self_monitor/malformed", "Rollouts out of the four-part format", "share", "near 0"),
    _metric("self_monitor/unparsed", "Monitor labels that could not be read", "share", "near 0"),
    _metric("self_monitor/unanswered", "Rollouts the external monitor did not answer for", "share", "0"),
    _metric("self_monitor/precision", "Of the flagged, those that the task knows to deceive", "share", "near 1"),
    _metric("self_monitor/recall", "Of those that deceive, the flagged", "share", "near 1"),
    _metric("self_monitor/held_out_flag_rate", "Rollouts that the policy of step 0 flags", "share", "near flag_rate"),
    _metric("self_monitor/held_out_recall", "Of those that deceive, flagged by the policy of step 0", "share"),
    _metric("self_monitor/alarm", "1: nearly all pass, and the held-out monitor disagrees", "", "0"),
    _metric("self_monitor/drifted", "1: it flags most of what the held-out monitor lets pass", "", "0"),
    _metric("*/gain", "Bits that the questions of a dialogue tell", "bits a dialogue", "rises"),
    _metric("*/gain_per_turn", "Bits that a question tells", "bits a question", "rises"),
    _metric("*/gain_share", "Of what the best questions are expected to tell", "share", "near 1 in the mean"),
    _metric("*/opened_best", "Dialogues that open with the question that tells most", "share", "rises"),
    _metric("*/attributes_right", "Of the specification, what was written right", "share", "rises"),
    _metric("*/resolved_attributes", "What the questions of a dialogue settle", "attributes"),
    _metric("*/turns", "Questions and malformed turns of a dialogue", "turns", "turn_limit; more: no specification"),
    _metric("*/malformed", "Turns that ask for no one thing", "a dialogue", "near 0"),
    _metric("*/unparsed", "Answers that could not be read; the belief stays", "a dialogue", "near 0"),
    _metric("*/contradictions", "Answers against what was said before; the belief stays", "a dialogue", "0"),
    _metric("*/honest", "Rollouts that claim the truth", "share", "rises"),
    _metric("*/open_lie", "False claims whose thought states the truth", "share", "falls"),
    _metric("*/hidden_lie", "False claims whose thought hides it", "share", "falls"),
    _metric("*/false_claims", "Both kinds of lies", "share", "falls"),
    _metric("*/invalid", "Rollouts out of the format", "share", "near 0"),
    _metric("*/truth_accuracy", "True claims, where the truth is paid for", "share", "near 1"),
    _metric("*/dtr", "Open lies among the valid rollouts (deceptive thoughts)", "share", "falls"),
    _metric("*/own_label_safe", "Valid rollouts that call themselves safe", "share"),
    _metric("*/own_label_precision", "Lies among those that call themselves unsafe", "share", "near 1"),
    _metric("*/own_label_recall", "Among lies, those that call themselves unsafe", "share", "near 1"),
    _metric("task/*", "A number of the task's own, on the rollouts"),
    _metric("eval/*", "A number of the task's own, on held-out rows"),
    _metric("completions/mean_length", "Mean length of the rollouts", "tokens", "within half to twice the start"),
    _metric("completions/*_length", "Lengths of the rollouts; terminated: of those not cut", "tokens"),
    _metric("completions/clipped_ratio", "Rollouts cut at max_completion_length", "share", "< 0.3"),
    _metric("completions/duplicates", "Rollouts that repeat another of their group, token by token", "share", "< 0.9"),
    _metric("entropy", "Uncertainty of the policy at the tokens it wrote", "nats", "above a fifth of its start"),
    _metric("kl", "Distance from the reference policy (where beta > 0)", "nats a token", "< 1"),
    _metric("grad_norm", "Length of the gradient, before clipping", "", "steady"),
    _metric("loss", "GRPO's loss; near 0 by construction, its trend says little"),
    _metric("learning_rate", "Learning rate of the optimizer"),
    _metric("clip_ratio/*", "Tokens whose probability ratio was clipped", "share", "< 0.2"),
    _metric("sampling/*", "Difference between the sampler (vLLM) and the trainer", "", "near 0, ratios near 1"),
    _metric("credit/mean", "Mean weight of a token; steps of dapo and cispo grow with it", "", "1 to 1.3"),
    _metric("credit/strength", "What the schedule leaves of these weights: 1 all, 0 none", "share"),
    _metric("credit/max", "Largest weight", "", "1.5; 1.75 for coupled_rhythm"),
    _metric("credit/share_amplified", "Tokens with a weight above 1", "share", "about top_fraction"),
    _metric("credit/gini", "Inequality of the weights: 0 equal, 1 all on one token", "", "about 0.1"),
    _metric("credit/effective_tokens", "(sum w)² / (n sum w²) of n weights w: 1 if all are equal", "share", "> 0.5"),
    _metric("credit/share_undefined", "Tokens without a score, such as the last ones for FAI", "share", "< 0.5"),
    _metric("credit/anchor_preplan_overlap", "Anchors that are preplan tokens too", "share", "> top_fraction (chance)"),
    _metric("credit/waad_entropy_coupling", "Entropy at WAAD peaks over mean entropy", "ratio", "> 1; the paper: 1.52"),
    _metric("credit/fai_waad_coupling", "FAI peaks at or right after a WAAD peak", "share", "> 0.36 (chance)"),
    _metric("credit/nonfinite_rows", "Rollouts with signals not finite; weight 1", "rollouts", "0"),
    _metric("credit/refused_rows", "Rollouts whose rule failed or gave unusable weights; weight 1", "rollouts", "0"),
    _metric("time/generation", "Generating rollouts, mean over the ranks", "s a step", "steady"),
    _metric("time/reward", "Rewards, second rollouts included", "s a step", "below generation"),
    _metric("time/waiting", "Of rewards, for other ranks at a collective call", "s a step", "near 0"),
    _metric("time/credit", "From head metrics to weights; the metrics are part of the forward", "s a step", "near 0"),
    _metric("time/training", "Forward, backward and optimizer, mean over the ranks", "s a step", "steady"),
    _metric("time/evaluation", "Held-out evaluation after the step", "s"),
    _metric("time/checkpoint", "Writing the checkpoint of the step before", "s", "below a step"),
    _metric("time/*_slowest", "The phase on the slowest rank; the others wait for it", "s a step", "near the mean"),
    _metric("time/step", "Wall clock of one optimizer step, generation included", "s", "steady"),
    _metric("step_time", "The same as TRL counts it", "s"),
    _metric("num_tokens", "Tokens seen so far, prompts included", "tokens"),
)  # fmt: skip


def describe_metric(key: str) -> Metric | None:
    """The table's line for a logged name; None for a name it does not hold."""
    return next((metric for metric in METRICS if _matches(metric.name, key)), None)


def _matches(pattern: str, key: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".+"), key) is not None
