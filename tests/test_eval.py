"""`rlattn eval` as a user calls it, on tiny policies."""

import json
import subprocess

import pytest
from conftest import command_without
from evaluated import answers_in, evaluate, make_run, report_in
from forked import PYTHON
from opposites import Opposites
from test_inspect import save_model, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlattn.cli import main
from rlattn.statistics import mcnemar_exact, pass_at_k, wilson_interval

TASK = "task={python: 'opposites:Opposites', strange: 4}"
TRAINER = "trainer={max_steps: 1, max_completion_length: 8, per_device_eval_batch_size: 5}"


def warm(steps, noise=0.0):
    return f"policy.warm_start={{steps: {steps}, batch_size: 8, learning_rate: 5e-3, noise: {noise}}}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`less` and `more`: two policies that know a task badly and well; `other`: another task's."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "less", "quickstart", TASK, TRAINER, warm(8, noise=0.7))
    make_run(root / "more", "quickstart", TASK, TRAINER, warm(20))
    make_run(root / "other", "quickstart", TASK.replace("4", "3"), TRAINER, warm(1))
    return root


def test_a_run_is_asked_its_own_held_out_rows_greedily(runs, tmp_path, capsys):
    out = tmp_path / "out"
    evaluate(runs / "more", "--out", out)
    answers, figures = answers_in(out), report_in(out)["models"][0]["figures"]
    task = Opposites(strange=4)
    rows = task.rows("eval")
    assert [answer["prompt"] for answer in answers] == [row["prompt"] for row in rows]
    model = AutoModelForCausalLM.from_pretrained(runs / "more/model")
    tokenizer = AutoTokenizer.from_pretrained(runs / "more/model")
    for answer, row in zip(answers[:4], rows, strict=False):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_tensors="pt",
            return_dict=True,
        )  # fmt: skip
        written = model.generate(**ids, do_sample=False, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
        assert answer["completion"] == tokenizer.decode(written, skip_special_tokens=True)  # padding changes nothing
        assert answer["tokens"] == len(written)
    assert [answer["right"] for answer in answers] == [
        task.verify(answer["completion"], row) for answer, row in zip(answers, rows, strict=True)
    ]
    right = sum(answer["right"] for answer in answers)
    low, high = wilson_interval(right, 12)
    assert figures["pass@1"] == {"kind": "share", "value": right / 12, "low": low, "high": high, "count": 12}
    assert figures["mean_length"]["value"] == pytest.approx(sum(answer["tokens"] for answer in answers) / 12)
    assert figures["metrics"]["words"]["value"] == pytest.approx(
        sum(len(answer["completion"].split()) for answer in answers) / 12
    )
    assert figures["metrics"]["knows_hot"]["count"] == sum(row["word"] == "hot" for row in rows)
    assert figures["cut_share"] == sum(answer["cut"] for answer in answers) / 12
    shown = capsys.readouterr()
    assert f"{100 * right / 12:.1f} % ({100 * low:.1f} to {100 * high:.1f})" in shown.out
    assert "Next: " in shown.out
    assert "12/12" in shown.err


def test_several_answers_give_unbiased_pass_at_k_and_the_same_again(runs, tmp_path):
    for name in ("once", "again"):
        evaluate(runs / "less", "--limit", 6, "--samples", 4, "--k", "4,1", "--out", tmp_path / name)
    answers, report = answers_in(tmp_path / "once"), report_in(tmp_path / "once")
    assert report["settings"]["temperature"] == 1.0
    right = [[a["right"] for a in answers if a["row"] == row] for row in range(1, 7)]
    assert all(len(flags) == 4 for flags in right)
    assert len({answer["completion"] for answer in answers}) > 2
    for k in (1, 4):
        value = sum(pass_at_k(4, int(sum(flags)), k) for flags in right) / 6
        assert report["models"][0]["figures"][f"pass@{k}"]["value"] == pytest.approx(value)
    assert answers_in(tmp_path / "again") == answers


def test_a_paired_comparison(runs, tmp_path, capsys):
    evaluate(runs / "more", "--against", runs / "less", "--out", tmp_path / "out")
    answers, found = answers_in(tmp_path / "out"), report_in(tmp_path / "out")["comparison"]
    ones, others = answers[:12], answers[12:]
    assert [one["prompt"] for one in ones] == [other["prompt"] for other in others]
    pairs = [(one["right"], other["right"]) for one, other in zip(ones, others, strict=True)]
    assert found["only_first_right"] == pairs.count((1.0, 0.0)) > 0
    assert found["only_second_right"] == pairs.count((0.0, 1.0))
    assert found["mcnemar_p"] == mcnemar_exact(found["only_first_right"], found["only_second_right"])
    assert found["difference"]["value"] == pytest.approx(sum(one - other for one, other in pairs) / 12)
    assert found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]
    assert "McNemar's exact test p = " in capsys.readouterr().out


