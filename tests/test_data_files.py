"""Which files a data set is read from, and what is said of those that cannot be."""

import gzip

import pytest
from test_dataset import ROWS, message, task, write


def test_a_folder_has_splits(tmp_path):
    for i in range(2):
        write(tmp_path / f"train-0000{i}.parquet", ROWS[5 * i : 5 * i + 5])
    write(tmp_path / "test-00000.parquet", ROWS[:1])
    made = task(tmp_path, eval_split="test")
    assert [row["level"] for row in made.rows("train")] == [i % 3 for i in range(10)]
    assert len(made.rows("eval")) == 1
    text = message(task(tmp_path, split="dev"))
    assert "no file here is named for the split 'dev'. Set task.split or task.eval_split. Files: test-0000" in text
    write(tmp_path / "more.csv", ROWS)
    assert "holds both .csv and .parquet files. Name one file" in message(task(tmp_path))
    (tmp_path / "none").mkdir()
    assert "holds no .jsonl, .json, .csv, .parquet, .arrow file" in message(task(tmp_path / "none"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_files_may_be_packed(tmp_path, suffix):
    plain = write(tmp_path / f"train{suffix}", ROWS)
    packed = tmp_path / "packed" / f"train{suffix}.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (packed, packed.parent):
        assert task(path).rows("train") == task(plain).rows("train")
    packed.write_bytes(packed.read_bytes()[:-12])
    assert "is a damaged .gz file" in message(task(packed))
    (packed.parent / plain.name).write_bytes(plain.read_bytes())
    assert f"holds {plain.name} twice, packed and not" in message(task(packed.parent))


def test_what_save_to_disk_wrote(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "both")
    assert [row["level"] for row in task(tmp_path / "one", eval_rows=0).rows("train")] == [i % 3 for i in range(10)]
    assert len(list(task(tmp_path / "one", streaming=True).rows("train"))) == 8
    made = task(tmp_path / "both", eval_split="test")
    assert (len(made.rows("train")), len(made.rows("eval"))) == (10, 1)
    assert "is a single saved data set and has no split 'test'" in message(task(tmp_path / "one", split="test"))
    assert "has no split 'tset'. Did you mean 'test'?" in message(task(tmp_path / "both", split="tset"))
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "state.json: is damaged: KeyError" in message(task(tmp_path / "one"))


def test_a_folder_may_hold_what_tools_leave_there(tmp_path):
    write(tmp_path / "train-0.parquet", ROWS)
    for name in ("dataset_infos.json", ".cache/seen.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert len(task(tmp_path).rows("train")) == 8


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"question": "q", "answer": "1"}\n\n{"question": \n', "a.jsonl, line 3: bad JSON: Expecting"),
        ("a.json", '[{"question": "q",\n "answer": }]', "a.json, line 2: bad JSON: Expecting value."),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: bad JSON: nested too deeply."),
        ("a.jsonl", "\n", "the data set is empty: it has no rows. Check task.path"),
        ("a.json", "[]", "the data set is empty"),
        ("a.csv", "", "the data set is empty"),
        ("a.csv", "question,answer\n", "the data set is empty"),
        ("a.csv", "question,answer\nq,1,000\n", "a.csv, row 1: has more cells than the header."),
        ("a.csv", "question,answer\nq\n", "a.csv, row 1, column 'answer': expected text or a number, found null."),
        ("a.csv", "qestion,answer\nq,1\n", "has no column 'question' (task.columns.prompt). Did you mean 'qestion'?"),
        ("a.parquet", "no", "a.parquet: is no readable Parquet file: ArrowInvalid"),
        ("a.arrow", "no", "a.arrow: is no readable Arrow file: ArrowInvalid"),
        (
            "a.txt",
            "no",
            "a.txt: cannot read '.txt' files. Supported: .jsonl, .json, .csv, .parquet, .arrow, and .gz of",
        ),
        ("a.parquet.gz", "no", "a.parquet.gz: cannot read '.parquet.gz' files."),
        ("a.jsonl.gz", "no", "a.jsonl.gz: cannot be read: BadGzipFile"),
        (
            "a.json",
            '{"data": [{"question": "q"}],\n "n": 1}',
            "row 1: has no column 'question' (task.columns.prompt). Valid: data",
        ),
        ("a.jsonl", b"\xff\xfe", "a.jsonl: is not UTF-8 text."),
        (
            "a.csv",
            'question,answer\n"q,1\nr,2\n',
            "a.csv: is not readable as CSV: unexpected end of data. Is a quote left",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert problem in message(task(tmp_path / name))


def test_cells_may_be_long(tmp_path):
    path = write(tmp_path / "a.csv", [{"question": "q" * 200_000, "answer": "1"}])
    assert len(task(path, eval_rows=0).rows("train")[0]["prompt"]) == 200_000


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    assert "trian.jsonl: no such file. Did you mean 'train.jsonl'?" in message(task(tmp_path / "trian.jsonl"))
    assert "does not exist" in message(task(tmp_path / "gone" / "train.jsonl"))
