"""Glue: the only TRL subclass. It carries tensors between TRL and the pure modules; no arithmetic of its own."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from rlattn.attention.capture import Capture, batch_heads, capture
from rlattn.credit import CreditRule, apply_credit, check_credit, compute_credit, schedule, scheduled_weights
from rlattn.credit.advantages import (
    apply_gates,
    contributions,
    fill_neutral,
    group_advantages,
    silent_groups,
    table_metrics,
)
from rlattn.grpo.credit_log import CreditMetrics
from rlattn.grpo.dialogues import trl_arguments
from rlattn.grpo.lagged_policy import LaggedPolicy
from rlattn.grpo.resume import EpochOrder, RestorePlace, load_place, save_durably
from rlattn.grpo.reward_function import POLICY_MASK
from rlattn.grpo.reward_hooks import (
    NO_OPTIONS,
    RewardOptions,
    bind_rewards,
    guard,
    log_counts,
    log_raw_means,
    repeated_share,
    task_numbers,
    token_advantages,
    weights_now,
)
from rlattn.grpo.second_rollouts import seed_requests, settings
from rlattn.grpo.token_log import TokenLog
from rlattn.policy.generate import stop_at
from rlattn.processes.phases import Phases, PhaseTimes
from rlattn.run_folder.checkpoints import PARTIAL
from rlattn.tasks.guarded_metrics import SafeMetrics
from rlattn.types import AttentionOptions, CreditOptions, DialogueTask, Row

COMBINE = {"sum": "sum_then_normalize", "decoupled": "normalize_then_sum"}  # our names, TRL's
IMAGE_INPUTS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class AttentionGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with attention-aware credit; a drop-in, all of GRPOTrainer's arguments as they are.

    The weights of a rollout are those of the policy that wrote it. They are read where the policy's forward runs
    anyway: in TRL's old-log-prob pass where there is one (the policy moves before the rollout is used up), else in the
    training forward itself. Only head sets of a wider scope than the rollout can cost a forward of their own.

    A reward of `None` is neutral: it takes the mean of that reward over the rest of its group, where TRL counts it as 0
    whenever another reward speaks. Without `None` and without credit, training is TRL's bit for bit.

    Args:
        credit: a credit rule (`CREDIT_RULES`, or your own); None for GRPO's equal credit.
        attention: what the rule's signals are read from.
        credit_options: sign and schedule of the weights.
        reward_options: gates and ramps of the rewards, and how many failures are borne.
        at_epoch: what an example (`prompt`, `row`, …) is in an epoch of training, such as its effort.
        measure: numbers about a completion and its row, logged as `task/<name>`: a task's own `metrics`.
        keep_best: keep the checkpoint with the best held-out accuracy, besides the last `save_total_limit`.
        token_log: what keeps the tokens of sampled rollouts.
        phases: the clock of the phases, where something else reads it too.
        stop_strings: texts that end a completion, besides the end-of-sequence token (transformers generation).
        dialogue: the task whose rows are held as dialogues; the data set then has the task's `row` beside `prompt`.
    """

    # Also for a trainer that is built without __init__, as TRL's own tests do.
    credit: CreditRule | None = None
    attention = AttentionOptions()
    credit_options = CreditOptions()
    reward_options: RewardOptions = NO_OPTIONS
    measure: SafeMetrics | None = None
    at_epoch: Callable[[Any, int], dict[str, Any]] | None = None
    token_log: TokenLog | None = None
    stop_strings: tuple[str, ...] = ()
    keep_best = False
    phases = Phases()
    rows_in_hand: Sequence[Row] = ()  # of the batch that is being generated
    _lagged: Mapping[int, LaggedPolicy] = MappingProxyType({})
    _base_weights_K: Tensor | None = None
    _tool_masks: Any = None
    _generations = 0  # of the tool loop that is being run
    _heads: tuple[Tensor, Tensor] | None = None  # of scope batch or calibrated
    _order: EpochOrder | None = None  # None: a streamed data set has no sampler
    _saving = False  # into the folder of what is not whole yet
    _reading: Callable[[Tensor], None] | None = None  # takes the weights that the next policy forward gives

    def __init__(
        self,
        *args: Any,
        credit: CreditRule | None = None,
        attention: AttentionOptions | None = None,
        credit_options: CreditOptions | None = None,
        reward_options: RewardOptions = NO_OPTIONS,
        stop_strings: tuple[str, ...] = (),
        keep_best: bool = False,
        measure: Callable[[str, Any], dict[str, float]] | None = None,
        token_log: TokenLog | None = None,
        phases: Phases | None = None,
        at_epoch: Callable[[Any, int], dict[str, Any]] | None = None,
        dialogue: DialogueTask | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **{**kwargs, **trl_arguments(dialogue)})
        if dialogue is not None and self.tools:
            self.max_tool_calling_iterations = dialogue.questions
        if self.use_vllm:
            seed_requests(self)
        self.reward_funcs = [guard(*named) for named in zip(self.reward_funcs, self.reward_func_names, strict=True)]
        check_credit(credit, attention, credit_options, self.importance_sampling_level)
        self.credit = credit
        self.attention = attention or self.attention
        self.credit_options = credit_options or self.credit_options
        self.reward_options = reward_options
        self.measure = SafeMetrics(measure) if measure else None
        self.at_epoch, self.token_log = at_epoch, token_log
        if token_log:
            self.add_callback(token_log)
        self.stop_strings = tuple(stop_strings)
        self._lagged = bind_rewards(self)
        self.keep_best = keep_best
        self.phases = phases or Phases()  # its own: two trainers must not tell each other's times
        self.add_callback(PhaseTimes(self.phases, self.log_value))
        self._credit_metrics = CreditMetrics(self.log_value)
        self.add_callback(self._credit_metrics)
        self._place = RestorePlace(self)
        self.add_callback(self._place)

    def _calculate_rewards(self, *args: Any) -> Tensor:
        with self.phases.phase("reward"):
            return self._reward_table(*args)

    def _reward_table(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        for lagged in self._lagged.values():
            lagged.refresh(self.state.global_step)
        masks = self._tool_masks
        if masks is not None:
            inputs = [
                {**example, POLICY_MASK: [bool(own) for own in mask]}
                for example, mask in zip(inputs, masks, strict=True)
            ]
        rewards_BK = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.log_value("completions/duplicates", repeated_share(self, completion_ids_list))
        self.latest_completion = completion_ids_list[0]
        names, requires = self.reward_func_names, self.reward_options.requires
        gates = {names.index(gated): names.index(required) for gated, required in requires.items()}
        # TRL normalises this table for its logs, we for the loss: both must see the same one.
        self._raw_BK, rewards_BK = rewards_BK, apply_gates(rewards_BK, gates)
        self._neutral_BK = rewards_BK.isnan()
        self._rewards_BK = fill_neutral(rewards_BK, self._group_size)
        if self._base_weights_K is None:
            self._base_weights_K = self.reward_weights
        self.reward_weights = weights_now(self, self._base_weights_K, self.reward_options)
        log_counts(self, self._raw_BK, self._rewards_BK)
        for name, value in task_numbers(self, inputs, completion_ids_list, masks).items():
            self.log_value(f"task/{name}", value)
        return self._rewards_BK

    def log_value(self, name: str, value: float) -> None:
        """A number of this batch, averaged into the step's log line; the same on every rank."""
        self._metrics["train" if self._training else "eval"][name].append(value)

    def _generate(self, prompts: list) -> Any:
        with self.phases.phase("generation"):
            generated = super()._generate(prompts)
        self._tool_masks = generated[2]
        return generated

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self.at_epoch and self._training:
            epoch = int(self.state.epoch or 0)  # in a checkpoint, so it survives a resume
            inputs = [self.at_epoch(example, epoch) for example in inputs]
        weights: list[Tensor] = []
        crediting = self.credit is not None and self._training
        self.rows_in_hand = [example.get("row") for example in inputs]
        if crediting and self._policy_rereads():
            self._reading = weights.append
        try:
            out = super()._generate_and_score_completions(inputs)
            if crediting and bool(weights) != ("old_per_token_logps" in out):
                raise RuntimeError("this TRL runs the policy over fresh rollouts when rlattn does not expect it")
            if crediting and not weights and self._needs_whole_batch():
                self._reading = weights.append
                self._read_rollouts(out)
        finally:
            self._reading = None
        advantage_BT = self._advantages(out)
        if self.token_log and self._training:
            out = {**out, **self.token_log.carried(self, advantage_BT, bool(weights))}
        if not weights:  # they come with the training forward, or not at all
            return {**out, "advantages": advantage_BT}
        shaped_BT = apply_credit(advantage_BT, weights[0], self.credit_options.sign)
        return {**out, "advantages": shaped_BT, "credited": torch.ones_like(advantage_BT[:, 0])}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self.phases.phase("training"):
            loss = self._credited_loss(model, inputs)
        if self.token_log and self._training:
            self.token_log.see(self, inputs)
        return loss

    def _credited_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.credit is None or not self._training or "credited" in inputs:
            return super()._compute_loss(model, inputs)
        inputs = dict(inputs)  # TRL hands out its buffer: written into, credit would compound over iterations

        def shape(weights_BT: Tensor) -> None:
            # The loss reads its advantages after this forward.
            inputs["advantages"] = apply_credit(inputs["advantages"], weights_BT, self.credit_options.sign)

        self._reading, self._tool_masks = shape, inputs.get("tool_mask")
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._reading = None

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        read, self._reading = self._reading, None  # a pass of the reference policy, which may follow, is not read
        forward = super()._get_per_token_logps_and_entropies
        if read is None:
            result = forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            self._show_forward(result)
            return result
        response_BN = attention_mask.clone()
        response_BN[:, :-logits_to_keep] = 0
        response_BN[:, -logits_to_keep:] *= self._tool_mask_like(response_BN[:, -logits_to_keep:])
        if getattr(self.credit, "needs_entropy", False):
            kwargs["compute_entropy"] = True
        policy = self.accelerator.unwrap_model(model)
        with capture(policy, attention_mask, response_BN, options=self.attention) as captured:
            result = forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        with self.phases.phase("credit"):
            read(self._weights(captured, result[1], logits_to_keep))
        self._show_forward(result)
        return result

    def _show_forward(self, result: Any) -> None:
        if self.token_log and result[1] is not None:
            self.token_log.forward = result[0].detach(), result[1].detach()

    def _weights(self, captured: Capture, entropy_BT: Tensor | None, completion_length: int) -> Tensor:
        """weights_BT of the captured rollouts; what the rule did goes to the metrics."""
        assert self.credit is not None
        mask_BN = captured.response_mask_BN
        entropy_BN = None
        if entropy_BT is not None:
            entropy_BN = torch.full(mask_BN.shape, torch.nan, device=mask_BN.device)
            entropy_BN[:, -completion_length:] = entropy_BT.detach().float()
            entropy_BN = entropy_BN.masked_fill(~mask_BN, torch.nan)
        if self._needs_whole_batch():
            self._heads = batch_heads(self.accelerator.gather(captured.metrics()[0]), self.attention.share)
        signals = captured.signals(share=self.attention.share, heads=self._heads, entropy_BN=entropy_BN)
        draw = self._step * self.accelerator.num_processes + self.accelerator.process_index
        credit = compute_credit(self.credit, signals, step=draw, proven=self._credit_metrics.proven)
        options = self.credit_options
        strength = schedule(self.state.global_step, max(1, self.state.max_steps), options.warmup, options.decay)
        self._credit_metrics.add(credit, strength)
        weights_BT = scheduled_weights(credit.weights_BN[:, -completion_length:], strength)
        if self.token_log:
            self.token_log.read_signals(signals, weights_BT)
        return weights_BT

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochOrder:
        self._order = EpochOrder(super()._get_train_sampler(*args, **kwargs), self.args.seed)
        return self._order

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed after the last step: transformers would add one
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save = super()._save_checkpoint
        with self.phases.phase("checkpoint"):
            save_durably(self, lambda: save(model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            load_place(self, Path(checkpoint))

    def _policy_rereads(self) -> bool:
        """TRL's own condition for its old-log-prob pass; without that pass, the reference policy's may come first."""
        arguments: Any = self.args
        window = arguments.steps_per_generation * self.num_iterations
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        return corrected or arguments.gradient_accumulation_steps % window != 0

    def _needs_whole_batch(self) -> bool:
        return self.attention.scope == "batch" or (self.attention.scope == "calibrated" and self._heads is None)

    def _read_rollouts(self, out: dict[str, Any]) -> None:
        """A forward of its own, for head sets that the whole batch must agree on before any of it is trained on."""
        images = {key: out[key] for key in IMAGE_INPUTS if key in out}
        kwargs: Any = self.args.gradient_checkpointing_kwargs
        policy: Any = self.model
        with torch.no_grad(), disable_gradient_checkpointing(policy, kwargs):
            self._get_per_token_logps_and_entropies(
                policy,
                torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1),
                torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1),
                out["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
                **images,
            )

    def _advantages(self, out: dict[str, Any]) -> Tensor:
        """advantage_BT of this rank's rollouts; (B, 1) where TRL's loss has one ratio a rollout: (B, T) would round."""
        combine = "sum" if self.multi_objective_aggregation == COMBINE["sum"] else "decoupled"
        table = self._rewards_BK, self.reward_weights, self._group_size
        how: Any = {"combine": combine, "scale": self.scale_rewards}
        advantage_B, contribution_BK = group_advantages(*table, **how), contributions(*table, **how)
        local, length = out["completion_ids"].shape
        start = self.accelerator.process_index * local
        rows = slice(start, start + local)
        ones = advantage_B.new_ones(local, 1 if self.importance_sampling_level == "sequence" else length)
        mask_BT = out["completion_mask"] * self._tool_mask_like(out["completion_mask"])
        advantage_BT, parts_BK = token_advantages(
            self, apply_credit(advantage_B[rows], ones), contribution_BK, rows, mask_BT
        )
        size_BK = contribution_BK.abs() + parts_BK
        found = table_metrics(self._rewards_BK, size_BK, self._group_size, self.reward_func_names)
        found["groups_without_signal"] = silent_groups(*table, parts_BK)
        for name, value in found.items():
            self.log_value(name, value)
        log_raw_means(self, self._raw_BK)
        return advantage_BT

    def _tool_mask_like(self, mask_BT: Tensor) -> Tensor:
        """1 for the policy's own tokens, 0 for those of tools and environments."""
        masks = self._tool_masks
        if masks is None or isinstance(masks, Tensor):
            return torch.ones_like(mask_BT) if masks is None else masks.to(mask_BT.dtype)
        padded_BT = torch.zeros_like(mask_BT)
        for row, mask in enumerate(masks):
            padded_BT[row, : len(mask)] = torch.tensor(mask, dtype=mask_BT.dtype, device=mask_BT.device)
        return padded_BT

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._generations = 0
        result = super()._tool_call_loop(*args, **kwargs)
        if is_deepspeed_zero3_enabled():  # its ranks share every forward pass, so all must generate equally often
            with settings(self, temperature=1.0, max_new_tokens=1):
                while self._generations < self.max_tool_calling_iterations:
                    self._generate_single_turn([[self._tokenizer.eos_token_id]], None, {}, 1)
        return result

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self._generations += 1
        if not self.stop_strings or self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        with self._stopping():
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        return [self._without_padding(ids) for ids in completion_ids], logprobs

    @property
    def _training(self) -> bool:
        assert self.model is not None
        return self.model.training

    @property
    def _group_size(self) -> int:
        size = self.num_generations if self._training else self.num_generations_eval
        assert size is not None
        return size

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Adds a stopping criterion to the policy's generate, which TRL calls without one."""
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        generate: Callable = policy.generate

        def generate_until(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            stopped = stop_at(self._tokenizer, self.stop_strings, input_ids.shape[1])
            return generate(*args, input_ids=input_ids, stopping_criteria=StoppingCriteriaList([stopped]), **kwargs)

        policy.generate = generate_until
        try:
            yield
        finally:
            del policy.generate

    def _without_padding(self, ids: list[int]) -> list[int]:
        """TRL cuts a completion after its end token; one that a stop string ended has padding there instead."""
        pad = self._tokenizer.pad_token_id
        end = len(ids)
        while end > 1 and ids[end - 1] == pad and pad not in self.eos_token_ids:
            end -= 1
        return ids[:end]
