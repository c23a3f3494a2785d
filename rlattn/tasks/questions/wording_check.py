"""Whether the parsers tell a task space's questions, answers and values apart: they read words only, in lower case."""

from typing import TYPE_CHECKING

from rlattn.errors import UserError
from rlattn.tasks.questions.wording import answer_allows, question_about, read_specification, write_specification

if TYPE_CHECKING:
    from rlattn.tasks.questions.space import TaskSpace

FIX = "Case and signs do not count, nor does a plural s: use other words."


def check_understood(space: "TaskSpace", where: str) -> None:
    """That every question, answer and value, as the task writes it, is read as what it is.

    Cost: quadratic in the values of an attribute.

    Raises:
        UserError: naming the attribute, and the value or the group at fault.
    """
    for name, attribute in space.attributes.items():
        key = f"{where}: attributes.{name}"
        other = question_about(space, attribute.question)
        if other != name:
            raise UserError(f"{key}.question", f"is the same question as that of '{other}'.", FIX)
        for label, allowed in attribute.answers.items():
            said = attribute.answer.replace("{value}", label)
            read = answer_allows(attribute, said)
            if read != allowed:
                told = " or ".join(sorted(read)) if read else "nothing"
                raise UserError(f"{key}.answer", f"of '{label}', {said!r}, is read as {told}.", FIX)
    for place in range(max(len(attribute.prior) for attribute in space.attributes.values())):
        written = {name: [*a.prior][place % len(a.prior)] for name, a in space.attributes.items()}
        found = read_specification(space, write_specification(written)) or {}
        for name, value in written.items():
            if found.get(name) != value:
                told = f"'{found[name]}'" if name in found else "nothing"
                key = f"{where}: attributes.{name}.values.{value}"
                raise UserError(key, f"is read as {told} where a specification says it.", FIX)
