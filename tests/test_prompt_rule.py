"""Every row is looked at before a run: its prompt must suit the chat template and the model's context."""

import json
import re

import pytest
from test_inspect import save_model, save_tokenizer

from rlattn.errors import UserError
from rlattn.recipe.load import load_recipe
from rlattn.run.build import prepare

TEMPLATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
ROWS = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(12)]
LONG = {"prompt": "long " * 30 + "?", "answer": "1"}
TWICE = {"prompt": [{"role": "user", "content": "Hello."}, {"role": "user", "content": "1 + 1?"}], "answer": "2"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_tokenizer(save_model(folder, max_position_embeddings=64), TEMPLATE)
    return folder


@pytest.fixture
def prepared(tmp_path, policy):
    def prepare_with(rows, *overrides, held_out=ROWS[:2]):
        for name, some in (("train", rows), ("test", held_out)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        (tmp_path / "recipe.yaml").write_text(
            f"name: small\npolicy: {{path: {policy}}}\nrewards: {{accuracy: {{}}}}\n"
            "task: {kind: dataset, path: train.jsonl, eval_path: test.jsonl}\n"
            "trainer: {max_steps: 2, per_device_train_batch_size: 8, num_generations: 4, max_completion_length: 12}\n"
        )
        return prepare(load_recipe(tmp_path / "recipe.yaml", overrides))

    return prepare_with


def test_a_prompt_that_the_template_refuses_is_named(prepared):
    with pytest.raises(UserError, match=r"refuses the prompt of training row 12: .*roles must alternate.*'Hello\.'"):
        prepared([*ROWS[:11], TWICE])
    with pytest.raises(UserError, match=r"refuses the prompt of held-out row 2: .*roles must alternate"):
        prepared(ROWS, held_out=[ROWS[0], TWICE])


def test_a_prompt_beyond_the_context_is_refused_or_left_out(prepared, capsys):
    refused = r"12 and a prompt \(training row 7, \d+ tokens\) exceed .* 64.*=drop leaves out 1 of 13 training prompts"
    with pytest.raises(UserError, match=refused):
        prepared([*ROWS[:6], LONG, *ROWS[6:]])
    with pytest.raises(UserError, match=r"held-out row 3"):
        prepared(ROWS, held_out=[*ROWS[:2], LONG])
    setup = prepared([*ROWS[:6], LONG, *ROWS[6:]], "task.overlong=drop", held_out=[*ROWS[:2], LONG])
    assert [row["prompt"] for row in setup.data[:]["row"]] == [row["prompt"] for row in ROWS]
    assert len(setup.examples) == 2
    assert "task.overlong: 1 of 13 training prompts are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"training rows are 1, and one generation batch takes 2"):
        prepared([*ROWS[:1], LONG, LONG], "task.overlong=drop")
    with pytest.raises(UserError, match=r"leaves no held-out prompt"):
        prepared(ROWS, "task.overlong=drop", held_out=[LONG])


def test_a_stream_goes_on_without_what_it_cannot_use(prepared, capsys):
    setup = prepared([*ROWS[:6], LONG, TWICE, *ROWS[6:]], "task.streaming=true")
    assert [example["row"]["prompt"] for example in setup.data] == [row["prompt"] for row in ROWS]
    told = re.findall(r"1 of \d+ rows of the stream left out so far, the last one: (\S+)", capsys.readouterr().out)
    assert told == ["trainer.max_completion_length:", "task:"]
    with pytest.raises(UserError, match=r"training rows are 1, and one generation batch takes 2"):
        prepared([ROWS[0], LONG], "task.streaming=true", "task.overlong=drop")


def test_held_out_prompts_that_are_trained_on_are_told(prepared, capsys):
    prepared(ROWS[1:], held_out=[*ROWS[:3], ROWS[2]])
    assert "warning: task: 2 of 3 held-out prompts are training prompts too" in capsys.readouterr().out
