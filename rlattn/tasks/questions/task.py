"""Dialogues: the policy asks a customer for what a specification leaves open, then writes it down.

The customer is a templated oracle that knows the true specification. It answers one question a turn, about one
attribute, with its value or, where the task space groups values, only with the group. There are fewer turns than
attributes, and the attributes differ in how uncertain they are, so it matters what is asked; the rest is guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal

from rlattn.errors import UserError
from rlattn.files import find_file
from rlattn.formats.thought import after_thought
from rlattn.formats.transcript import read_transcript, write_transcript
from rlattn.tasks.questions.belief import Belief, greedy_gain, greedy_order, prior_belief, restrict, total_entropy
from rlattn.tasks.questions.space import Specification, TaskSpace
from rlattn.tasks.questions.space_file import load_space
from rlattn.tasks.questions.wording import answer_allows, question_about, read_specification, write_specification
from rlattn.tasks.row_checks import check_row_counts

if TYPE_CHECKING:
    from rlattn.types import Row, Split

UNCLEAR = "Sorry, I did not understand. Please ask for one thing."
EVAL_SHARE = 5  # every fifth specification is held out
SMALL = 1000  # specifications; of so few, the splits are made by listing all of them
PATIENCE = 10_000  # draws, and 50 more a row, after which a split is given up
MOST_QUESTIONS = 63  # a dialogue's; its turns are compared one by one (`rlattn/rewards/information_gain.py`)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of the policy's, and what it told."""

    kind: Literal["question", "specification", "malformed"]
    attribute: str | None = None
    gain: float = 0.0
    """Bits: H(b_t) − H(b_{t+1})."""
    resolved: int = 0
    """Attributes of which one value is left now and several were before."""
    problem: Literal["", "unparsed", "contradiction"] = ""
    """What was wrong with the answer; the belief stays as it was."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Specifications from a task space (`rlattn/tasks/questions/space.py`), to be found out in a dialogue.

    Raises:
        UserError: the task space is not sound, or cannot be found.
        ValueError: an option is out of its range.
    """

    shares: ClassVar = ("attributes_right", "opened_best")
    path: str = "data/task_spaces/parcel.yaml"
    """The task space, YAML or JSON."""
    turn_limit: int | None = None
    """Questions a dialogue, at most half of the attributes and at most 63; as many as that if None."""
    turn_tokens: int = 48
    """Longest turn of the policy's, in tokens."""
    style: Literal["text", "tools"] = "text"
    """How the policy asks: in plain turns, or by calling a tool `ask` (chat models)."""
    list_choices: bool = True
    """Whether the prompt names the values to choose from; a policy without them has to have learned them."""
    train_rows: int = 2000
    eval_rows: int = 256
    data_seed: int = 0
    space: TaskSpace = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        file = find_file(self.path, Path.cwd())
        if file is None:
            raise UserError(
                "task.path", f"no file '{self.path}'.", "Shipped: data/task_spaces/parcel.yaml, diagram.yaml."
            )
        object.__setattr__(self, "space", load_space(file))
        half = len(self.space.attributes) // 2
        if self.turn_limit is not None and not 1 <= self.turn_limit <= self._most_questions:
            limit = f"half of the {len(self.space.attributes)} attributes" if half <= MOST_QUESTIONS else "the most"
            raise ValueError(f"turn_limit: expected 1 to {self._most_questions}, {limit}, found {self.turn_limit}")
        if self.turn_tokens < 1:
            raise ValueError(f"turn_tokens: expected at least 1, found {self.turn_tokens}")
        check_row_counts(self)

    @property
    def questions(self) -> int:
        """The most that may be asked in a dialogue."""
        return self.turn_limit or self._most_questions

    @property
    def _most_questions(self) -> int:
        return min(len(self.space.attributes) // 2, MOST_QUESTIONS)

    def rows(self, split: "Split") -> "list[Row]":
        """Rows of `prompt` and `specification`: drawn from the prior; no specification is in both splits.

        Raises:
            UserError: the prior all but never gives a specification of this split.
        """
        rng = Random(f"{self.data_seed} {split}")
        wanted = self.eval_rows if split == "eval" else self.train_rows
        few = prod(len(attribute.prior) for attribute in self.space.attributes.values()) <= SMALL
        drawn = self._listed(split, wanted, rng) if few else self._drawn(split, wanted, rng)
        prompt = self._prompt()
        return [{"prompt": prompt, "specification": specification} for specification in drawn]

    def _listed(self, split: "Split", wanted: int, rng: Random) -> list[Specification]:
        """Of a small space: every fifth specification, in the order of their digests, is held out; so both splits have
        some, however few there are.
        """
        names = [*self.space.attributes]
        every = [dict(zip(names, values)) for values in product(*(a.prior for a in self.space.attributes.values()))]
        every.sort(key=_digest)
        held_out = every[::EVAL_SHARE]
        own = held_out if split == "eval" else [one for place, one in enumerate(every) if place % EVAL_SHARE]
        odds = [prod(self.space.attributes[name].prior[value] for name, value in one.items()) for one in own]
        return rng.choices(own, weights=odds, k=wanted)

    def _drawn(self, split: "Split", wanted: int, rng: Random) -> list[Specification]:
        found: list[Specification] = []
        for _ in range(PATIENCE + 50 * wanted):
            specification = {
                name: rng.choices([*attribute.prior], weights=[*attribute.prior.values()])[0]
                for name, attribute in self.space.attributes.items()
            }
            if (_digest(specification)[0] % EVAL_SHARE == 0) == (split == "eval"):
                found.append(specification)
            if len(found) == wanted:
                return found
        raise UserError(
            "task.path",
            f"the prior of {self.path} gives a specification of the {split} split too seldom ({len(found)} of "
            f"{PATIENCE + 50 * wanted} draws).",
            "Make its values more evenly likely.",
        )

    def reply(self, turn: str, row: "Row") -> str | None:
        """What the customer says to a turn; None where the turn ends the dialogue."""
        said = after_thought(turn)
        if read_specification(self.space, said) is not None:
            return None
        name = question_about(self.space, said)
        if name is None:
            return UNCLEAR
        attribute = self.space.attributes[name]
        return attribute.answer.replace("{value}", attribute.said(row["specification"][name]))

    def replay(self, completion: str) -> list[Turn]:
        """The turns of a transcript and what each told: from what was said alone, without the true specification."""
        belief, turns = prior_belief(self.space), []
        for text, reply in read_transcript(completion):
            turn, belief = self._turn(belief, text, reply)
            turns.append(turn)
        return turns

    def verify(self, completion: str, row: "Row") -> float:
        """1.0 where the last turn gives the whole specification, and gives it right, else 0.0."""
        return 1.0 if self._written(completion) == row["specification"] else 0.0

    def metrics(self, completion: str, row: "Row") -> dict[str, float]:
        """What the dialogue told and how it went; see `rlattn/rewards/information_gain.py`."""
        turns = self.replay(completion)
        asked = [turn for turn in turns if turn.kind != "specification"]
        gain, true = sum(turn.gain for turn in turns), row["specification"]
        written = self._written(completion) or {}
        found = {
            "gain": gain,
            "gain_share": gain / greedy_gain(self.space, self.questions),
            "attributes_right": sum(written.get(name) == value for name, value in true.items()) / len(true),
            "opened_best": float(bool(turns) and turns[0].attribute == greedy_order(self.space)[0]),
            "resolved_attributes": float(sum(turn.resolved for turn in turns)),
            "turns": float(len(asked)),
            "malformed": float(sum(turn.kind == "malformed" for turn in turns)),
            "unparsed": float(sum(turn.problem == "unparsed" for turn in turns)),
            "contradictions": float(sum(turn.problem == "contradiction" for turn in turns)),
        }
        return found | ({"gain_per_turn": gain / len(asked)} if asked else {})

    def gold(self, row: "Row") -> str:
        """The greedy questioner's dialogue, and the true specification."""
        return self._dialogue(greedy_order(self.space)[: self.questions], row, row["specification"])

    def trace(self, row: "Row", rng: Random, noise: float) -> str:
        """A whole dialogue. With chance `noise`, at every turn, the question is any attribute's that was not asked
        for yet; and what was not told is guessed by the odds instead of the likeliest value being written.
        """
        left, asked = greedy_order(self.space), []
        for _ in range(self.questions):
            asked.append(left.pop(rng.randrange(len(left)) if rng.random() < noise else 0))
        belief: Belief = prior_belief(self.space)
        for name in asked:
            attribute = self.space.attributes[name]
            allowed = attribute.answers[attribute.said(row["specification"][name])]
            belief = restrict(belief, name, allowed) or belief
        guess = {
            name: rng.choices([*values], weights=[*values.values()])[0]
            if rng.random() < noise
            else max(values, key=lambda value: values[value])
            for name, values in belief.items()
        }
        return self._dialogue(asked, row, guess)

    def _dialogue(self, asked: Sequence[str], row: "Row", specification: Specification) -> str:
        segments: list[tuple[str, bool]] = []
        for name in asked:
            question = self.space.attributes[name].question
            segments += [(question, True), (self.reply(question, row) or "", False)]
        return write_transcript([*segments, (write_specification(specification), True)])

    def _turn(self, belief: Belief, text: str, reply: str | None) -> tuple[Turn, Belief]:
        said = after_thought(text)
        if read_specification(self.space, said) is not None:
            return Turn(kind="specification" if reply is None else "malformed"), belief
        name = question_about(self.space, said)
        if name is None:
            return Turn(kind="malformed"), belief
        if reply is None:  # asked when there was no turn left
            return Turn(kind="question", attribute=name), belief
        allowed = answer_allows(self.space.attributes[name], reply)
        if allowed is None:
            return Turn(kind="question", attribute=name, problem="unparsed"), belief
        after = restrict(belief, name, allowed)
        if after is None:
            return Turn(kind="question", attribute=name, problem="contradiction"), belief
        gain = total_entropy(belief) - total_entropy(after)
        resolved = int(len(belief[name]) > 1 and len(after[name]) == 1)
        return Turn(kind="question", attribute=name, gain=gain, resolved=resolved), after

    def _written(self, completion: str) -> Mapping[str, str] | None:
        turns = read_transcript(completion)
        said = after_thought(turns[-1][0]) if turns else ""
        return read_specification(self.space, said) if turns and turns[-1][1] is None else None

    def _prompt(self) -> str:
        if self.style == "tools":
            how = f"Call the tool `ask` with one question at a time, at most {self.questions} times"
        else:
            how = f"Ask the customer one question a turn, at most {self.questions} questions"
        choices = "Choices: " + " ; ".join(f"{n} = {' | '.join(a.prior)}" for n, a in self.space.attributes.items())
        shape = " ; ".join(f"{name} = ..." for name in [*self.space.attributes][:2])
        return (
            f"Find out what a customer wants of {self.space.about}. {how}. Then write the whole specification, "
            f"guessing what you could not ask, as <spec> {shape} ; ... </spec>." + f" {choices}." * self.list_choices
        )


def _digest(specification: Specification) -> bytes:
    return sha256(write_specification(specification).encode()).digest()
