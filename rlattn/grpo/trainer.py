"""The only TRL subclass: it carries tensors between TRL's training step and rlattn's rooms."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from rlattn.credit import check_credit
from rlattn.credit.advantages import RewardTable
from rlattn.grpo.credit_log import CreditLog
from rlattn.grpo.credit_reader import CreditReader
from rlattn.grpo.dialogues import trl_arguments
from rlattn.grpo.port import Port
from rlattn.grpo.resume import EpochOrder, ExactResume
from rlattn.grpo.reward_hooks import NO_OPTIONS, RewardHooks, RewardOptions, guard
from rlattn.grpo.second_rollouts import seed_requests
from rlattn.grpo.stop_strings import stopping_at
from rlattn.grpo.token_log import TokenLog
from rlattn.grpo.weight_sync import keep_base
from rlattn.policy.prompts import render_ids
from rlattn.processes.phases import Phases, PhaseTimes
from rlattn.tasks.guarded_metrics import safe_metrics
from rlattn.types import AttentionOptions, CreditOptions, CreditRule, DialogueTask, Row

COMBINE = {"sum": "sum_then_normalize", "decoupled": "normalize_then_sum"}  # our names, TRL's
OUR_NAMES = {trl: ours for ours, trl in COMBINE.items()}


class AttentionGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with attention-aware credit; a drop-in, all of GRPOTrainer's arguments as they are.

    The weights of a rollout are those of the policy that wrote it, read where the policy's forward runs anyway
    (`rlattn/grpo/credit_reader.py`). A reward of `None` is neutral: it takes the mean of that reward over the rest of
    its group, where TRL counts it as 0 whenever another reward speaks. Without `None` and without credit, training is
    TRL's bit for bit.

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
    reader: CreditReader | None = None
    token_log: TokenLog | None = None
    at_epoch: Callable[[Any, int], dict[str, Any]] | None = None
    stop_strings: tuple[str, ...] = ()
    rows_in_hand: Sequence[Row] = ()  # of the batch that is being generated
    latest_completion: Sequence[int] = ()
    _table: RewardTable  # of that batch
    _own_masks: Any = None  # of that batch: 1 for what the policy wrote, a list a rollout; None where it wrote all
    _generations = 0  # of the tool loop that is being run

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
        self.port = Port(self, phases or Phases())
        if self.use_vllm:
            seed_requests(self.port)
            keep_base(self.port)
        self.reward_funcs = [guard(*named) for named in zip(self.reward_funcs, self.reward_func_names, strict=True)]
        check_credit(credit, attention, credit_options, self.importance_sampling_level)
        self.token_log, self.at_epoch, self.stop_strings = token_log, at_epoch, tuple(stop_strings)
        self.rewards = RewardHooks(self.port, reward_options, safe_metrics(measure) if measure else None)
        self.rewards.bind(self)
        credit_log = CreditLog(self.port.log)
        if credit is not None:
            how = attention or AttentionOptions(), credit_options or CreditOptions()
            self.reader = CreditReader(self.port, credit, *how, credit_log, token_log)
        self.exact_resume = ExactResume(self.port, self.rewards, self.reader, token_log, keep_best)
        times = PhaseTimes(self.port.phases, self.port.log)
        for callback in (token_log, times, credit_log, self.exact_resume):
            if callback:
                self.add_callback(callback)

    @cached_property
    def port(self) -> Port:
        return Port(self, Phases())

    @cached_property
    def rewards(self) -> RewardHooks:
        return RewardHooks(self.port)

    @cached_property
    def exact_resume(self) -> ExactResume:
        return ExactResume(self.port, self.rewards, self.reader, self.token_log, keep_best=False)

    # Rollouts and rewards

    def _generate(self, prompts: list) -> Any:
        with self.port.phases.phase("generation"):
            generated = super()._generate(prompts)
        self._own_masks = generated[2]
        return generated

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        ids, masks = completion_ids_list, self._own_masks
        with self.port.phases.phase("reward"):
            inputs = self.rewards.with_rollouts(inputs, prompts, ids, masks)
            raw_BK = super()._calculate_rewards(inputs, prompts, completions, ids)
            self.latest_completion = ids[0]
            self._table = self.rewards.table(raw_BK, inputs, ids, masks)
        # TRL normalises what this returns for its logs, we for the loss: both must see the same table and weights.
        self.reward_weights = self._table.weights_K
        return self._table.used_BK

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self.at_epoch and self.port.training:
            epoch = int(self.state.epoch or 0)  # in a checkpoint, so it survives a resume
            inputs = [self.at_epoch(example, epoch) for example in inputs]
        self.rows_in_hand = [example.get("row") for example in inputs]
        reader = self.reader if self.port.training else None
        weights: list[Tensor] = []
        if reader and self.port.rereads_rollouts:
            with reader.reading(weights.append, lambda: self._own_masks):
                out = super()._generate_and_score_completions(inputs)
        else:
            out = super()._generate_and_score_completions(inputs)
        if reader and bool(weights) != ("old_per_token_logps" in out):
            raise RuntimeError("this TRL runs the policy over fresh rollouts when rlattn does not expect it")
        if reader and not weights and reader.needs_whole_batch:
            with reader.reading(weights.append, lambda: self._own_masks):
                self.port.reread(out)
        how: Any = {"combine": OUR_NAMES[self.multi_objective_aggregation], "scale": self.scale_rewards}
        advantage_BT = self.rewards.advantages(self._table, out["completion_mask"], self._own_masks, **how)
        if self.token_log and self.port.training:
            out = {**out, **self.token_log.carried(self.port, self._table, advantage_BT, bool(weights))}
        if not (reader and weights):  # the weights come with the training forward, or not at all
            return {**out, "advantages": advantage_BT}
        shaped_BT = reader.shape(advantage_BT, weights[0])
        return {**out, "advantages": shaped_BT, "credited": torch.ones_like(advantage_BT[:, 0])}

    # The training forward and credit

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self.port.phases.phase("training"):
            loss = self._credited_loss(model, inputs)
        if self.token_log and self.port.training:
            self.token_log.see(self.port, inputs)
        return loss

    def _credited_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        reader = self.reader
        if reader is None or not self.port.training or "credited" in inputs:
            return super()._compute_loss(model, inputs)
        inputs = dict(inputs)  # TRL hands out its buffer: written into, credit would compound over iterations

        def shape(weights_BT: Tensor) -> None:
            # The loss reads its advantages after this forward.
            inputs["advantages"] = reader.shape(inputs["advantages"], weights_BT)

        with reader.reading(shape, lambda: inputs.get("tool_mask")):
            return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        forward = super()._get_per_token_logps_and_entropies
        run = partial(forward, model, input_ids, attention_mask, logits_to_keep, *args)
        if self.reader:
            policy = self.accelerator.unwrap_model(model)
            result = self.reader.forward(run, policy, attention_mask, logits_to_keep, **kwargs)
        else:
            result = run(**kwargs)
        if self.token_log and result[1] is not None:
            self.token_log.forward = result[0].detach(), result[1].detach()
        return result

    # Generation

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._generations = 0
        result = super()._tool_call_loop(*args, **kwargs)
        if is_deepspeed_zero3_enabled():  # its ranks share every forward pass, so all must generate equally often
            with self.port.settings(temperature=1.0, max_new_tokens=1):
                while self._generations < self.max_tool_calling_iterations:
                    self.port.generate_turn([[self.port.tokenizer.eos_token_id]])
        return result

    def _tokenize_prompts(self, prompts: list) -> Any:
        if isinstance(prompts[0], str):  # TRL would begin a rendered text a second time
            return [render_ids(self.port.tokenizer, prompt, {}) for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self._generations += 1
        if not self.stop_strings or self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        with stopping_at(self.port, self.stop_strings) as stopped:
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        return stopped[-1].cut(completion_ids), logprobs

    # Checkpoints

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochOrder:
        return self.exact_resume.order_of(super()._get_train_sampler(*args, **kwargs))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed after the last step: transformers would add one
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save = partial(super()._save_checkpoint, model, trial)
        with self.port.phases.phase("checkpoint"):
            self.exact_resume.save(save)

    def _get_output_dir(self, trial: Any) -> str:
        return self.exact_resume.folder(super()._get_output_dir(trial))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            self.exact_resume.load(Path(checkpoint))