def test_the_warm_start_is_what_a_run_can_be_held_against(runs, tmp_path):
    evaluate(runs / "less", "--against", "tiny-reasoner", "--out", tmp_path / "out")
    found = report_in(tmp_path / "out")["comparison"]
    assert (found["only_first_right"], found["only_second_right"], found["mcnemar_p"]) == (0, 0, 1.0)


def test_data_of_the_users_and_several_samples_against_another(runs, tmp_path):
    rows = [{"ask": f"What is {n} + 1?", "answer": n + 1} for n in range(5)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (runs / "more/model", "task.columns.prompt=ask", "trainer.max_completion_length=20")
    evaluate(
        *arguments, "--data", file, "--samples", 2, "--against", runs / "less", "--limit", 4, "--out", tmp_path / "o"
    )
    report = report_in(tmp_path / "o")
    assert [answer["prompt"] for answer in answers_in(tmp_path / "o")[:8:2]] == [row["ask"] for row in rows[:4]]
    assert report["models"][0]["figures"]["problems"] == 4
    assert "mcnemar_p" not in report["comparison"]  # it is for one answer a problem
    assert {"value", "low", "high"} <= report["comparison"]["difference"].keys()


def test_it_is_written_beside_the_model_and_never_over_an_earlier_one(runs):
    for _ in range(2):
        evaluate(runs / "less", "--limit", 1)
    assert (runs / "less/eval/eval.json").is_file()
    assert (runs / "less/eval-2/eval.json").is_file()


def test_efforts_give_a_curve(runs, tmp_path, capsys):
    evaluate(runs / "less", "task.efforts=[0.5, 1.0]", "--limit", 4, "--out", tmp_path / "out")
    answers, figures = answers_in(tmp_path / "out"), report_in(tmp_path / "out")["models"][0]["figures"]
    assert [answer["effort"] for answer in answers] == [0.5, 1.0] * 4
    assert answers[0]["prompt"].startswith("Effort: 0.50\n")
    assert figures["problems"] == 4
    for at in figures["efforts"]:
        mine = [answer for answer in answers if answer["effort"] == at["effort"]]
        assert at["pass@1"]["value"] == sum(answer["right"] for answer in mine) / 4
        assert at["thought_tokens"]["value"] == sum(answer["thought_tokens"] for answer in mine) / 4
    assert "effort 0.50" in capsys.readouterr().out


def test_an_adapter_is_evaluated_over_its_base(runs, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(runs / "more/model")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(runs / "more/model").save_pretrained(tmp_path / "adapter")
    evaluate(tmp_path / "adapter", "--task", runs / "more/recipe.yaml", "--against", runs / "more", "--limit", 6)
    answers = answers_in(tmp_path / "adapter-eval")
    assert [a["completion"] for a in answers[:6]] != [a["completion"] for a in answers[6:]]


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tmp_path):
    save_tokenizer(save_model(tmp_path / "base"))
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Two and two?", "answer": "4"}\n')
    arguments = (tmp_path / "base", "trainer.max_completion_length=6")
    evaluate(*arguments, "--data", tmp_path / "mine.jsonl", "--out", tmp_path / "out")
    (answer,) = answers_in(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokenizer("Two and two?", return_tensors="pt")
    written = model.generate(**ids, do_sample=False, max_new_tokens=6)[0, ids["input_ids"].shape[1] :]
    assert answer["completion"] == tokenizer.decode(written, skip_special_tokens=True)
    assert answer["cut"] == (257 not in written.tolist())
    assert "policy.prompt_style=plain" in mistake(*arguments, "--task", "countdown_tiny", "--limit", 2)


def test_an_unfinished_run_is_evaluated_at_its_newest_checkpoint(runs, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("environment.json", "recipe.yaml"):
        (run / name).write_text((runs / "more" / name).read_text())
    assert mistake(run).endswith("goes on with it.\n")
    from rlattn.run_folder.checkpoints import PARTIAL, seal

    partial = run / "checkpoints" / PARTIAL / "checkpoint-7"
    partial.mkdir(parents=True)
    for file in (runs / "more/model").iterdir():
        (partial / file.name).write_bytes(file.read_bytes())
    (partial / "rank-0-of-1.pt").write_bytes(b"place")
    seal(run / "checkpoints", "checkpoint-7")
    capsys.readouterr()
    evaluate(run, "--limit", 2)
    assert report_in(run / "eval-checkpoint-7")["models"][0]["path"].endswith("checkpoint-7")
    assert "this is its checkpoint-7" in capsys.readouterr().out
    evaluate(run / "checkpoints/checkpoint-7", "--limit", 2)
    assert (run / "eval-checkpoint-7-2").is_dir()
    (run / "checkpoints/checkpoint-7/model.safetensors").write_bytes(b"torn")
    assert "is damaged" in mistake(run / "checkpoints/checkpoint-7")


def mistake(*arguments):
    command = [*PYTHON, "-m", "rlattn.cli", "eval", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    root = tmp_path_factory.mktemp("broken")
    (root / "empty.jsonl").write_text("")
    (root / "column.jsonl").write_text('{"question": "1 + 1?", "answer": 2}\n')
    (root / "ok.jsonl").write_text('{"prompt": "1 + 1?", "answer": 2}\n')
    save_tokenizer(save_model(root / "torn"))
    weights = root / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    save_tokenizer(save_model(root / "short", max_position_embeddings=12), "{{ messages[0]['content'] }}")
    (root / "thesis").mkdir()
    (root / "thesis" / "chapter.tex").write_text("precious")
    return root


# (arguments, what the message must hold); R is the folder of runs, B that of broken things
MISTAKES = [
    (("R/nonesuch",), ("MODEL", "no folder")),
    (("B/thesis",), ("MODEL", "no config.json")),
    (("B/ok.jsonl",), ("MODEL", "is a file")),
    (("R/less/model", "--task", "nonesuch"), ("nonesuch", "no such recipe")),
    (("tiny-reasoner",), ("--task", "is missing", "rlattn recipes")),
    (("tiny-reasoner", "--task", "countdown_4b"), ("MODEL", "this one makes none")),
    (("R/less", "--data", "B/none.jsonl"), ("none.jsonl", "no such file")),
    (("R/less", "--data", "B/empty.jsonl"), ("empty.jsonl", "is empty")),
    (("R/less", "--data", "B/column.jsonl"), ("has no column 'prompt'", "task.columns.prompt")),
    (("R/less", "--data", "B/ok.jsonl", "--task", "quickstart"), ("--data", "Keep one")),
    (("R/less", "--k", "4"), ("--k", "pass@4 needs 4 answers", "--samples 4")),
    (("R/less", "--samples", "4", "--k", "2,8"), ("--k", "--samples 8")),
    (("R/less", "--k", "one"), ("--k", "'one'")),
    (("R/less", "--k", "0"), ("--k", "from 1")),
    (("R/less", "--samples", "2", "--temperature", "0"), ("--temperature", "same answer")),
    (("R/less", "--against", "R/other"), ("--against", "another task", "task.strange", "--task")),
    (("R/less", "--against", "R/none"), ("--against", "no folder")),
    (("R/less", "--against", "B/torn"), ("--against", "no loadable weights", "model.safetensors")),
    (("R/less", "--against", "B/short"), ("exceed the context of", "/short, 12 tokens")),
    (("R/less", "--against", "nobody/nonesuch"), ("--against", "'nobody/nonesuch'", "network")),
    (("R/less", "--against", ""), ("--against", "name is empty")),
    (("",), ("MODEL", "name is empty")),
    (("torm",), ("MODEL", "Did you mean 'torn'?")),
    ((300 * "x",), ("MODEL", "no folder")),
    (("R/less", "--data", 300 * "x"), ("--data", "no file or folder")),
    (("R/less", "--out", 300 * "x"), ("--out", "no file or folder")),
    (("R/less", "--judge-model", "big"), ("--judge-model", "endpoint")),
    (("R/less", "--judge-key-env", "KEY"), ("--judge-key-env", "endpoint")),
    (("R/less", "--against", "R/less/model"), ("--against", "the same model")),
    (("R/less", "--out", "B/thesis"), ("--out", "not an empty folder")),
    (("R/less", "--out", "B/ok.jsonl/x"), ("--out", "cannot be made")),
    (("R/less", "task.strangr=3"), ("task.strangr", "Did you mean 'strange'")),
    (("R/less", "trainer.max_completion_length=5000"), ("max_completion_length", "exceed the context")),
    (("nobody/nonesuch", "--task", "countdown_4b", "task.eval_rows=2"), ("MODEL", "'nobody/nonesuch'", "network")),
    (("R/less/model", "--task", "questions_4b_lora"), ("task.style", "task.style=text")),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=str)
def test_a_mistake_gets_one_line_and_exit_code_2(runs, broken, monkeypatch, capsys, arguments, expected):
    def place(text):
        return text.replace("R/", f"{runs}/", 1).replace("B/", f"{broken}/", 1) if text[:2] in ("R/", "B/") else text

    monkeypatch.chdir(broken)
    before = sorted(runs.rglob("eval*")) + sorted(broken.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(place, arguments)])
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert written.err.startswith("rlattn: ")
    assert written.err.count("\n") == 1
    for part in expected:
        assert part in written.err
    assert sorted(runs.rglob("eval*")) + sorted(broken.iterdir()) == before


def test_a_mistake_in_the_arguments_needs_no_torch(runs, broken):
    arguments = ["eval", str(runs / "less"), "--data", str(broken / "empty.jsonl")]
    result = command_without({"torch", "transformers", "trl"}, *arguments)
    assert result.stdout == "2\n"
