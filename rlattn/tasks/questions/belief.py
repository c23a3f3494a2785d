"""What is known about a specification, and how much an answer tells. Pure; bits throughout.

The attributes are independent, so a belief b is one distribution an attribute and H(b) = sum_i H(b_i). An answer that
restricts attribute i to a set S of values renormalises b_i on S; the gain of a turn is H(b_t) − H(b_{t+1}) (Nous,
arXiv 2510.27410). A second time the same answer restricts nothing: gain 0. An answer that leaves a set of rare but
equally likely values makes the belief less certain: its gain is negative, and stays so.
"""

from collections.abc import Collection, Iterable, Mapping
from math import log2

from rlattn.tasks.questions.space import Attribute, TaskSpace

Belief = Mapping[str, Mapping[str, float]]  # attribute -> value -> probability, no zeros


def prior_belief(space: TaskSpace) -> Belief:
    return {name: attribute.prior for name, attribute in space.attributes.items()}


def entropy(probabilities: Iterable[float]) -> float:
    """Shannon entropy in bits."""
    return -sum(p * log2(p) for p in probabilities if p > 0) or 0.0  # never -0.0


def total_entropy(belief: Belief) -> float:
    return sum(entropy(values.values()) for values in belief.values())


def restrict(belief: Belief, attribute: str, allowed: Collection[str]) -> Belief | None:
    """The belief after hearing that `attribute` is one of `allowed`; None where that contradicts it."""
    left = {value: p for value, p in belief[attribute].items() if value in allowed}
    total = sum(left.values())
    if not total:
        return None
    return {**belief, attribute: {value: p / total for value, p in left.items()}}


def expected_gain(attribute: Attribute, values: Mapping[str, float]) -> float:
    """Bits that asking for an attribute is expected to tell, before the answer: H(b_i) less its mean afterwards."""
    gain = entropy(values.values())
    for allowed in attribute.answers.values():
        left = [p for value, p in values.items() if value in allowed]
        total = sum(left)
        if total:
            gain -= total * entropy(p / total for p in left)
    return max(gain, 0.0)  # rounding


def greedy_order(space: TaskSpace) -> list[str]:
    """The attributes as the greedy questioner asks for them: always the largest expected gain, ties in file order.

    The order does not depend on the answers: attributes are independent, and the answers of one part its values, so a
    second question about it tells nothing.
    """
    gains = {name: expected_gain(attribute, attribute.prior) for name, attribute in space.attributes.items()}
    return sorted(gains, key=lambda name: -round(gains[name], 9))


def greedy_gain(space: TaskSpace, questions: int) -> float:
    """Expected bits of the greedy questioner's first `questions` questions together."""
    asked = greedy_order(space)[:questions]
    return sum(expected_gain(space.attributes[name], space.attributes[name].prior) for name in asked)


def random_gain(space: TaskSpace, questions: int) -> float:
    """Expected bits of a questioner who asks for `questions` different attributes at random."""
    gains = [expected_gain(attribute, attribute.prior) for attribute in space.attributes.values()]
    return min(questions, len(gains)) * sum(gains) / len(gains)
