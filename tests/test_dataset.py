import json
import math
import runpy
from decimal import Decimal
from pathlib import Path

import pytest
from conftest import without
from hypothesis import given
from hypothesis import strategies as st

from rlattn.errors import UserError
from rlattn.tasks.dataset.task import DatasetTask

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
SAMPLES = ROOT.parent / "shared" / "samples"
ROWS = [{"question": f"{i} + {i}?", "answer": f"Add.\n#### {2 * i}", "level": i % 3} for i in range(10)]
COLUMNS = {"prompt": "question"}


def write(path: Path, rows: list) -> Path:
    import pyarrow
    from pyarrow import csv, parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        csv.write_csv(pyarrow.Table.from_pylist(rows), path)
    return path


def task(path: Path | str, **options) -> DatasetTask:
    return DatasetTask(**{"path": str(path), "columns": COLUMNS, "eval_rows": 2, **options})


def message(task: DatasetTask) -> str:
    with pytest.raises(UserError) as caught:
        list(task.rows("train"))
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_gives_the_same_rows(tmp_path, suffix, streaming):
    made = task(write(tmp_path / f"train{suffix}", ROWS), streaming=streaming)
    train, held_out = list(made.rows("train")), list(made.rows("eval"))
    assert (len(train), len(held_out)) == (8, 2)
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in held_out)
    rows = sorted(train + held_out, key=lambda row: row["prompt"])
    assert [row["answer"] for row in rows] == [str(2 * i) for i in range(10)]
    assert [int(row["level"]) for row in rows] == [i % 3 for i in range(10)]
    assert all(made.verify(made.gold(row), row) == 1.0 for row in rows)
    assert made.look(3).train[2]["prompt"] == "2 + 2?"


def test_json_may_hold_lines(tmp_path):
    path = tmp_path / "train.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(task(path).rows("train")) == 8


