"""Fifty broken recipes: each ends in exit code 2 and one message that says what, where and how to mend it."""

import json
import subprocess
import sys
import time

import pytest

from rlattn.cli import main
from rlattn.errors import UserError
from rlattn.preflight.check import check
from rlattn.preflight.data_rows import look_at_data
from rlattn.recipe.build import build_task
from rlattn.recipe.load import load_recipe

GOOD = """
name: broken
policy: {path: tiny-reasoner}
task: {kind: arithmetic}
rewards: {accuracy: {weight: 1.0}}
trainer: {max_steps: 10, per_device_train_batch_size: 8, num_generations: 8}
"""
LONG = "x" * 300
DATASET = "task={kind: dataset, path: rows.jsonl, eval_rows: 1}"

# (what the user wrote: overrides, or a whole recipe; what the message must hold)
BROKEN: list[tuple[list[str] | str, list[str]]] = [
    (["trainer.lerning_rate=1"], ["trainer.lerning_rate", "unknown key", "'learning_rate'"]),
    (["learning_rate=1e-6"], ["learning_rate", "trainer.learning_rate"]),
    (["trainer.lora={r: 8}"], ["trainer.lora", "policy.lora"]),
    (["policy.temperature=1"], ["policy.temperature", "trainer.temperature"]),
    (["trainer.seed=1"], ["trainer.seed", "lives at seed"]),
    (["trainer.output_dir=x"], ["lives at output_dir"]),
    (["trainer.run_name=x"], ["lives at name"]),
    (["trainer.report_to=wandb"], ["lives at tracking.report_to"]),
    (["trainer.save_only_model=true"], ["would make going on inexact", "Remove the key"]),
    (["trainer.ignore_data_skip=true"], ["would make going on inexact"]),
    (["trainer.reward_weights=[1]"], ["lives at rewards.<name>.weight"]),
    (["trainer.multi_objective_aggregation=normalize_then_sum"], ["lives at rewards.combine"]),
    (["trainer.save_total_limit=2"], ["lives at resume.keep_last"]),
    (["trainer.enable_jit_checkpoint=true"], ["is not needed: SIGTERM and SIGUSR1 save"]),
    (["resume.grace_seconds=0"], ["resume.grace_seconds"]),
    (["trainer.trust_remote_code=true"], ["never executes code"]),
    (["trainer.resume_from_checkpoint=x"], ["the same command continues"]),
    (["trainer.max_steps=ten"], ["trainer.max_steps", "whole number", "'ten'"]),
    (["trainer.max_steps=1.5"], ["trainer.max_steps", "whole number"]),
    (["trainer.learning_rate=fast"], ["trainer.learning_rate", "number", "'fast'"]),
    (["trainer.learning_rate='1e-6'"], ["trainer.learning_rate", "number"]),
    (["trainer.learning_rate=-1"], ["trainer.learning_rate", "0"]),
    (["trainer.num_generations=1"], ["trainer.num_generations", "2"]),
    (["trainer.per_device_train_batch_size=0"], ["trainer.per_device_train_batch_size", "1"]),
    (["trainer.temperature=0"], ["trainer.temperature", "0"]),
    (["trainer.bf16=3"], ["trainer.bf16"]),
    (["trainer.generation_kwargs={top_k: 2020-01-01}"], ["top_k", "date", "quotes"]),
    (["trainer.generation_kwargs={1: 2}"], ["must be text, got 1"]),
    (
        ["rewards.format.requires=accuracy", "rewards.accuracy.requires=format"],
        ["requires another reward itself", "accuracy"],
    ),
    (["rewards.accuracy=null", "rewards.format=null"], ["rewards", "at least one reward"]),
    (["rewards.format.requires=acuracy"], ["rewards.format.requires", "'accuracy'"]),
    (["rewards.accuracy.timout=3"], ["rewards.accuracy.timout", "'timeout'"]),
    (["rewards.combne=sum"], ["rewards.combne", "'combine'"]),
    (["rewards.accuracy.weight=1e30"], ["rewards.accuracy.weight"]),
    (["rewards.accuracy.timeout=0"], ["rewards.accuracy.timeout"]),
    (["rewards.max_failed_share=2"], ["rewards.max_failed_share"]),
    (["credit={kind: coupled_rhythm, amplification: 1e30}"], ["credit.amplification", "100"]),
    (["credit={kind: coupled_rhythm, sgn: both}"], ["credit.sgn", "'sign'"]),
    (["credit={kind: coupled_rhythm, lookback: 1000}"], ["credit.lookback", "1 to 100"]),
    (["credit={kind: coupled_rhythm, amplification: true}"], ["credit.amplification", "a number", "true"]),
    (["credit={kind: uniform, warmup: true}"], ["credit.warmup", "a number", "true"]),
    (["credit=coupled_rhythm"], ["credit: expected a section", "{kind: coupled_rhythm}"]),
    (["credit={kind: local_chunk, select: botom}"], ["credit.select", "Did you mean 'bottom'"]),
    (["credit={kind: shuffled, of: coupled_rythm}"], ["credit.of", "Did you mean 'coupled_rhythm'"]),
    ([f"credit={{kind: local_chunk, select: {'x' * 5000}}}"], ["credit.select", "..."]),
    (["attention.layers=[2, true]"], ["attention.layers.1", "a number", "true"]),
    (["attention.layers=[1, 1]"], ["attention.layers: expected every layer once"]),
    (["attention.horizon=[1, 2, 3]"], ["attention.horizon", "a list of 2"]),
    ([f"attention.window={'9' * 4200}"], ["attention.window: expected 1 to", "..."]),
    (["credit={kind: uniform}", "attention.backend=triton", "trainer.use_cpu=true"], ["attention.backend", "use_cpu"]),
    (["credit={kind: uniform}", "policy.path=bloom", DATASET], ["credit", "(bloom)", "queries and keys"]),
    (["credit={kind: coupled_rhythm}", "attention.layers=[99]"], ["attention.layers", "99", "[0, 1, 2]"]),
    (["attention.horizon=[10, 1000000000000000000000000]"], ["attention", "10,000,000"]),
    (["trainer.loss_type=grop"], ["trainer.loss_type", "'grpo'"]),
    (["trainer.importance_sampling_level=sentence"], ["trainer.importance_sampling_level", "'sequence'"]),
    (["trainer.lr_scheduler_type=cosin"], ["trainer.lr_scheduler_type", "'cosine'"]),
    (["trainer.num_generations=3"], ["trainer.num_generations", "whole groups of 3", "nearest: 6 or 9"]),
    (["trainer.generation_batch_size=12", "trainer.num_generations=4"], ["not a multiple", "Nearest: 16"]),
    (["trainer.generation_batch_size=8", "trainer.steps_per_generation=2"], ["Keep one"]),
    (["trainer.logging_steps=100"], ["trainer.logging_steps", "max_steps"]),
    (["trainer.eval_steps=0.1"], ["trainer.eval_steps", "number of steps"]),
    (["trainer.eval_strategy=epoch"], ["trainer.eval_strategy", "eval_steps"]),
    (["trainer.save_strategy=best"], ["trainer.save_strategy"]),
    (["trainer.bf16=true", "trainer.fp16=true"], ["trainer.bf16", "fp16"]),
    ([f"output_dir={'x' * 300}"], ["output_dir", "too long"]),
    (["trainer.deepspeed=launch/deepspeed/zero4.json"], ["trainer.deepspeed", "no file", "zero3.json"]),
    (
        ["policy.stop_strings=[x]", "trainer.mask_truncated_completions=true"],
        ["policy.stop_strings", "truncated", "Drop"],
    ),
    (
        ["policy.stop_strings=[x]", "trainer.use_transformers_continuous_batching=true"],
        ["policy.stop_strings", "trainer.use_transformers_continuous_batching", "Drop"],
    ),
    (
        ["policy.lora.r=8", "trainer.use_vllm=true", "trainer.fsdp=full_shard", "trainer.fsdp_config={version: 1}"],
        ["trainer.fsdp_config", "FSDP 1", "version: 2"],
    ),
    (["policy.dtype=float64"], ["policy.dtype", "float32, bfloat16, float16", "'float64'"]),
    (["policy.lora.rank=8"], ["policy.lora.rank", "unknown key", "r,"]),
    (["policy.lora={target_modules: [q_proj, model.lm_head]}"], ["policy.lora.target_modules", "'lm_head'", "Leave"]),
    (["policy={path: me/tiny, revision: v1}", "trainer.use_vllm=true"], ["policy.revision", "hf download me/tiny"]),
    (["trainer.optim=galore_adamw"], ["trainer.optim_target_modules", "galore_adamw", "all-linear"]),
    (["policy.lora.r=0"], ["policy.lora.r", "greater than or equal to 1"]),
    (["policy.path=./nowhere"], ["policy.path", "no folder './nowhere'"]),
    (["policy.path=nobody/nothing"], ["policy.path", "nobody/nothing", "hub"]),
    (["policy.prompt_style=plain"], ["policy.prompt_style", "chat"]),
    (["policy=tiny-reasoner"], ["policy", "section"]),
    (["task.kind=arithmatic"], ["task.kind", "unknown task 'arithmatic'", "'arithmetic'"]),
    (["task.trms=[3, 4]"], ["task.trms", "unknown option of Arithmetic", "'terms'"]),
    (["task.terms=[0, 99]"], ["task", "terms"]),
    (["task.terms=many"], ["task.terms", "'many'"]),
    (["task={}"], ["task.kind", "is required"]),
    (["task.python=nothing"], ["task.python", "module:Class"]),
    (["task={python: no_such_module:Task}"], ["task.python", "no module 'no_such_module'"]),
    (["task={python: json:JSONEncodr}"], ["task.python", "no class", "'JSONEncoder'"]),
    (["task={python: json:JSONEncoder}"], ["task.python", "lacks the method"]),
    (["credit={kind: coupled_rythm}"], ["credit.kind", "'coupled_rhythm'"]),
    (["credit={}"], ["credit.kind", "is required"]),
    (["credit={kind: global_anchor, top_fraction: 0}"], ["credit.top_fraction", "more than 0"]),
    (["credit={kind: global_anchor, topfraction: 0.4}"], ["credit.topfraction", "'top_fraction'"]),
    (["credit={kind: uniform, sign: plus}"], ["credit.sign", "both, positive, negative"]),
    (["credit={kind: uniform, warmup: 0.8, decay: 0.8}"], ["credit", "warmup"]),
    (["credit={kind: uniform}", "trainer.importance_sampling_level=sequence"], ["importance_sampling_level", "token"]),
    (["attention={horizon: [100, 10]}"], ["attention", "horizon"]),
    (["attention={windw: 3}"], ["attention.windw", "'window'"]),
    ([DATASET], ["policy.path", "tiny-reasoner", "trace()"]),
    (["rewards={}"], ["rewards", "at least one"]),
    (["rewards={acuracy: {}}"], ["rewards.acuracy", "unknown reward", "'accuracy'"]),
    (["rewards.accuracy.weight=heavy"], ["rewards.accuracy.weight", "number"]),
    (["rewards.accuracy.weight=.nan"], ["rewards.accuracy.weight", "finite"]),
    (["rewards.format.tags=[]"], ["rewards.format", "at least one tag"]),
    (["rewards.combine=product"], ["rewards.combine", "sum, decoupled"]),
    (["tracking.report_to=[wandbb]"], ["tracking.report_to", "'wandb'"]),
    (["resume.keep_last=0"], ["resume.keep_last", "greater than or equal to 1"]),
    (["name=12"], ["name", "quotes"]),
    (["name='a/b'"], ["name", "letters"]),
    (["seed=-1"], ["seed"]),
    (["trainer.max_steps"], ["not an override", "key.path=value"]),
    (["name.x=1"], ["name is a value, not a section"]),
    ("name: [unclosed", ["not readable as YAML", "line"]),
    ("- a\n- list", ["expected a recipe"]),
    ("", ["expected a recipe"]),
    ("name: a\nname: b", ["not readable as YAML", "duplicate"]),
    ("\tname: tab", ["not readable as YAML"]),
    ("name: x", ["policy", "is required"]),
    ("name: x\nreward: {accuracy: {}}", ["reward: unknown key", "'rewards'"]),
    (["task={kind: dataset, path: missing.jsonl}"], ["task.path", "no file 'missing.jsonl'"]),
    (["task={kind: dataset}"], ["task.path", "is required"]),
    ([f"{DATASET[:-1]}, columns: {{prompt: question, answer: answer}}}}"], ["question", "prompt"]),
    (["task={kind: dataset, path: null_row.jsonl, eval_rows: 1}"], ["row 2"]),
    (["task={kind: dataset, path: number_row.jsonl, eval_rows: 1}"], ["row 2", "text"]),
    (["task={kind: dataset, path: torn.jsonl, eval_rows: 1}"], ["line 2"]),
    (["task={kind: dataset, path: half.jsonl, eval_rows: 1}"], ["line 2", "surrogate"]),
    (["task={kind: dataset, path: empty.jsonl}"], ["empty"]),
    (["task={kind: dataset, path: rows.jsonl, eval_rows: 99}"], ["eval_rows", "99"]),
    (["task.rl_rows=1", "trainer.per_device_train_batch_size=16"], ["training rows are 1", "takes 2", "no step"]),
    (["task.rl_rows=1", "trainer.steps_per_generation=2"], ["training rows are 1", "takes 2"]),
    ([DATASET[:-2] + "2}", "trainer.per_device_train_batch_size=16"], ["training rows are 1", "takes 2"]),
    (
        [DATASET[:-1] + ", streaming: true, rl_rows: 1}", "trainer.per_device_train_batch_size=16"],
        ["training rows are 1", "takes 2"],
    ),
    (["task.overlong=cut"], ["task.overlong", "refuse, drop", "'cut'"]),
    (["task={kind: dataset, path: rows.jsonl, eval_rows: 1, streaming: true}", "trainer.max_steps=-1"], ["max_steps"]),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    row = '{"prompt": "1 + 1", "answer": "2"}\n'
    (tmp_path / "rows.jsonl").write_text("".join(row.replace("1 +", f"{i} +") for i in range(3)))
    (tmp_path / "null_row.jsonl").write_text(row + '{"prompt": null, "answer": "2"}\n' + row)
    (tmp_path / "number_row.jsonl").write_text(row + '{"prompt": 7, "answer": "2"}\n' + row)
    (tmp_path / "torn.jsonl").write_text(row + '{"prompt": "1 +')
    (tmp_path / "half.jsonl").write_text(row + '{"prompt": "\\ud800", "answer": "2"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bloom").mkdir()
    (tmp_path / "bloom" / "config.json").write_text('{"model_type": "bloom", "num_hidden_layers": 2}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("broken", "expected"), BROKEN, ids=lambda value: str(value)[:60])
def test_one_message_says_what_where_and_how(broken, expected, folder):
    file = folder / "broken.yaml"
    file.write_text(broken if isinstance(broken, str) else GOOD)
    with pytest.raises(UserError) as caught:
        check(load_recipe(file, [] if isinstance(broken, str) else broken), ranks=1, gpu_memory=None)
    message = str(caught.value)
    for part in expected:
        assert part in message
    assert "\n" not in message
    assert len(message) < 500


def test_there_are_fifty():
    assert len(BROKEN) >= 50


def test_the_nearest_batch_is_one_that_all_ranks_can_share(folder):
    (folder / "broken.yaml").write_text(GOOD)
    batch = "trainer={per_device_train_batch_size: 128, num_generations: 7, max_steps: 10}"
    with pytest.raises(UserError, match=r"a multiple of 56 \(nearest: 1008 or 1064\)"):
        check(load_recipe("broken.yaml", [batch]), ranks=8, gpu_memory=None)


def test_a_generation_batch_is_counted_over_all_ranks(folder):
    recipe = folder / "broken.yaml"
    recipe.write_text(GOOD)
    check(load_recipe(recipe, ["task.rl_rows=1"]), ranks=1, gpu_memory=None)
    with pytest.raises(UserError, match=r"training rows are 1, and one generation batch on 2 ranks takes 2"):
        check(load_recipe(recipe, ["task.rl_rows=1"]), ranks=2, gpu_memory=None)


@pytest.mark.parametrize(
    ("line", "shared", "warned"),
    [('"0 + 1"', 1, True), ('[{"role": "user", "content": "0 + 1"}]', 0, False)],
)
def test_held_out_prompts_that_are_trained_on_are_counted(line, shared, warned, folder):
    (folder / "other.jsonl").write_text(
        f'{{"prompt": {line}, "answer": "1"}}\n{{"prompt": "new", "answer": "1"}}\n' * 2
    )
    (folder / "broken.yaml").write_text(GOOD)
    for streaming in ("false", "true"):
        data = f"task={{kind: dataset, path: rows.jsonl, eval_path: other.jsonl, streaming: {streaming}}}"
        recipe = load_recipe("broken.yaml", [data])
        warnings = look_at_data(recipe, build_task(recipe), ranks=1).warnings
        assert any(f"{shared} of 2 held-out prompts are training prompts too" in text for text in warnings) == warned


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("index", [0, 13, 25, 42])
def test_exit_code_2_no_traceback_and_at_once(command, index, folder):
    (folder / "broken.yaml").write_text(GOOD)
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "rlattn.cli", command, "broken.yaml", *BROKEN[index][0]],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "Traceback" not in result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for part in BROKEN[index][1]:
        assert part in result.stderr
    assert time.monotonic() - began < 30, "it is refused before anything heavy is imported"
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", LONG],
        ["check", "quickstart", f"task={{kind: dataset, path: {LONG}}}"],
        ["check", "quickstart", "policy.warm_start=null", "policy.supervised_control=false", f"policy.path=./{LONG}/x"],
        ["eval", LONG],
        ["report", LONG],
        ["compare", LONG, LONG],
    ],
)
def test_a_name_that_no_file_system_takes_is_a_users_mistake(arguments, capsys, folder):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_missing_recipe_names_the_nearest(folder):
    with pytest.raises(UserError, match=r"no such recipe. Did you mean 'quickstart'\?"):
        load_recipe("recipes/quikstart.yaml")


