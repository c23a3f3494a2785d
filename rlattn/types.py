"""The shapes that flow through rlattn. Legend: B rollouts, T completion tokens, K rewards."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


Messages = list[dict[str, Any]]
Prompt = str | Sequence[str | Sequence[int]]
"""A text in which special tokens are written out (the tokenizer's beginning is added where it is missing); or pieces:
such texts, and token ids that are taken as they are: for what a policy wrote, where a special token that it spells out
must not become one."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion of one prompt, as a reward sees it."""

    prompt: str | Messages
    """What the task asked: plain text, or chat messages."""
    prompt_text: str
    """The prompt as the policy read it, chat template applied; it may already open a tag such as `<think>`."""
    blind_text: str = ""
    """The same without its images, for a second rollout that must not see; empty where the prompt shows none."""
    completion: str
    """What the policy wrote, without padding and end tokens; of a dialogue the transcript (formats/transcript.py)."""
    completion_ids: tuple[int, ...] = ()
    """The same as token ids; empty when stored text is scored."""
    policy_mask: tuple[bool, ...] = ()
    """Which of these the policy wrote; all of them where empty. The rest are replies in a dialogue."""
    row: Mapping[str, Any]
    """The task's row: every column of it, the gold answer included."""
    task: "Task"
    """The task the row comes from; `task.verify(completion, row)` judges an answer."""
    group: int = 0
    """The rollouts of one prompt share a number, over all ranks: a group may straddle them."""
    note: Any = None
    """What the reward's own `prepare` found out about this rollout."""

    @property
    def images(self) -> list[Any]:
        """What the prompt shows, in its order: the images in its messages."""
        contents = [] if isinstance(self.prompt, str) else [message.get("content") for message in self.prompt]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return [part["image"] for part in parts if isinstance(part, dict) and part.get("image") is not None]


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """This rank's rollouts of a generation batch, and what a reward's collective `prepare` may do with them.

    `gather` and `generate` are collective: every rank calls them equally often, whatever its rollouts hold.
    """

    rollouts: tuple[Rollout, ...]
    step: int
    """Optimizer steps done so far."""
    gather: "Callable[[list[Any]], list[Any]]"
    """Values of this rank -> those of all ranks, in the order of the ranks."""
    generate: "Callable[..., list[str]]"
    """`generate(prompts, images=None, max_new_tokens=…, temperature=0.0, lagged_policy=False, first_policy=False)`: one
    completion a prompt (`Prompt`), in one batched call, from the current policy, from the one that is refreshed every
    `lag` steps (the reward's attribute), or from the policy of step 0 (where its attribute `first_policy` is true).
    `images`: of each prompt a list such as `rollout.images`, or None; a prompt that shows none is `rollout.blind_text`.
    """
    decode: "Callable[[Sequence[int]], str]"
    """Token ids -> text, special tokens written out."""
    log: "Callable[[str, float], None]"
    """A metric of this step, by its full name; the same value on every rank."""


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """How the built-in tiny policy learns a task's format before RL."""

    steps: int = 600
    """Optimizer steps; so many teach a format, a minute on two CPU cores. Fewer leave RL more to learn."""
    noise: float = 0.1
    """Chance that a worked step of a trace goes wrong, in [0, 1]; above 0, so that RL finds both right and wrong."""
    batch_size: int = 32
    """Traces a step."""
    learning_rate: float = 3e-3
    """Of the optimizer (Muon for matrices), at its highest."""
    seed: int = 0
    """Apart from the run's seed, so that runs of several seeds share one warm start."""

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= 1_000_000:
            raise ValueError(f"steps: expected 0 to 1,000,000, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 to 2^32 - 1, got {self.seed}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise: expected 0 to 1, got {self.noise}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate: expected more than 0 and less than 1, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What attention says about every token. N positions (prompt and completion), L chosen layers, H heads."""

    waad_BN: "Tensor"
    """Float32: how far back a token looks, its distance clipped at the window; NaN where it is no response token."""
    fai_BN: "Tensor"
    """Float32: how much later tokens look back at it; NaN where undefined (no later token inside the horizon)."""
    mask_BN: "Tensor"
    """Bool: response tokens."""
    entropy_BN: "Tensor | None" = None
    """Float32, nats: of the distribution each token was drawn from; None where it was not asked for."""
    span_BLH: "Tensor | None" = None
    """Float32: mean look-back distance of every head of the chosen layers."""
    local_heads: "Tensor | None" = None
    """Bool (B, L, H): the heads that WAAD is averaged over."""
    global_heads: "Tensor | None" = None
    """Bool (B, L, H): the heads that FAI is averaged over."""
    layers: tuple[int, ...] = ()
    """The chosen layers, 0-based."""


@dataclass(frozen=True, kw_only=True)
class Credit:
    """One weight a token, and what a credit rule did, as metrics to log."""

    weights_BN: "Tensor"
    """Float32 >= 0; 1 outside the response."""
    metrics: "dict[str, Tensor]" = field(default_factory=dict)
    """Scalars by name (`credit/mean`, …); without any, the usual diagnostics are made."""


LONGEST = 10_000_000  # tokens
LARGEST_WEIGHT = 1e6  # of a reward or what multiplies it: more would drown the others in float32
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "hybrid")  # transformers' names, with queries and keys
CHOICES = {
    "rows": ("token", "predictor"),
    "scope": ("sequence", "batch", "calibrated"),
    "backend": ("auto", "torch", "triton"),
}


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What is read from the policy's attention (arXiv 2510.13554, section 4)."""

    layers: tuple[int, ...] | None = None
    """0-based; the paper's five from the middle third unless given."""
    window: int = 10
    """W of WAAD, in tokens; 10, as in the paper."""
    horizon: tuple[int, int] = (10, 100)
    """Hlo and Hhi of FAI, in tokens; 10 and 100, as in the paper."""
    rows: Literal["token", "predictor"] = "token"
    """A token's own row is the one in which it is the query; `predictor` takes the row that produced it."""
    share: float = 0.3
    """Share of the heads that a local or global set holds; 0.3, as in the paper."""
    scope: Literal["sequence", "batch", "calibrated"] = "sequence"
    """Head sets for every rollout, for every generation batch, or once, on the first batch."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """What computes the metrics: PyTorch anywhere, fused kernels on CUDA, or those where they can run."""

    def __post_init__(self) -> None:
        if not 1 <= self.window <= LONGEST:
            raise ValueError(f"window: expected 1 to {LONGEST:,}, got {self.window}")
        if len(self.horizon) != 2:
            raise ValueError(f"horizon: expected two numbers, [low, high], got {list(self.horizon)}")
        low, high = self.horizon
        if not 0 <= low <= high <= LONGEST:
            wanted = f"[low, high] with 0 <= low <= high <= {LONGEST:,}"
            raise ValueError(f"horizon: expected {wanted}, got {list(self.horizon)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share: expected more than 0 and at most 0.5, got {self.share}")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"layers: expected layer numbers from 0, got {list(self.layers)}")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers: expected every layer once, got {list(self.layers)}")


@dataclass(frozen=True, kw_only=True)
class CreditOptions:
    """How a credit rule's weights meet the advantage."""

    sign: Literal["both", "positive", "negative"] = "both"
    """Where the weights count: everywhere, or only where the advantage has that sign."""
    warmup: float = 0.0
    """The share of the run in which the weights rise from 1 to their full size."""
    decay: float = 0.0
    """The share of the run, at its end, in which they fall back to 1."""

    def __post_init__(self) -> None:
        if self.sign not in ("both", "positive", "negative"):
            raise ValueError(f"sign: expected both, positive or negative, got {self.sign!r}")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise ValueError(f"warmup: expected warmup + decay within 0 to 1, got {self.warmup} and {self.decay}")


Row = Mapping[str, Any]
Split = Literal["train", "eval"]


class Example(TypedDict):
    """A task's row, and its prompt as the policy gets it (chat messages unless plain)."""

    prompt: str | Messages
    row: "Row"
    effort: NotRequired[float]


@runtime_checkable
class Task(Protocol):
    """What rlattn needs of a task. Your own: a dataclass with these methods, named by `python:` in a recipe.

    It may also have `metrics(completion, row) -> dict[str, float]`: numbers about a completion besides its being right.
    Their means are logged as `task/<name>` in training and `eval/<name>` on held-out rows. A completion on which
    `metrics` or `verify` fails is left out and counted, and the first cause told. `shares` names the metrics that are
    shares in [0, 1], such as a yes or no: `rlattn eval` gives them the interval of a share, all others that of a mean.
    """

    def rows(self, split: Split) -> Iterable[Row]:
        """The rows of a split: a list of dicts, a `datasets.Dataset` or a `datasets.IterableDataset`.

        Every row has `prompt` (text, or chat messages) and whatever `verify` reads. Train and eval are disjoint.
        """
        ...

    def verify(self, completion: str, row: Row) -> float:
        """1.0 where the final answer of `completion` is right, else 0.0. Never raises on what a policy may write.

        `completion` begins with the `<think>` that its prompt ended in, if it did. What stands in a thought that is
        never closed, as in a completion that was cut, is no final answer (`rlattn.formats.thought.after_thought`).
        """
        ...

    def gold(self, row: Row) -> str:
        """A completion that `verify` scores 1.0."""
        ...


@runtime_checkable
class WarmStartable(Task, Protocol):
    """A task that can also teach a tiny policy its format before RL."""

    def trace(self, row: Row, rng: Random, noise: float) -> str:
        """A worked response in the task's format. `noise`: chance that a worked step goes wrong, in [0, 1]."""
        ...


@runtime_checkable
class DialogueTask(Task, Protocol):
    """A task whose rows are dialogues; `completion` is then the transcript (`rlattn/formats/transcript.py`).

    It also has `questions`, the most turns that are replied to; `turn_tokens`, the longest turn of the policy's; and
    `style`: `text`, or `tools` where the policy asks by calling the tool `ask`.
    """

    @property
    def questions(self) -> int: ...

    @property
    def turn_tokens(self) -> int: ...

    @property
    def style(self) -> Literal["text", "tools"]: ...

    def reply(self, turn: str, row: Row) -> str | None:
        """What is said to a turn of the policy's; None where it ends the dialogue. Pure; never raises."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a task or a reward may check itself against before a run: its `check(context)` raises UserError."""

    name: str
    """Its own name in the recipe: of a reward, the key of its entry; `task` of a task."""
    recipe: Any
    """The Recipe (`rlattn/recipe/schema.py`)."""
    task: Task
    rewards: Mapping[str, "Reward"]
    ranks: int
    window_steps: float
    """Optimizer steps from one generation to the next."""


@runtime_checkable
class Reward(Protocol):
    """What rlattn needs of a reward. A reward of your own: a class with this method, named by `python:` in a recipe."""

    def score(self, rollout: Rollout) -> float | None:
        """The reward of one rollout. `None` is neutral: it neither pays nor costs, unlike 0. Pure."""
        ...


@runtime_checkable
class CreditRule(Protocol):
    """What rlattn needs of a credit rule. A rule of your own: a class with this method, named by `python:` in a recipe.

    Two class attributes may say what a rule reads, both False where they are missing: `needs_entropy` (the signals then
    hold the policy's entropy at every token) and `reads_fai` (recipes whose responses are too short for any FAI are
    then warned of). Weights that are negative or not finite are caught by `compute_credit`.
    """

    def __call__(self, signals: Signals, step: int = 0) -> Credit:
        """One weight a token.

        Args:
            signals: of a batch of rollouts, detached.
            step: the number of this call, for rules that draw: the same rule, step and shape draw the same tokens. Pass
                a number that differs between steps, and between the batches and ranks of one step. Rules that do not
                draw may leave the argument out.
        """
        ...
