"""The map of the house holds: who may import whom, how long a file may be, where TRL's private side is named."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from rlattn import AttentionGRPOTrainer
from rlattn.grpo.port import EXTENDED

PACKAGE = Path(__file__).parents[1] / "rlattn"
# A room may import from those that stand before it; every room may import the files at the top (types, errors, …).
ROOMS = (
    "formats", "tasks", "credit", "attention", "processes", "rewards", "recipe", "preflight", "run_folder", "policy",
    "report", "grpo", "inspection", "run", "evaluation", "bench",
)  # fmt: skip
WAYS_IN = ("__init__", "cli", "train")  # they may import every room
PURE = ("formats", "credit")
KNOW_MODELS = {"transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "wandb"}
LONGEST = 400  # lines of a file
FILES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file: Path) -> set[str]:
    """Modules of rlattn that a file imports anywhere in it, as names inside the package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports inside rlattn are written out"
            of_package = node.module == "rlattn" or str(node.module).startswith("rlattn.")
            found |= {f"{node.module}.{name.name}" for name in node.names} if of_package else set()
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("rlattn.")}
    modules = set()
    for name in (name.removeprefix("rlattn.") for name in found):
        known = [name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__"]
        modules |= {next((one for one in known if one in FILES), "")} - {""}
    return modules


def room(module: str) -> str:
    return module.partition(".")[0] if "." in module else ""


ARROWS = {module: imports(file) - {module} for module, file in FILES.items()}


def test_every_folder_is_a_room_on_the_map():
    assert {room(module) for module in FILES} - {""} == set(ROOMS)


@pytest.mark.parametrize("module", [module for module in FILES if module not in WAYS_IN])
def test_a_room_imports_only_what_stands_before_it(module):
    allowed = ROOMS[: ROOMS.index(room(module)) + 1] if room(module) else ()
    assert {other for other in ARROWS[module] if room(other) and room(other) not in allowed} == set()
    assert {other for other in ARROWS[module] if other in WAYS_IN} <= {"__init__"}


@pytest.mark.parametrize("module", [module for module in FILES if room(module) in PURE])
def test_pure_rooms_know_neither_transformers_nor_trl(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    named = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert {name.partition(".")[0] for name in named} & KNOW_MODELS == set()


def test_no_files_import_each_other_in_a_circle():
    left = dict(ARROWS)
    while ground := [module for module, others in left.items() if not others & left.keys()]:
        for module in ground:
            del left[module]
    assert left == {}


def test_no_file_is_longer_than_one_look():
    files = {**FILES, **{file.name: file for file in Path(__file__).parent.glob("*.py")}}
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in files.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def private_names() -> set[str]:
    """What TRL's and transformers' trainers keep for themselves: methods, and attributes that they set."""
    from transformers import Trainer
    from trl import GRPOTrainer

    sources = "".join(inspect.getsource(inspect.getmodule(cls)) for cls in (GRPOTrainer, Trainer))
    names = set(re.findall(r"\b(?:self|trainer)\.(_[a-z]\w*)", sources)) | set(dir(GRPOTrainer))
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_trls_private_side_is_named_in_the_port_alone():
    private, found = private_names(), []
    for module, file in FILES.items():
        if module == "grpo.port":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or node.attr not in private:
                continue
            extended = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            own = ast.unparse(node.value) == "self" and module != "grpo.trainer"
            if not (own or (extended and node.attr in EXTENDED)):
                found.append(f"{module}: {ast.unparse(node)}")
    assert found == []


def test_the_port_names_every_private_method_that_the_trainer_extends():
    extended = {name for name in vars(AttentionGRPOTrainer) if name in private_names()}
    assert extended == set(EXTENDED)


def test_no_function_outside_grpo_takes_a_trainer():
    found = []
    for module, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and room(module) != "grpo":
                names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
                takes = "trainer" in names and node.name != "bind"  # what a reward of a user's may have
                found += [f"{module}: {node.name}"] if takes and "dict" not in ast.unparse(node.args) else []
    assert found == []
