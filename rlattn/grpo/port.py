"""What rlattn's own code uses of TRL's trainer: every private member of TRL that is read, set or called stands here.

The other files of this room are given a `Port`, never a trainer. TRL promises nothing about its private members, so
`tests/test_trl_contract.py` asserts each one that is named here, and the methods that `trainer.py` extends
(`EXTENDED`). Legend: B rollouts of this rank.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.models.utils import disable_gradient_checkpointing

from rlattn.credit.advantages import RewardTable
from rlattn.grpo.multimodal_prompts import IMAGE_INPUTS
from rlattn.processes.phases import Phases

# Private methods of TRL's and transformers' trainers that AttentionGRPOTrainer extends, always through `super()`.
EXTENDED = (
    "_calculate_rewards",  # the gathered reward table: gates, neutral entries, failures
    "_compute_loss",  # reads the advantages after its forward: credit goes in between
    "_generate",  # its mask of the tokens that tools wrote
    "_generate_and_score_completions",  # per-token advantages in place of TRL's
    "_generate_single_turn",  # stop strings
    "_get_output_dir",  # a checkpoint is written beside its place, then moved there
    "_get_per_token_logps_and_entropies",  # the forward that attention is read off
    "_get_train_sampler",  # an order of prompts that resumes exactly
    "_load_optimizer_and_scheduler",  # after it, the rest of a checkpoint is restored
    "_run_epoch",  # a run that was resumed after its last step takes no further one
    "_save_checkpoint",  # whole or not there
    "_tokenize_prompts",  # a rendered prompt begins once
    "_tool_call_loop",  # all ranks generate equally often under ZeRO-3
)


class Port:
    """A `trl.GRPOTrainer` as rlattn's functions see it, and the clock of its phases."""

    def __init__(self, trainer: Any, phases: Phases):
        self._trainer, self.phases = trainer, phases

    # Ranks

    @property
    def rank(self) -> int:
        return int(self._trainer.accelerator.process_index)

    @property
    def ranks(self) -> int:
        return int(self._trainer.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self._trainer.is_world_process_zero())

    @property
    def device(self) -> torch.device:
        return self._trainer.accelerator.device

    @property
    def is_fsdp(self) -> bool:
        return bool(self._trainer.is_fsdp_enabled)

    @property
    def is_fsdp1(self) -> bool:
        return getattr(getattr(self._trainer.accelerator.state, "fsdp_plugin", None), "fsdp_version", 0) == 1

    @property
    def is_deepspeed(self) -> bool:
        return bool(self._trainer.is_deepspeed_enabled)

    def gather(self, values: Tensor) -> Tensor:
        """A tensor of every rank, one after the other. Collective; all have the same shape."""
        return self._trainer.accelerator.gather(values)

    def wait_for_everyone(self) -> None:
        self._trainer.accelerator.wait_for_everyone()

    def end_training(self) -> None:
        """Ends the trackers, and the process group of several ranks."""
        self._trainer.accelerator.end_training()

    # Where the run is

    @property
    def args(self) -> Any:
        """The GRPOConfig."""
        return self._trainer.args

    @property
    def state(self) -> Any:
        """transformers' TrainerState."""
        return self._trainer.state

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return int(self.state.global_step)

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run; at least 1."""
        return max(1, self.state.max_steps)

    @property
    def micro_batches(self) -> int:
        """Micro-batches whose training step is over. TRL counts one after its loss, so inside it is not counted yet."""
        return int(self._trainer._step)

    @property
    def accumulated(self) -> int:
        """Micro-batches of the optimizer step at hand; an epoch's last step may have fewer."""
        return int(self._trainer.current_gradient_accumulation_steps)

    @property
    def rollouts_an_epoch(self) -> int:
        """Rollouts that one pass over the training rows trains on, every iteration counted."""
        return len(self._trainer.train_dataset) * self._trainer.num_generations * self._trainer.num_iterations

    @property
    def window(self) -> int:
        """Micro-batches that are trained on before the next generation."""
        return int(self.args.steps_per_generation * self._trainer.num_iterations)

    # The batch

    @property
    def training(self) -> bool:
        """Whether the model is in training mode: TRL evaluates through the same methods."""
        return bool(self._trainer.model.training)

    @property
    def group_size(self) -> int:
        trainer = self._trainer
        return int(trainer.num_generations if self.training else trainer.num_generations_eval)

    @property
    def reward_funcs(self) -> list[Any]:
        """The functions that TRL calls, in the order of the reward table's columns."""
        return self._trainer.reward_funcs

    @property
    def reward_names(self) -> list[str]:
        """The names that TRL logs them under; two may share one."""
        return self._trainer.reward_func_names

    @property
    def reward_weights_K(self) -> Tensor:
        return self._trainer.reward_weights

    @property
    def sequence_ratio(self) -> bool:
        """Whether the loss has one importance ratio a rollout."""
        return self._trainer.importance_sampling_level == "sequence"

    @property
    def rereads_rollouts(self) -> bool:
        """TRL's condition for its old-log-prob pass over fresh rollouts: the policy moves before they are used up."""
        trainer = self._trainer
        corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        return bool(corrected or self.args.gradient_accumulation_steps % self.window != 0)

    # Text

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._trainer._tokenizer

    @property
    def end_ids(self) -> set[int]:
        """The ids that end a completion, as TRL cuts it."""
        return set(self._trainer.eos_token_ids)

    @property
    def processor(self) -> Any:
        """The policy's processor, or its tokenizer where it reads text only."""
        return self._trainer.processing_class

    @property
    def template_kwargs(self) -> dict[str, Any]:
        return self._trainer.chat_template_kwargs

    # Logs

    def log(self, name: str, value: float) -> None:
        """A number of this batch, averaged into the step's log line; the same on every rank."""
        self._logged[name].append(value)

    def log_to_step(self, name: str, value: float) -> None:
        """A number of the optimizer step that is ending."""
        self._trainer._metrics["train"][name].append(value)

    def log_instead(self, name: str, value: float, place: int = -1) -> None:
        """In place of what TRL has logged of this batch under a name, which several rewards may share."""
        self._logged[name][place] = value

    def log_line(self, numbers: dict[str, float]) -> None:
        """A log line of its own, at once."""
        self._trainer.log(numbers)

    @property
    def _logged(self) -> dict[str, list[float]]:
        return self._trainer._metrics["train" if self.training else "eval"]

    # Policy and generation

    @property
    def policy(self) -> Any:
        """The model without what DDP, DeepSpeed or FSDP put around it."""
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    @property
    def wrapped_policy(self) -> nn.Module:
        """The model with what DDP, DeepSpeed or FSDP put around it, once training has begun."""
        return self._trainer.model_wrapped

    @property
    def generating_policy(self) -> nn.Module:
        """The module whose `generate` TRL calls."""
        return self._trainer.accelerator.unwrap_model(self._trainer.model_wrapped)

    @property
    def max_completion_length(self) -> int:
        return int(self._trainer.max_completion_length)

    @property
    def temperature(self) -> float:
        return float(self._trainer.temperature)

    @property
    def vllm(self) -> Any:
        """TRL's VLLMGeneration; None where transformers generates."""
        return self._trainer.vllm_generation if self._trainer.use_vllm else None

    @property
    def vllm_weights(self) -> Callable[[], Iterator[tuple[str, Any]]]:
        """The method by which TRL names and reads the weights that it sends to vLLM."""
        return self.vllm._iter_named_params

    def read_vllm_weights_by(self, read: Callable[[], Iterator[tuple[str, Any]]]) -> None:
        self.vllm._iter_named_params = read

    def generate_turn(
        self, prompt_ids: list[list[int]], images: Any = None, fields: dict[str, Any] | None = None
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """TRL's own generation: one completion a prompt, and its log-probabilities under vLLM. Collective."""
        return self._trainer._generate_single_turn(prompt_ids, images, fields or {}, 1)

    @contextmanager
    def turns_by(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        """Puts something around TRL's generation of one turn, inside the context alone."""
        trainer = self._trainer
        trainer._generate_single_turn = wrap(trainer._generate_single_turn)
        try:
            yield
        finally:
            del trainer._generate_single_turn

    def wrap_generation(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Puts something around TRL's generation of a whole batch, such as a clock."""
        self._trainer._generate = wrap(self._trainer._generate)

    def generate_with_tools(
        self, prompts: Sequence[Any], rows: Sequence[Any]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """TRL's own tool loop over prompts, one environment a row: completion ids, and 1 for what the policy wrote.

        What TRL sets up for a training batch is set up here, and what it logs of one is thrown away. Collective.
        """
        trainer = self._trainer
        kept = trainer.environments, trainer._metrics["eval"]
        trainer._metrics["eval"] = defaultdict(list)
        trainer.environments = [trainer.environment_factories[None]() for _ in prompts]
        trainer._batch_environments = [None] * len(prompts)
        trainer._sync_tool_dicts = [{"ask": environment.ask} for environment in trainer.environments]
        trainer._async_tool_dicts = [{} for _ in prompts]
        for environment, row in zip(trainer.environments, rows, strict=True):
            environment.reset(row)
        try:
            _, completion_ids, mask, *_ = trainer._generate(list(prompts))
        finally:
            trainer.environments, trainer._metrics["eval"] = kept
        return completion_ids, mask

    def reread(self, out: dict[str, Any]) -> None:
        """TRL's forward over a generation batch that was just made, without gradients."""
        images = {key: out[key] for key in IMAGE_INPUTS if key in out}
        with torch.no_grad(), self.without_checkpointing():
            self.score(out, batch_size=self.args.per_device_train_batch_size, **images)

    def score(self, out: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor | None]:
        """TRL's forward over prompts and completions: log-probabilities and, where asked for, entropies (B, T)."""
        logps_BT, entropy_BT, *_ = self._trainer._get_per_token_logps_and_entropies(
            self._trainer.model,
            torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1),
            torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1),
            out["completion_ids"].shape[1],
            **options,
        )
        return logps_BT, entropy_BT

    def without_checkpointing(self) -> Any:
        """A context in which no layer is computed again in the backward pass."""
        return disable_gradient_checkpointing(self._trainer.model, self.args.gradient_checkpointing_kwargs)

    def generation_inputs(self) -> Iterator[list[dict[str, Any]]]:
        """What one generation batch after the other is made of, in training's order; this rank's share."""
        for number, inputs in enumerate(self._trainer.get_train_dataloader()):
            if number % self.window == 0:  # TRL hands out a batch again for every micro-batch of it
                yield inputs

    def roll_out(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A generation batch as training makes it: completions, rewarded, with their advantages. Collective."""
        return self._trainer._generate_and_score_completions(inputs)

    @property
    def reward_table(self) -> RewardTable:
        """The rewards of the latest rollouts, of all ranks."""
        return self._trainer._table

    def send_weights_again(self) -> None:
        """Makes TRL send the weights to vLLM before it generates next."""
        self._trainer._last_loaded_step = -1

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Evaluation mode and a random stream of its own: training goes on as if nothing had been generated."""
        model = self._trainer.model
        training = model.training
        model.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            model.train(training)

    @contextmanager
    def settings(self, *, temperature: float, max_new_tokens: int | None = None) -> Iterator[None]:
        """Temperature (0 for greedy) and length of what is generated inside the context."""
        trainer, engine = self._trainer, self.vllm
        if engine is not None:
            kept = engine.temperature, engine.max_completion_length
            engine.temperature, engine.max_completion_length = temperature, max_new_tokens or kept[1]
            try:
                yield
            finally:
                engine.temperature, engine.max_completion_length = kept
            return
        sampling, sampling_kwargs = trainer.generation_config, trainer.generation_kwargs
        changed: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or 1.0}
        if not temperature:
            changed |= {"top_p": 1.0, "top_k": 50, "min_p": None}
        if max_new_tokens:
            changed["max_new_tokens"] = max_new_tokens
        config = copy.deepcopy(sampling)
        config.update(**changed)
        trainer.generation_config, trainer.generation_kwargs = config, {**sampling_kwargs, **changed}
        try:
            yield
        finally:
            trainer.generation_config, trainer.generation_kwargs = sampling, sampling_kwargs

    # Checkpoints

    def save_model(self, folder: Path) -> None:
        """Whole weights or the adapter, as `from_pretrained` reads them. Collective."""
        self._trainer.save_model(str(folder))

    def place(self) -> dict[str, Any]:
        """Where this rank is between two optimizer steps, as far as transformers' own checkpoint leaves it out."""
        trainer = self._trainer
        return {
            "step": trainer._step,
            "rollouts": trainer._buffered_inputs if self.micro_batches % self.window else None,
            "metrics": {name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()},
            "loss": trainer._tr_loss,
            "last_logged": trainer._globalstep_last_logged,
        }

    def restore_place(self, place: dict[str, Any]) -> None:
        """All of `place` but the loss, which transformers sets to 0 after this (see `restore_loss`)."""
        trainer = self._trainer
        trainer._step, trainer._buffered_inputs = place["step"], place["rollouts"]
        for name, values in place["metrics"].items():
            trainer._metrics["train"][name].extend(values)

    def restore_loss(self, place: dict[str, Any]) -> None:
        """The loss between two log lines, once transformers has begun to train."""
        self._trainer._tr_loss, self._trainer._globalstep_last_logged = place["loss"], place["last_logged"]

    def count_micro_batches(self, done: int) -> None:
        """Tells TRL how many micro-batches of the run are over."""
        self._trainer._step = done
