"""Real runs, started as a user starts them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL, rlattn
from forked import PYTHON
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState
from wandb_file import records

from rlattn.run.callbacks import MetricsFile
from rlattn.run_folder.folder import lock_run
from rlattn.run_folder.jsonl import read_rows

RUN = "runs/quickstart"


def metrics(folder, run=RUN):
    return list(read_rows(folder / run / "metrics.jsonl"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    result = rlattn("train", "quickstart", *SMALL, "policy.supervised_control=true", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_run_folder_holds_what_it_promises(finished):
    folder, _ = finished
    run = folder / RUN
    names = {path.name for path in run.iterdir()}
    promised = "recipe.yaml environment.json metrics.jsonl samples.jsonl heads.jsonl tokens checkpoints model"
    assert names >= {*promised.split(), "summary.json", "report.html"}
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 3]
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    logged = {"reward", "rewards/accuracy/mean", "rewards/format/mean", "time/step"}
    assert all(logged <= row.keys() for row in rows[1:])
    assert json.loads((run / "environment.json").read_text())["packages"]["trl"]
    assert "training_args.bin" not in os.listdir(run / "model")


def test_the_summary_says_where_everything_is_and_what_is_next(finished):
    _, result = finished
    for part in ("held-out accuracy before", "after", "supervised", "model/", "report.html", "Next:"):
        assert part.rstrip("/") in result.stdout
    assert re.search(r"train \d/3: reward .*accuracy", result.stderr)


def test_the_model_loads_and_speaks(finished):
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / RUN / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / RUN / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 13 ?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_runs_own_samples_can_be_scored(finished):
    folder, _ = finished
    files = ("--completions", f"{RUN}/samples.jsonl", "--out", "scores.jsonl")
    result = rlattn("score", f"{RUN}/recipe.yaml", *files, cwd=folder)
    assert result.returncode == 0, result.stderr
    scored = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    samples = list(read_rows(folder / RUN / "samples.jsonl"))
    assert [row["accuracy"] for row in scored] == [sample["score"] for sample in samples]
    assert not any(row["failed"] for row in scored)


OWN = """
class Picky:
    def score(self, rollout):
        if sum(rollout.completion_ids) % 3 == 0:
            raise ValueError(rollout.row["depth"])
        return 1.0
