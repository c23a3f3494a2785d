"""The pages: what they link to exists, what they name exists, and every key of a recipe is explained."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import BaseModel

from rlattn.credit import CREDIT_RULES
from rlattn.recipe.schema import Recipe, RewardSpec
from rlattn.rewards import REWARDS
from rlattn.tasks import TASKS
from rlattn.types import AttentionOptions, WarmStart

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True
)
PAGES = [name for name in LISTED.stdout.split() if name != "CHANGELOG.md"] or sorted(
    str(page.relative_to(ROOT)) for page in ROOT.rglob("README.md") if not {".venv", ".git"} & set(page.parts)
)
FOLDERS = ("rlattn", "recipes", "launch", "data", "tests")
# what the user makes by following the page
MADE = re.compile(r"^(runs|inspect|tokens|checkpoints|eval)/|NAME")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        there = (ROOT / page).parent / path if path else ROOT / page
        file = there / "README.md" if there.is_dir() and (there / "README.md").exists() else there
        if not there.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page):
    named = re.findall(rf"[`\s(]((?:{'|'.join(FOLDERS)})/[\w./*-]*\w)(?![\w<*])", text_of(page))
    here = re.findall(r"`([\w/]+\.(?:py|yaml|json|sh|sbatch))`", text_of(page))
    missing = [path for path in named if not any(ROOT.glob(path))]
    missing += [
        path
        for path in here
        if not MADE.match(path) and not any((ROOT / page).parent.rglob(path)) and not any(ROOT.glob(path))
    ]
    assert missing == [path for path in missing if path in MADE_BY_A_RUN]


MADE_BY_A_RUN = {
    "recipe.yaml", "environment.json", "summary.json", "manifest.json", "eval.json", "inspect.json",
    "compare-tables.json", "my_rewards.py", "my_rules.py", "my_tasks.py",
}  # fmt: skip


def test_every_recipe_key_is_explained():
    def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = [c for c in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(c, type)]
            section = next((c for c in inner if issubclass(c, BaseModel)), None)
            options = next((c for c in inner if c in (AttentionOptions, WarmStart)), None)
            if section:
                found += keys(section, f"{prefix}{name}.")
            elif options:
                found += [f"{prefix}{name}.{key}" for key in options.__dataclass_fields__]
            elif name != "trainer":
                found.append(prefix + name)
        return found

    page = text_of("recipes/README.md")
    every = keys(Recipe) + [f"rewards.NAME.{name}" for name in RewardSpec.model_fields]
    assert [key for key in every if f"`{key}`" not in page] == []


@pytest.mark.parametrize(
    ("table", "page"),
    [
        (CREDIT_RULES, "rlattn/credit/README.md"),
        (REWARDS, "rlattn/rewards/README.md"),
        (TASKS, "rlattn/tasks/README.md"),
    ],
)
def test_every_method_and_its_options_are_on_its_page(table, page):
    text = text_of(page)
    for name, method in table.items():
        assert f"`{name}`" in text
        missing = [field.name for field in fields(method) if field.init and field.name not in text]
        assert missing == [], name


def test_every_shipped_recipe_is_in_the_table():
    page = text_of("recipes/README.md")
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        assert f"| `{recipe.stem}` |" in page


def test_the_first_page_fits():
    assert len(text_of("README.md").splitlines()) <= 200