PLUGINS = {
    "exits": "import sys\nsys.exit(0)",
    "raises": "raise RuntimeError('two\\nlines')",
    "angry": "class R:\n    def __init__(self): raise SystemExit(0)\n    def score(self, rollout): return 1",
    "function": "def R(rollout): return 1",
    "narrow": "class R:\n    def score(self): return 1",
    "later": "class R:\n    async def score(self, rollout): return 1",
}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_cannot_end_the_tool_in_silence(name, folder, monkeypatch):
    (folder / f"plugin_{name}.py").write_text(PLUGINS[name])
    monkeypatch.syspath_prepend(folder)
    (folder / "broken.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"rewards\.x") as caught:
        check(load_recipe("broken.yaml", [f"rewards.x={{python: 'plugin_{name}:R'}}"]), ranks=1, gpu_memory=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", "gives no rows|fails"),
        ("raise KeyError('x')", "fails: KeyError"),
        ("return []", "no eval rows"),
        ("return [{'question': 'a'}]", "no 'prompt'"),
        ("return [{'prompt': 3}]", "neither text nor chat messages"),
        ("return [{'prompt': [{'role': 'assistant', 'content': 'a'}]}]", "ends in a message of the assistant's"),
        ("return 'abc'", "no rows|no dict"),
    ],
)
def test_a_task_of_ones_own_that_gives_no_good_rows(body, expected, folder, monkeypatch):
    name = f"task_{abs(hash(body))}"
    (folder / f"{name}.py").write_text(
        f"class T:\n    def rows(self, split): {body}\n"
        "    def verify(self, completion, row): return 1.0\n    def gold(self, row): return ''\n"
    )
    monkeypatch.syspath_prepend(folder)
    (folder / "broken.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=expected):
        check(load_recipe("broken.yaml", [f"task={{python: '{name}:T'}}"]), ranks=1, gpu_memory=None)


def test_no_file_of_the_users_is_overwritten_by_score(folder):
    (folder / "broken.yaml").write_text(GOOD)
    (folder / "stored.jsonl").write_text('{"completion": "<answer> 2 </answer>", "answer": 2}\n')
    (folder / "precious.txt").write_text("precious")
    command = [sys.executable, "-m", "rlattn.cli", "score", "broken.yaml", "--completions", "stored.jsonl", "--out"]
    for out in ("precious.txt", "stored.jsonl", "nowhere/x.jsonl"):
        result = subprocess.run([*command, out], cwd=folder, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert "--out" in result.stderr
    assert (folder / "precious.txt").read_text() == "precious"
    result = subprocess.run([*command, "scores.jsonl"], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert '"accuracy": 1.0' in (folder / "scores.jsonl").read_text()


def test_a_task_whose_gold_answer_is_wrong_is_refused(folder, monkeypatch):
    (folder / "task_wrong.py").write_text(
        "class T:\n    def rows(self, split): return [{'prompt': 'a', 'answer': 'b'}]\n"
        "    def verify(self, completion, row): return float(completion == row['answer'])\n"
        "    def gold(self, row): return 'c'\n"
    )
    monkeypatch.syspath_prepend(folder)
    (folder / "broken.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"scores its own gold\(\) 0.0"):
        check(load_recipe("broken.yaml", ["task={python: 'task_wrong:T'}"]), ranks=1, gpu_memory=None)


@pytest.mark.parametrize(
    ("rule", "longest", "warned"), [("global_anchor", 10, 1), ("global_anchor", 11, 0), ("entropy", 10, 0)]
)
def test_a_horizon_that_no_response_reaches_is_told(rule, longest, warned, folder):
    (folder / "broken.yaml").write_text(GOOD)
    overrides = [f"credit={{kind: {rule}}}", "attention.horizon=[10, 20]", f"trainer.max_completion_length={longest}"]
    lines = check(load_recipe("broken.yaml", overrides), ranks=1, gpu_memory=None)
    assert sum(line.startswith("warning: attention.horizon: no token has a FAI") for line in lines) == warned


def test_score_minds_requires_and_timeout(folder):
    (folder / "slow.py").write_text(
        "import time\nclass Slow:\n    def score(self, rollout):\n"
        "        time.sleep(60 if 'zz' in rollout.completion else 0)\n        return 1.0\n"
    )
    (folder / "broken.yaml").write_text(GOOD)
    rows = [
        '{"completion": "<answer> 2 </answer>", "answer": 2}',
        '{"completion": "zz <answer> 3 </answer>", "answer": 2}',
    ]
    (folder / "stored.jsonl").write_text("\n".join(rows))
    overrides = ["rewards.format={requires: accuracy}", "rewards.slow={python: 'slow:Slow', timeout: 1}"]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "rlattn.cli", "score", "broken.yaml", *overrides),
            *("--completions", "stored.jsonl", "--out", "o.jsonl"),
        ],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = [json.loads(line) for line in (folder / "o.jsonl").read_text().splitlines()]
    assert (first["accuracy"], first["slow"]) == (1, 1)
    assert (second["format"], second["slow"]) == (0, None)
    assert "took longer than 1 s" in result.stdout
