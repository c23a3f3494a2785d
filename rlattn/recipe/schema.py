"""A recipe as a frozen, typed object: its sections, their keys, defaults and bounds. Imports neither torch nor TRL."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rlattn.errors import UserError, did_you_mean
from rlattn.files import expanded, is_there
from rlattn.formats.effort import check_efforts
from rlattn.formats.yaml import dump_yaml
from rlattn.recipe import grpo_fields
from rlattn.recipe.trainer_keys import OWNED_ELSEWHERE, REFUSED
from rlattn.types import LARGEST_WEIGHT, AttentionOptions, CreditOptions, WarmStart

TINY_POLICY = "tiny-reasoner"
TINY_CONTEXT = 2048  # tokens, prompt and completion together
TINY_LAYERS = 3

Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Lora(Strict):
    """Low-rank adapters through PEFT (arXiv 2106.09685)."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapter; 16 is enough for RL, which changes weights little."""
    alpha: int = Field(default=32, gt=0)
    """The adapter's output is scaled by alpha / r; twice the rank, as is usual."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability; 0, since RL passes over its data once."""
    target_modules: Text | tuple[Text, ...] = "all-linear"
    """Modules that get an adapter: all linear layers but the output, or a list of names."""

    @field_validator("target_modules")
    @classmethod
    def _a_list_of_names(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets or (isinstance(targets, str) and targets != "all-linear"):
            raise ValueError(f"expected all-linear or a list such as [q_proj, v_proj], got {targets!r}")
        return targets


class Policy(Strict):
    """The model to train: `tiny-reasoner`, a local folder or a hub id."""

    path: Text
    """`tiny-reasoner`, a local folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the newest unless given."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in training; float32, since steps of 1e-6 vanish in bfloat16 weights."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """transformers' attention function; sdpa needs no further package."""
    lora: Lora | None = None
    """Train an adapter; all weights unless given."""
    prompt_style: Literal["chat", "plain"] = "chat"
    """Apply the chat template, as instruct models expect, or take prompts as they are (base models)."""
    system_prompt: str | None = None
    """A system message before every chat prompt; none unless given, since many templates have their own."""
    stop_strings: tuple[Text, ...] = ()
    """Texts that end a completion, besides its end token; none, where the policy writes that token."""
    warm_start: WarmStart | None = None
    """Supervised training of `tiny-reasoner` on worked traces before RL; it knows nothing without."""
    supervised_control: bool = False
    """After RL, spend the same compute on more of the warm start's training, to compare; it doubles the time."""

    @model_validator(mode="after")
    def _tiny_only(self) -> Self:
        if self.path != TINY_POLICY and (self.warm_start or self.supervised_control):
            raise ValueError(
                f"warm_start and supervised_control are for the built-in policy `path: {TINY_POLICY}` only; "
                "add policy.warm_start=null policy.supervised_control=false"
            )
        if self.system_prompt and self.prompt_style == "plain":
            raise ValueError("a system_prompt needs `prompt_style: chat`: plain prompts have no roles")
        return self


class Plugin(BaseModel):
    """A task, a reward or a rule: a built-in `kind`, or `python: module:Class`; the other keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    kind: str | None = None
    """A built-in one; this or `python`."""
    python: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """One of your own: `module:Class`; this or `kind`."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.kind and self.python:
            raise ValueError("give `kind` or `python`, not both (an override of one sets the other to null)")
        return self


class TaskSpec(Plugin):
    efforts: tuple[float, ...] | None = None
    """Shares of the usual thought that a prompt may ask for, as a line before it; no such line unless given."""
    rl_rows: int | None = Field(default=None, ge=1)
    """RL trains on the first so many training rows, all unless given; a warm start reads all of them."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """Where a prompt leaves no room for a completion: refuse the run, so that it is noticed, or drop the row."""

    @field_validator("efforts")
    @classmethod
    def _sound_efforts(cls, efforts: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if efforts is not None:
            check_efforts(efforts)
        return efforts


class RewardSpec(Plugin):
    weight: float = Field(default=1.0, ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT, allow_inf_nan=False, strict=True)
    """What the reward is multiplied by; below 0 it is a penalty."""
    requires: Text | None = None
    """Another reward: this one counts only where that one is at least 1; everywhere unless given."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the run in which the weight rises from 0; 0 for the whole weight from the first step."""
    decay: float = Field(default=0.0, ge=0, le=1)
    """Share of the run, at its end, in which the weight falls to 0; 0 for none."""
    timeout: float | None = Field(default=None, gt=0, le=86_400)
    """Seconds for one score, in a process of its own; no limit unless given."""

    @model_validator(mode="after")
    def _ramps_fit(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"expected warmup + decay of at most 1, got {self.warmup} and {self.decay}")
        return self


class Rewards(BaseModel):
    """Named rewards and how they combine: `sum` (GRPO) or `decoupled` (GDPO, arXiv 2601.05242)."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, RewardSpec] = Field(init=False)
    combine: Literal["sum", "decoupled"] = "sum"
    """Add weighted rewards, then normalise in the group, as GRPO does; or normalise each first (GDPO)."""
    max_failed_share: float = Field(default=0.05, ge=0, le=1)
    """Share of a batch that may fail under one reward; more ends the run, since failures bias what is learned."""

    @property
    def named(self) -> dict[str, RewardSpec]:
        return dict(self.__pydantic_extra__)

    @model_validator(mode="before")
    @classmethod
    def _bare_names(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name, spec in data.items():
                if name not in cls.model_fields and not isinstance(spec, Mapping | RewardSpec | None):
                    hint = did_you_mean(name, cls.model_fields)
                    raise UserError(f"rewards.{name}", f"expected a section of keys, got {spec!r}.", hint)
            return {k: {} if v is None and k not in cls.model_fields else v for k, v in data.items()}
        return data

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if not self.named:
            raise ValueError("expected at least one reward, such as `accuracy: {weight: 1}`")
        for name in self.named:
            if not re.fullmatch(r"[A-Za-z]\w*", name):
                raise ValueError(f"'{name}': a reward's name is letters, digits and _ (it names its metrics)")
        for name, spec in self.named.items():
            if spec.requires == name or (spec.requires and spec.requires not in self.named):
                others = [other for other in self.named if other != name]
                raise UserError(
                    f"rewards.{name}.requires",
                    f"no other reward '{spec.requires}'.",
                    did_you_mean(spec.requires, others),
                )
        for name, spec in self.named.items():
            if spec.requires and self.named[spec.requires].requires:
                problem = f"'{spec.requires}' requires another reward itself."
                raise UserError(f"rewards.{name}.requires", problem, f"Name '{self.named[spec.requires].requires}'.")
        return self


class CreditSpec(Plugin):
    """A credit rule, and how its weights meet the advantage; every other key is one of the rule's options."""

    sign: Literal["both", "positive", "negative"] = "both"
    """Where the weights count: everywhere, as the paper finds best, or at one sign of the advantage."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the run in which the weights rise from 1; 0 for none, as in the paper."""
    decay: float = Field(default=0.0, ge=0, le=1)
    """Share of the run, at its end, in which they fall back to 1; 0 for none, as in the paper."""

    @property
    def applied(self) -> CreditOptions:
        return CreditOptions(sign=self.sign, warmup=self.warmup, decay=self.decay)

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        _ = self.applied
        return self


class Tracking(Strict):
    """Where a run is followed, besides its folder."""

    report_to: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """Trackers; none unless named, so that nothing leaves the machine by default."""
    project: Text = "rlattn"
    """The project in the tracker; one for all runs, so that they can be compared."""
    tags: tuple[Text, ...] = ()
    """Tags in the tracker; none unless given."""
    samples: int = Field(default=3, ge=0)
    """Held-out completions kept of every evaluation; three can be read at a glance."""
    token_rollouts: int = Field(default=8, ge=0)
    """Rollouts of a step whose tokens are kept in tokens/; 0 for none. Eight fit one screen of the report."""
    token_every: int = Field(default=10, ge=1)
    """Steps between two such steps; the first and the last are among them."""


class Resume(Strict):
    """What happens when the same command runs again."""

    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept; two, in case the newest is damaged."""
    keep_best: bool = False
    """Also keep the checkpoint with the best held-out accuracy; off, as it takes the room of one more."""
    grace_seconds: float = Field(default=120, gt=0, le=1e6)
    """Seconds from a stop signal to the end of the step, then the rank exits unsaved; schedulers give about as long."""
    stall_seconds: float = Field(default=1800, gt=0, le=1e6)
    """Seconds that a rank may stay in one phase; then the run ends. Half an hour covers the longest generation."""
    allow_changed: tuple[Text, ...] = ()
    """Recipe keys that may differ from the run that is continued; none unless named, as its result would differ."""


class Recipe(Strict):
    """One run: what is trained, on what, for what, and how."""

    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$")]
    """Names the run in trackers, and its folder."""
    seed: int = Field(default=0, ge=0, lt=2**32, strict=True)
    """Of sampling, of the order of prompts and of new weights (an adapter's)."""
    output_dir: Text | None = None
    """The run folder; `runs/NAME` unless given."""
    policy: Policy
    """The model to train."""
    task: TaskSpec
    """What it is trained on: prompts and how an answer is judged."""
    rewards: Rewards
    """What a completion is paid for; at least one."""
    credit: CreditSpec | None = None
    """A credit rule; GRPO's equal credit unless given."""
    attention: AttentionOptions = AttentionOptions()
    """What a credit rule reads from the policy's attention; the paper's settings unless given."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """TRL's own GRPOConfig keys, with TRL's defaults, but one log line a step."""
    tracking: Tracking = Tracking()
    """Where a run is followed, besides its folder."""
    resume: Resume = Resume()
    """What is kept to go on from, and how a run stops."""

    @field_validator("trainer")
    @classmethod
    def _grpo_config(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        fields = grpo_fields.load_fields()
        for key, value in trainer.items():
            if key in OWNED_ELSEWHERE:
                raise UserError(f"trainer.{key}", f"lives at {OWNED_ELSEWHERE[key]}.", "Move it there.")
            if key in REFUSED:
                raise UserError(f"trainer.{key}", f"{REFUSED[key]}.", "Remove the key.")
            if key not in fields:
                raise UserError(f"trainer.{key}", "unknown key.", home_of(key) or did_you_mean(key, fields))
            if isinstance(value, str) and "dict" in fields[key].type and key not in ("deepspeed", "fsdp_config"):
                raise UserError(f"trainer.{key}", f"expected a mapping, got text {value!r}.", "Write {key: value}.")
            try:
                trainer[key] = grpo_fields.validate(key, value)
            except ValueError as error:
                raise UserError(f"trainer.{key}", f"{error}".rstrip(".") + ".") from None
        # TRL logs every 10th step; one line of metrics.jsonl a step is what a run folder promises.
        return {"logging_steps": 1, **trainer}

    @property
    def run_dir(self) -> Path:
        return expanded(self.output_dir or f"runs/{self.name}").absolute()

    @property
    def hub_ids(self) -> list[str]:
        """What the recipe takes from the hub: policy and data set, where they are no local files."""
        kind, options = self.task.kind, self.task.options
        data = [options.get("path"), options.get("eval_path")] if kind == "dataset" else []
        paths = [self.policy.path if self.policy.path != TINY_POLICY else None, *data]
        return [path for path in paths if isinstance(path, str) and not is_there(Path(path))]

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template is given besides the messages."""
        return dict(self.trainer.get("chat_template_kwargs") or {})

    @property
    def keys(self) -> list[str]:
        """Every dotted key, as `resume.allow_changed` names them."""
        return list(flat(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; parsing it gives an equal Recipe."""
        return dump_yaml(self.model_dump(mode="json"))


# ---------------------------------------------------------------------------------------------------------------------


def is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def home_of(leaf: str) -> str:
    """Where a key that was put in the wrong section lives."""
    if leaf in OWNED_ELSEWHERE:
        return f"It lives at {OWNED_ELSEWHERE[leaf]}."
    for name, field in Recipe.model_fields.items():
        if name == leaf:
            return f"It lives at the top of the recipe: {name}."
        if is_model(field.annotation) and leaf in field.annotation.model_fields:  # type: ignore[union-attr]
            return f"It lives at {name}.{leaf}."
    return f"It lives at trainer.{leaf}." if leaf in grpo_fields.load_fields() else ""


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    return {k: v for key, value in data.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}
