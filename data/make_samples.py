"""Makes the samples in this folder: `python data/make_samples.py`. The same bytes every time; a test checks it."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from random import Random

NAMES = ("Ada", "Ben", "Chidi", "Dalia", "Emre", "Freya", "Goran", "Hana")
THINGS = ("pencils", "apples", "stickers", "marbles", "shells", "stamps")
SYSTEM = "Work the problem out, then give the result as <answer>number</answer>."


def shopping(rng: Random) -> tuple[str, str, int]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    packs, price, coupon = rng.randint(3, 12), rng.randint(2, 9), rng.randint(1, 5)
    cost = packs * price
    question = (
        f"{name} buys {packs} packs of {thing} at ${price} a pack and has a coupon for ${coupon} off. "
        f"How many dollars does {name} pay?"
    )
    steps = f"The packs cost {packs} * {price} = ${cost}.\nWith the coupon: {cost} - {coupon} = ${cost - coupon}."
    return question, steps, cost - coupon


def sharing(rng: Random) -> tuple[str, str, int]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    friends, each, kept = rng.randint(3, 8), rng.randint(4, 15), rng.randint(2, 9)
    total = friends * each + kept
    question = (
        f"{name} has {total} {thing}, keeps {kept} and shares the rest equally among {friends} friends. "
        f"How many {thing} does each friend get?"
    )
    steps = f"To share: {total} - {kept} = {total - kept}.\nEach gets {total - kept} / {friends} = {each}."
    return question, steps, each


def journey(rng: Random) -> tuple[str, str, int]:
    name = rng.choice(NAMES)
    first, second = rng.randint(2, 5), rng.randint(1, 4)
    fast, slow = 10 * rng.randint(6, 9), 10 * rng.randint(3, 5)
    question = (
        f"{name} drives {first} hours at {fast} km/h and then {second} hours at {slow} km/h. "
        "How many kilometres is that in all?"
    )
    steps = f"First part: {first} * {fast} = {first * fast} km.\nSecond part: {second} * {slow} = {second * slow} km."
    steps += f"\nIn all: {first * fast} + {second * slow} = {first * fast + second * slow} km."
    return question, steps, first * fast + second * slow


def savings(rng: Random) -> tuple[str, str, int]:
    name = rng.choice(NAMES)
    start, weekly, weeks = 100 * rng.randint(5, 20), 25 * rng.randint(2, 8), rng.randint(4, 12)
    saved = weekly * weeks
    question = (
        f"{name} has ${start:,} and saves ${weekly} more every week. "
        f"How many dollars does {name} have after {weeks} weeks?"
    )
    steps = f"Saved: {weekly} * {weeks} = ${saved}.\nIn all: {start} + {saved} = ${start + saved}."
    return question, steps, start + saved


KINDS: tuple[Callable[[Random], tuple[str, str, int]], ...] = (shopping, sharing, journey, savings)


def word_problems(n: int, seed: int) -> list[dict]:
    rng = Random(seed)
    rows = {}
    while len(rows) < n:
        question, steps, result = KINDS[len(rows) % len(KINDS)](rng)
        rows[question] = {"question": question, "answer": f"{steps}\n#### {result:,}"}
    return list(rows.values())


def countdown(n: int, seed: int) -> list[dict]:
    """Puzzles made from a solution: numbers joined at random until the result is a whole number from 1 to 99."""
    rng = Random(seed)
    rows = {}
    while len(rows) < n:
        numbers = [rng.randint(1, 25) for _ in range(rng.choice((3, 4)))]
        expression, value = str(numbers[0]), Fraction(numbers[0])
        for number in numbers[1:]:
            sign = rng.choice("+-*/")
            expression = f"({expression}) {sign} {number}" if " " in expression else f"{expression} {sign} {number}"
            results = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}
            value = results[sign]
        if value.denominator != 1 or not 1 <= value <= 99:
            continue
        numbers, target = rng.sample(numbers, len(numbers)), int(value)
        prompt = (
            f"Use each of the numbers {', '.join(map(str, numbers))} exactly once, with + - * / and brackets, "
            f"to make {target}."
        )
        rows[prompt] = {"prompt": prompt, "numbers": numbers, "target": target, "answer": expression}
    return list(rows.values())


def chat(n: int, seed: int) -> list[dict]:
    rows = []
    for row in word_problems(n, seed):
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
        rows.append({"prompt": prompt, "answer": row["answer"].split("#### ")[1]})
    return rows


def main(folder: Path) -> None:
    samples = {
        "word_problems.jsonl": word_problems(60, seed=0),
        "countdown_sample.jsonl": countdown(50, seed=1),
        "chat_sample.jsonl": chat(20, seed=2),
    }
    for name, rows in samples.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(__file__).parent)
