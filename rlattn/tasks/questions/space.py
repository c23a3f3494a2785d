"""Task spaces: what a customer may want, how likely each wish is, and how it is asked for and told. From YAML or JSON.

about: a parcel to be sent
question: What is the {attribute} of the parcel?       # the default; an attribute may have its own
answer: The {attribute} is {value}.
attributes:
  size: {values: {small: 0.5, medium: 0.3, large: 0.2}}
  contents:
    values: {documents: 0.5, clothes: 0.2, batteries: 0.3}   # the prior; a plain list is uniform
    groups: {harmless: [documents, clothes], dangerous: [batteries]}   # all that an answer says: a partial one
    question: What is in the parcel?
    answer: Something {value} is in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Specification = Mapping[str, str]  # attribute -> value


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One thing that may be asked for. `prior` sums to 1; `answers`: what the customer says -> the values it allows."""

    name: str
    prior: Mapping[str, float]
    answers: Mapping[str, frozenset[str]]
    """The value itself where no groups are given. Together the answers hold every value, and each one once."""
    question: str
    """A whole question."""
    answer: str
    """With `{value}` in it."""

    def said(self, value: str) -> str:
        """What the customer says of a true value: the value, or the group that holds it."""
        return next(label for label, allowed in self.answers.items() if value in allowed)


@dataclass(frozen=True, kw_only=True)
class TaskSpace:
    about: str
    attributes: Mapping[str, Attribute]