def test_the_held_out_choice_is_seeded(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    prompts = [tuple(row["prompt"] for row in task(path, data_seed=seed).rows("eval")) for seed in (0, 0, 1, 2, 3)]
    assert prompts[0] == prompts[1]
    assert len(set(prompts)) > 1


def test_a_stream_is_lazy_and_skips_its_evaluation_head(tmp_path):
    import datasets

    made = task(write(tmp_path / "a.jsonl", ROWS[:5]), streaming=True)
    stream = made.rows("train")
    assert isinstance(stream, datasets.IterableDataset)
    assert [row["prompt"] for row in made.rows("eval")] == ["0 + 0?", "1 + 1?"]
    assert [row["prompt"] for row in stream.take(2)] == ["2 + 2?", "3 + 3?"]


def test_bad_rows_of_a_stream_are_told_and_left_out_until_they_are_too_many(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"question": None, "answer": "1"}, *ROWS, {"question": "?", "answer": None}])
    with path.open("a") as file:
        file.write("{torn\n")
    made = task(path, streaming=True)
    assert (len(list(made.rows("train"))), len(made.rows("eval")), made.look(None).left_out) == (8, 2, 3)
    told = capsys.readouterr().out
    assert "warning: 1 of 1 rows of the stream left out so far, the last one" in told
    assert "a.jsonl, row 1, column 'question': expected text or chat messages, found null" in told
    assert told.count("warning") == 1
    wrong = task(path, streaming=True, columns={**COLUMNS, "answer": "gold"})
    assert "has no column 'gold'" in message(wrong) and "It is bad row 11 of 11 of the stream: too many" in message(
        wrong
    )
    (tmp_path / "all.jsonl").write_text("{torn\n" * 3)
    assert "the data set is empty: every one of its 3 rows is bad" in message(
        task(tmp_path / "all.jsonl", streaming=True)
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_no_copy_of_a_held_out_prompt_is_trained_on(tmp_path, streaming, chat):
    rows = [
        {**row, "question": [{"role": "user", "content": row["question"]}] if chat else row["question"]} for row in ROWS
    ]
    made = task(write(tmp_path / "a.jsonl", [*rows, *rows[::-1], *rows]), streaming=streaming, eval_rows=4)
    train, held_out = [[str(row["prompt"]) for row in made.rows(split)] for split in ("train", "eval")]
    assert (len(train), len(held_out), len(set(held_out))) == (18, 4, 4)
    assert not set(train) & set(held_out)
    assert [str(row["prompt"]) for row in made.look(None).held_out] == held_out
    text = message(task(made.path, streaming=streaming, eval_rows=10))
    assert "has only 10 different prompts; some must be left to train on" in text


def test_eval_path_and_no_held_out_rows(tmp_path):
    train, held_out = write(tmp_path / "train.jsonl", ROWS), write(tmp_path / "test.csv", ROWS[:3])
    made = task(train, eval_path=str(held_out))
    assert (len(made.rows("train")), len(made.rows("eval"))) == (10, 3)
    assert len(made.look(2).train) == 2
    made = task(train, eval_rows=0)
    assert (len(made.rows("train")), len(made.rows("eval"))) == (10, 0)


def test_instruction_and_chat_prompts(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert task(path, instruction="Box it.").look(1).train[0]["prompt"] == "0 + 0?\nBox it."
    chat = DatasetTask(path=str(DATA / "chat_sample.jsonl"), eval_rows=5)
    row = chat.rows("train")[0]
    assert [part["role"] for part in row["prompt"]] == ["system", "user"]
    assert chat.verify(chat.gold(row), row) == 1.0
    with pytest.raises(UserError, match=r"task\.instruction: is for text prompts"):
        DatasetTask(path=chat.path, instruction="Box it.").look(1)
    answered = [*row["prompt"], {"role": "assistant", "content": "It is"}]
    path = write(
        tmp_path / "answered.jsonl",
        [{"prompt": row["prompt"], "answer": "1"}] * 3 + [{"prompt": answered, "answer": "1"}],
    )
    with pytest.raises(UserError, match=r"row 4, column 'prompt': the prompt ends in a message of the assistant's"):
        DatasetTask(path=str(path), eval_rows=0).rows("train")
    chats = [{"prompt": row["prompt"], "answer": "1"}] * 3
    parquet = write(tmp_path / "chat.parquet", chats)
    assert DatasetTask(path=str(parquet), eval_rows=0).rows("train")[0]["prompt"] == row["prompt"]
    csv = write(tmp_path / "chat.csv", [{"prompt": json.dumps(row["prompt"]), "answer": "1"}])
    assert DatasetTask(path=str(csv), eval_rows=0).rows("train")[0]["prompt"] == row["prompt"]
    write(csv, [{"prompt": str(row["prompt"]), "answer": "1"}])
    assert "column 'prompt': holds chat messages as text that is no JSON" in message(DatasetTask(path=str(csv)))


def test_numbers_are_answers(tmp_path):
    path = write(tmp_path / "a.parquet", [{"question": "6 * 7?", "answer": 42}])
    assert task(path, eval_rows=0).rows("train")[0]["answer"] == "42"
    write(path, [{"question": "6 * 7?", "answer": Decimal("4.20")}])
    assert task(path, eval_rows=0).rows("train")[0]["answer"] == "4.20"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_may_lie_in_others_and_an_answer_in_a_list(tmp_path, suffix):
    rows = [{"question": f"{i}?", "reward_model": {"style": "rule", "ground_truth": [str(i)]}} for i in range(4)]
    path = write(tmp_path / f"a{suffix}", rows)
    found = task(path, columns={**COLUMNS, "answer": "reward_model.ground_truth"}).rows("train")
    assert [row["answer"] for row in found] == [row["prompt"][0] for row in found]
    text = message(task(path, columns={**COLUMNS, "answer": "reward_model.grund_truth"}))
    assert "row 1: column 'reward_model' holds no 'grund_truth'" in text and "Did you mean 'ground_truth'?" in text
    text = message(task(path, columns={**COLUMNS, "answer": "reward.ground_truth"}))
    assert "has no column 'reward.ground_truth' (task.columns.answer)" in text
    write(path, [{"question": "?", "a.b": "1", "a": {"b": "2"}}])
    assert task(path, eval_rows=0, columns={**COLUMNS, "answer": "a.b"}).rows("train")[0]["answer"] == "1"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": None, "answer": "1"}, "row 3, column 'question': expected text or chat messages, found null."),
        ({"question": 5, "answer": "1"}, "row 3, column 'question': expected text or chat messages, found int (5)."),
        ({"question": " ", "answer": "1"}, "row 3, column 'question': the prompt is empty."),
        ({"question": [], "answer": "1"}, "row 3, column 'question': the prompt has no messages."),
        ({"question": ["hi"], "answer": "1"}, "message 1: expected {role, content}, found str (hi)."),
        ({"question": [{"role": "user"}], "answer": "1"}, "message 1: expected 'content' to be text, found null."),
        ({"question": [{"role": 1, "content": "x"}], "answer": "1"}, "expected 'role' to be text, found int (1)."),
        ({"question": "q", "answer": None}, "row 3, column 'answer': expected text or a number, found null."),
        ({"question": "q", "answer": float("nan")}, "column 'answer': expected text or a number, found null (nan)."),
        ({"question": "q", "answer": float("-inf")}, "column 'answer': expected text or a number, found null (-inf)."),
        ({"question": "q", "answer": " NaN"}, "column 'answer': expected text or a number, found null (NaN)."),
        (
            {"question": "q", "answer": "so it is\n#### nan"},
            "column 'answer': expected text or a number, found null (nan).",
        ),
        ({"question": "nan", "answer": "1"}, "column 'question': expected text or chat messages, found null (nan)."),
        ({"question": "q", "answer": True}, "row 3, column 'answer': expected text or a number, found bool (True)."),
        ({"question": "q", "answer": " "}, "row 3, column 'answer': the gold answer is empty."),
        ({"question": "q", "answer": []}, "row 3, column 'answer': expected text or a number, found list ([])."),
        ({"question": "q", "answer": [None]}, "row 3, column 'answer': expected text or a number, found null."),
        ({"question": "q", "answer": ["1", "2"]}, "row 3, column 'answer': expected one answer, found a list of 2."),
        ({"question": "q", "anwser": "1"}, "has no column 'answer' (task.columns.answer). Did you mean 'anwser'?"),
        ("text", "row 3: expected an object, found str."),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, problem):
    path = write(tmp_path / "bad.jsonl", [*ROWS[:2], row, *ROWS[2:]])
    text = message(task(path, eval_rows=1))
    assert text.startswith(str(path))
    assert problem in text


def test_bad_options(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    assert "is a single file and has no split 'test'" in message(task(path, split="test"))
    assert "task.config: is for data sets on the hub" in message(task(path, config="main"))
    assert "task.revision: is for data sets on the hub" in message(task(path, revision="main"))
    for streaming in (False, True):
        text = message(task(path, eval_rows=10, streaming=streaming))
        assert "task.eval_rows: is 10, but" in text and "has only 10 different prompts" in text
    for options, problem in [
        ({"columns": {"promt": "q"}}, "task.columns.promt: is not a column rlattn reads. Did you mean 'prompt'?"),
        ({"eval_rows": -1}, "task.eval_rows: is -1"),
        ({"eval_path": str(path)}, "task.eval_path: is the training data."),
        ({"eval_split": "train"}, "task.eval_split: is the training split, 'train'."),
    ]:
        with pytest.raises(UserError) as caught:
            task(path, **options)
        assert problem in str(caught.value)


def test_a_look_reads_no_further_and_imports_no_datasets(tmp_path):
    path = write(tmp_path / "train.jsonl", [*ROWS, {"question": None}])
    code = (
        "from rlattn.tasks.dataset.task import DatasetTask\n"
        f"rows = DatasetTask(path={str(path)!r}, columns={COLUMNS}).look(4).train\n"
        "assert len(rows) == 4"
    )
    without({"datasets", "torch", "math_verify", "pyarrow"}, code, cwd=ROOT)


def test_the_hub_loads_and_its_faults_are_one_message(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    asked = []

    def load(path, *, streaming, **options):
        asked.append((path, options))
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    for streaming in (False, True):
        made = task("user/sums", config="main", revision="v1", streaming=streaming)
        assert (len(list(made.rows("train"))), len(list(made.rows("eval")))) == (8, 2)
        assert made.look(1).train[0]["answer"] == "0"
    assert asked[0] == ("user/sums", {"name": "main", "split": "train", "revision": "v1"})

    bad = datasets.Dataset.from_list([*ROWS, {"question": None, "answer": "1", "level": 0}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: bad.to_iterable_dataset())
    assert len(list(task("user/sums", streaming=True).rows("train"))) == 8
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: bad)
    assert "user/sums, row 11, column 'question': expected text" in message(task("user/sums"))

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    text = message(task("user/sums"))
    assert "user/sums: the hub cannot be reached" in text
    assert "Give a local path, or set HF_HUB_OFFLINE=1 with a cached copy." in text


def test_hub_faults_as_datasets_raises_them(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in message(task("rlattn-test/not-cached"))


@pytest.mark.parametrize("hole", [None, math.nan, math.inf])
def test_a_hole_in_a_column_of_numbers_is_null(tmp_path, hole):
    from pyarrow import parquet, table

    parquet.write_table(table({"question": ["1 + 1?"] * 3, "answer": [2.0, hole, 2.0]}), tmp_path / "a.parquet")
    assert "a.parquet, row 2, column 'answer': expected text or a number, found null" in message(
        task(tmp_path / "a.parquet")
    )


@pytest.mark.parametrize("answer", ["None", "Infinity", r"\infty", "0", "nano"])
def test_words_that_look_like_null_are_answers(tmp_path, answer):
    path = write(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": answer} for i in range(3)])
    assert task(path, eval_rows=1).rows("train")[0]["answer"] == answer


@given(answer=st.text(min_size=1).filter(str.strip))
def test_gold_scores_one_for_any_plain_answer(answer):
    from rlattn.formats.final_answer import gold_answer

    made, row = DatasetTask(path="x"), {"prompt": "q", "answer": gold_answer(answer)}
    assert made.verify(made.gold(row), row) == 1.0


@pytest.mark.skipif(not SAMPLES.exists(), reason="the shared samples are not here")
@pytest.mark.parametrize(
    ("name", "columns", "size"),
    [
        ("gsm8k_train_500.jsonl", {"prompt": "question"}, 500),
        ("gsm8k_model_solutions_200.jsonl", {"prompt": "question", "answer": "ground_truth"}, 200),
    ],
)
def test_gold_scores_one_on_real_rows(name, columns, size):
    made = DatasetTask(path=str(SAMPLES / name), columns=columns, eval_rows=0)
    rows = made.rows("train")
    assert len(rows) == size
    assert all(made.verify(made.gold(row), row) == 1.0 for row in rows)
    solutions = [json.loads(line)[columns.get("answer", "answer")] for line in Path(made.path).read_text().splitlines()]
    assert all(made.verify(solution, row) == 1.0 for solution, row in zip(solutions, rows, strict=True))
    assert all(made.verify("no answer", row) == 0.0 for row in rows)


def test_samples_are_what_their_script_makes(tmp_path):
    runpy.run_path(str(DATA / "make_samples.py"))["main"](tmp_path)
    made = sorted(tmp_path.iterdir())
    assert [file.name for file in made] == ["chat_sample.jsonl", "countdown_sample.jsonl", "word_problems.jsonl"]
    for file in made:
        assert file.read_bytes() == (DATA / file.name).read_bytes()


def test_gold_scores_one_on_the_samples():
    for name, columns in (("word_problems", COLUMNS), ("countdown_sample", {}), ("chat_sample", {})):
        made = DatasetTask(path=str(DATA / f"{name}.jsonl"), columns=columns, eval_rows=10)
        rows = [*made.rows("train"), *made.rows("eval")]
        assert all(made.verify(made.gold(row), row) == 1.0 for row in rows)