"""


def test_where_a_reward_fails_is_found_replayed_and_marked(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    picky = ("rewards.picky.python=own:Picky", "rewards.max_failed_share=1", "trainer.max_steps=1")
    result = rlattn("train", "quickstart", *SMALL, *picky, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first = next(read_rows(tmp_path / RUN / "failures.jsonl"))
    assert first["problem"] == "KeyError: 'depth' (own.py, line 5)" and first["problem"] in result.stderr
    assert first["prompt"][-1]["role"] == "user" and first["row"]["answer"]
    again = rlattn("score", f"{RUN}/recipe.yaml", "--completions", f"{RUN}/failures.jsonl", cwd=tmp_path)
    said = " ".join(again.stdout.split())
    assert f"'picky' fails first with: {first['problem']}: the line has no column 'depth' (it has terms, answer" in said
    tokens = pq.read_table(tmp_path / RUN / "tokens/step-000001.parquet").to_pandas().groupby("rollout")
    failed = tokens.token_id.sum() % 3 == 0
    assert (tokens["neutral/picky"].first() == failed).all() and not tokens["neutral/accuracy"].any().any()


def test_the_same_command_again_says_that_it_is_complete(finished):
    folder, _ = finished
    before = (folder / RUN / "metrics.jsonl").read_text()
    result = rlattn("train", "quickstart", *SMALL, "policy.supervised_control=true", cwd=folder)
    assert result.returncode == 0
    assert "complete" in result.stdout
    assert (folder / RUN / "metrics.jsonl").read_text() == before


def test_an_interrupted_supervised_control_is_made_up(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / RUN / "summary.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in whole.items() if name != "supervised_control"}))
    result = rlattn("train", "quickstart", *SMALL, "policy.supervised_control=true", cwd=tmp_path)
    assert result.returncode == 0 and "supervised training on" in result.stdout, result.stderr
    of_session = ("seconds", "start_step")
    again = json.loads(file.read_text())
    assert {k: v for k, v in again.items() if k not in of_session} == {
        k: v for k, v in whole.items() if k not in of_session
    }
    assert (tmp_path / RUN / "metrics.jsonl").read_text() == (finished[0] / RUN / "metrics.jsonl").read_text()


def test_another_recipe_is_refused_the_folder(finished):
    folder, _ = finished
    result = rlattn("train", "quickstart", *SMALL, "policy.supervised_control=true", "seed=5", cwd=folder)
    assert result.returncode == 2
    assert "seed: 0 there, 5 here" in result.stderr
    assert "resume.allow_changed='[seed]'" in result.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    result = rlattn("train", "quickstart", *SMALL, "output_dir=thesis", cwd=tmp_path)
    assert result.returncode == 2
    assert "holds no run" in result.stderr


def test_a_folder_with_a_recipe_of_the_users_is_no_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# mine\nname: mine\n")
    (tmp_path / "metrics.jsonl").write_text("precious")
    result = rlattn("train", "quickstart", *SMALL, "output_dir=.", cwd=tmp_path)
    assert result.returncode == 2
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_a_second_process_in_one_folder_is_refused(finished, tmp_path):
    folder, _ = finished
    lock = lock_run(folder / RUN)
    longer = ("policy.supervised_control=true", "trainer.max_steps=9", "resume.allow_changed=[trainer.max_steps]")
    result = rlattn("train", "quickstart", *SMALL, *longer, cwd=folder)
    lock.release()
    assert result.returncode == 2
    assert "is being trained by another process" in result.stderr


def test_same_recipe_and_seed_same_numbers_another_seed_others(finished, tmp_path):
    folder, _ = finished
    assert rlattn("train", "quickstart", *SMALL, cwd=tmp_path).returncode == 0
    assert rlattn("train", "quickstart", *SMALL, "seed=1", "output_dir=other", cwd=tmp_path).returncode == 0
    timed = re.compile(r"time|seconds")
    first, again, other = (
        [{k: v for k, v in row.items() if not timed.search(k)} for row in metrics(where, run)]
        for where, run in ((folder, RUN), (tmp_path, RUN), (tmp_path, "other"))
    )
    assert first == again
    assert first != other
    weights = [load_file(where / RUN / "model" / "model.safetensors") for where in (folder, tmp_path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(finished, tmp_path):
    rlattn("train", "quickstart", *SMALL, cwd=tmp_path)
    longer = ("trainer.max_steps=5", "resume.allow_changed=[trainer.max_steps]")
    result = rlattn("train", "quickstart", *SMALL, *longer, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "continuing from" in result.stdout
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    arguments = [*SMALL, "trainer.max_steps=8", "output_dir=run"]
    process = subprocess.Popen(
        [*PYTHON, "-m", "rlattn.cli", "train", "quickstart", *arguments],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(1200):
        if (tmp_path / "run/checkpoints/checkpoint-4/trainer_state.json").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = rlattn("train", "quickstart", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "continuing from" in result.stdout
    assert [row["step"] for row in metrics(tmp_path, "run")] == list(range(9))


def test_two_ranks_train_under_torchrun(tmp_path):
    credit = ("credit={kind: coupled_rhythm}", "attention={horizon: [2, 10]}")
    batch = "trainer.per_device_train_batch_size=6"  # with groups of 4, one of them straddles the ranks
    result = rlattn("train", "quickstart", *SMALL, batch, *credit, cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["eval/rows"] == 8
    assert all(row["credit/mean"] > 1 for row in rows[1:])
    assert json.loads((tmp_path / RUN / "environment.json").read_text())["world_size"] == 2
    assert result.stdout.count("held-out accuracy before") == 1


def test_a_mistake_under_torchrun_is_said_once(tmp_path):
    result = rlattn("train", "quickstart", *SMALL, "trainer.num_generations=5", cwd=tmp_path, ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("rlattn: trainer.num_generations") == 1


def test_a_process_group_that_cannot_form_is_not_told_as_a_mistake_in_the_recipe(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        found |= {"MASTER_PORT": str(taken.getsockname()[1])}
        program = (
            "from pathlib import Path\nfrom rlattn.recipe.load import load_recipe\n"
            "from rlattn.run.build import grpo_config\n"
            "grpo_config(load_recipe('quickstart', []), Path('run'), {})"
        )
        result = subprocess.run(
            [*PYTHON, "-c", program], cwd=tmp_path, env={**os.environ, **found}, capture_output=True, text=True
        )
    assert "EADDRINUSE" in result.stderr and "UserError" not in result.stderr


def test_dry_run_shows_the_prompt_and_what_is_wrong_and_leaves_nothing(tmp_path):
    body = (
        "class Negative:\n    def __call__(self, signals):\n        return Credit(weights_BN=signals.mask_BN * -1.0)\n"
    )
    (tmp_path / "my_rules.py").write_text(f"from rlattn.types import Credit\n\n\n{body}")
    rule = "credit={python: 'my_rules:Negative'}"
    result = rlattn("train", "quickstart", *SMALL, rule, "trainer.logging_steps=3", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"warning: In \d+ rollouts the credit rule failed, or gave negative", result.stdout)
    assert "<|assistant|>" in result.stdout
    assert re.search(r"3 steps would take about \d", result.stdout)
    assert {path.name for path in tmp_path.iterdir()} <= {"my_rules.py", "__pycache__"}


def test_a_line_for_several_steps_has_the_mean_of_their_seconds(tmp_path):
    lines, state = MetricsFile(tmp_path), TrainerState(is_world_process_zero=True)
    for seconds in (0.2, 0.0):
        lines.on_step_begin(None, state, None)
        time.sleep(seconds)
        state.global_step += 1
        lines.on_step_end(None, state, None)
    lines.on_log(None, state, None, logs={"reward": 1.0})
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["step"] == 2 and row["time/step"] >= 0.1


def test_lora_trains_and_exports_merged(finished, tmp_path):
    folder, _ = finished
    base = folder / RUN / "model"
    recipe = (f"policy={{path: {base}, lora: {{r: 4}}}}", *SMALL[2:], "output_dir=run")
    result = rlattn("train", "quickstart", *recipe, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/model/adapter_config.json").is_file()
    assert rlattn("export", "run", "--merge", "--out", "merged", cwd=tmp_path).returncode == 0
    merged, before = (load_file(where / "model.safetensors") for where in (tmp_path / "merged", base))
    changed = [name for name in before if name in merged and not torch.equal(before[name], merged[name])]
    assert any("proj" in name for name in changed)
    assert not any("norm" in name for name in changed)


def test_export_copies_full_weights_and_refuses_what_it_cannot_do(finished, tmp_path):
    folder, _ = finished
    out = str(tmp_path / "out")
    assert rlattn("export", RUN, "--out", out, cwd=folder).returncode == 0
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 1e6
    for arguments, message in (
        (("export", RUN, "--out", out), "exists"),
        (("export", RUN, "--merge", "--out", out + "2"), "no adapter"),
        (("export", str(tmp_path)), "no run folder"),
        (("export", RUN, "--push", "nobody/nothing", "--out", out + "3"), "could not be pushed"),
    ):
        result = rlattn(*arguments, cwd=folder)
        assert result.returncode == 2, result.stdout
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_stop_strings_end_completions(finished, tmp_path):
    folder, _ = finished
    stop = ("policy.stop_strings=[':']", "trainer.max_steps=1", "output_dir=run")
    assert rlattn("train", "quickstart", *SMALL, *stop, cwd=tmp_path).returncode == 0
    row = metrics(tmp_path, "run")[1]
    assert row["completions/mean_length"] < metrics(folder)[1]["completions/mean_length"] / 2


def test_trackers_receive_the_run(tmp_path):
    arguments = ("tracking={report_to: [wandb, tensorboard, trackio], project: mine, tags: [a]}", "output_dir=run")
    arguments += ("trainer.log_completions=true",)
    result = rlattn("train", "quickstart", *SMALL, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    written = list(records(file))
    about = next(record.run for record in written if record.HasField("run"))
    assert (about.project, list(about.tags), about.display_name) == ("mine", ["a"], "quickstart")
    items = [item for record in written if record.HasField("history") for item in record.history.item]
    history = [(item.key or "/".join(item.nested_key), item.value_json) for item in items]
    for name in ("reward", "rewards/accuracy/mean", "credit/mean"):
        seen = [json.loads(value) for key, value in history if key == f"train/{name}"]
        assert seen == pytest.approx([row[name] for row in metrics(tmp_path, "run")[1:]])
    tables = [json.loads(table.read_text()) for table in file.parent.glob("files/media/table/completions_*.json")]
    assert {row[0] for table in tables for row in table["data"]} == {1, 2, 3}  # every step is kept
    tables = [json.loads(table.read_text()) for table in file.parent.glob("files/media/table/tokens_*.json")]
    steps = {int(path.stem.removeprefix("step-")) for path in (tmp_path / "run/tokens").iterdir()}
    assert {row[0] for table in tables for row in table["data"]} == steps >= {1, 3}
    assert {"weight", "waad", "fai", "token"} <= set(tables[0]["columns"])
    views = [view.read_text() for view in file.parent.glob("files/media/html/token_view_*.html")]
    assert len(views) == len(steps) and all("Content-Security-Policy" in view for view in views)
    config = {item.key: item.value_json for record in written for item in record.run.config.update}
    config |= {item.key: item.value_json for record in written for item in record.config.update}
    assert json.loads(config["recipe"])["task"]["kind"] == "arithmetic"
    assert list((tmp_path / "run/tensorboard").rglob("events.out.*"))
    assert list(Path(os.environ["TRACKIO_DIR"]).rglob("mine*"))
    longer = ("trainer.max_steps=4", "resume.allow_changed=[trainer.max_steps]")
    again = rlattn("train", "quickstart", *SMALL, *arguments, *longer, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    folders = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2 and {folder.name.rpartition("-")[2] for folder in folders} == {about.run_id}
    assert f"wandb sync --id {about.run_id} {folders[0]} {folders[1]}" in again.stdout


def test_a_tasks_own_metrics_are_logged_in_training_and_evaluation(tmp_path):
    (tmp_path / "wordy.py").write_text(
        "from rlattn.tasks import Arithmetic\n"
        "class Wordy(Arithmetic):\n"
        "    def metrics(self, completion, row): return {'words': float(len(completion.split()))}\n"
    )
    task = "task={python: 'wordy:Wordy', terms: [3, 3], eval_rows: 8}"
    result = rlattn("train", "quickstart", *SMALL, task, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path)
    assert rows[0]["eval/words"] > 1
    assert all(row["task/words"] > 1 for row in rows[1:])


def test_zero3_on_two_ranks_gives_the_credit_of_one_rank(tmp_path):
    greedy = "trainer.top_k=1"  # rollouts do not depend on a rank's random numbers
    credit = ("credit={kind: coupled_rhythm}", "attention={horizon: [2, 10]}", "trainer.max_steps=1", greedy)
    whole = rlattn("train", "quickstart", *SMALL, *credit, "output_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    spread = ("trainer.deepspeed=launch/deepspeed/zero3.json", "output_dir=spread")
    spread += ("trainer.per_device_train_batch_size=4",)
    result = rlattn("train", "quickstart", *SMALL, *credit, *spread, cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = ({k: v for k, v in metrics(tmp_path, run)[1].items() if "credit/" in k} for run in ("whole", "spread"))
    assert one["credit/mean"] > 1 and two == pytest.approx(one, rel=1e-3)
    # the evaluation is greedy: the same policy answers alike, its rows spread over ranks or not
    assert metrics(tmp_path, "spread")[0]["eval/accuracy"] == metrics(tmp_path, "whole")[0]["eval/accuracy"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "spread/model").num_parameters() > 1e6
