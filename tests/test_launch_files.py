"""launch/: every file is read by what it is for; Slurm itself is played by two small programs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPO
from forked import PYTHON

from rlattn.errors import UserError
from rlattn.preflight.check import check, memory_a_rank, prompt_tokens
from rlattn.preflight.data_rows import look_at_data
from rlattn.preflight.policy_files import model_config
from rlattn.recipe.build import build_task
from rlattn.recipe.load import load_recipe

LAUNCH = REPO / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
ACCELERATE = sorted((LAUNCH / "accelerate").glob("*.yaml"))

ONE_STEP_UNDER_EVERY_FILE = """
import json, sys
from pathlib import Path
import conftest, deepspeed, torch
from rlattn.processes.launch import strategy_of_accelerate

assert strategy_of_accelerate() == ["trainer.fsdp=null", "trainer.deepspeed=launch/deepspeed/zero3.json"]
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a faster gloo, which would be compiled first
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
AUTO = {"gradient_clipping": 1.0, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}
AUTO |= {"gradient_accumulation_steps": 1, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
stages = {}
for file in sorted(Path("launch/deepspeed").glob("*.json")):
    # DeepSpeed's own AdamW for offload would be compiled first
    config = {**json.loads(file.read_text()), **AUTO, "zero_force_ds_cpu_optimizer": False}
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for _ in range(2):
        loss = (engine(torch.ones(2, 4)) - 30).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    stages[file.stem] = engine.zero_optimization_stage(), engine.world_size
if torch.distributed.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(stages))
conftest.leave_ranks()
"""

FAKE_SRUN = """
import os, signal, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")][: next(
    number for number, word in enumerate(sys.argv[1:]) if not word.startswith("--"))]
open("calls", "a").write(" ".join(["srun", *sys.argv[1:]]) + "\\n")
given = dict(option[2:].split("=", 1) for option in options)
tasks = []
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
for task in range(int(given["ntasks"])):
    local = task % int(given.get("ntasks-per-node", 1))
    own = {**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(local)}
    tasks.append(subprocess.Popen(sys.argv[1 + len(options):], env=own))
sys.exit(max(task.wait() for task in tasks))
"""
FAKE_SCONTROL = """
import sys
if sys.argv[1] == "show":
    print("\\n".join(sys.argv[3].split(",")))
else:
    open("calls", "a").write(" ".join(["scontrol", *sys.argv[1:]]) + "\\n")
"""
FAKE_PYTHON = """
import os, signal, sys, time
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
found = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
open("started", "a").write(found + " : " + " ".join(sys.argv[1:]) + "\\n")
if os.environ.get("VLLM_MODEL") and "rlattn.train" in sys.argv:  # a run waits for its server
    while not any("vllm_serve --model" in line for line in open("started")):
        time.sleep(0.05)
if os.environ.get("FAKE_RUN") == "long" and "rlattn.train" in sys.argv:
    time.sleep(600)
sys.exit(int(os.environ.get("FAKE_RUN", 0)))
"""


def run_bash(*arguments, cwd, **environment):
    """A script of launch/, with an empty environment but for PATH."""
    environment = {"PATH": f"{cwd}/bin:{os.environ['PATH']}", **environment}
    return subprocess.run(
        ["bash", *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def machine(tmp_path):
    """A folder with srun, scontrol and a virtual environment whose python only says how it was started."""
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("python", FAKE_PYTHON)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!{sys.executable} -S\n{text}")
        file.chmod(0o755)
    return tmp_path


def lines(file: Path) -> list[str]:
    return sorted(file.read_text().splitlines())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shell_scripts_are_sound(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "pip install '.[dev]' brings it"
    found = subprocess.run([shellcheck, "-x", str(script)], cwd=REPO, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_torchrun_sh_on_one_machine_and_on_several(machine):
    script, common = LAUNCH / "torchrun.sh", {"VIRTUAL_ENV": str(machine), "NPROC_PER_NODE": "2"}
    assert run_bash(script, "quickstart", "seed=1", cwd=machine, **common, STOP_SECONDS="77").returncode == 0
    several = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MAX_RESTARTS": "3"}
    assert run_bash(script, "quickstart", cwd=machine, **common, **several).returncode == 0
    alone, one_of_two = (machine / "started").read_text().splitlines()
    run = "--nproc-per-node=2 --max-restarts={} -m rlattn.train quickstart"
    torchrun = f"-m torch.distributed.run --standalone {run.format(0)} seed=1"
    assert alone == f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=77 : {torchrun}"
    assert one_of_two.endswith(f"--nnodes=2 --node-rank=1 --master-addr=first --master-port=29500 {run.format(3)}")


def test_torchrun_sh_says_what_is_missing(machine):
    usage = run_bash(LAUNCH / "torchrun.sh", cwd=machine)
    assert usage.returncode == 2 and "Usage: bash launch/torchrun.sh RECIPE" in usage.stderr
    missing = run_bash(
        LAUNCH / "torchrun.sh", "quickstart", cwd=machine, VIRTUAL_ENV=str(machine), NPROC_PER_NODE="2", NNODES="2"
    )
    assert missing.returncode != 0 and "NODE_RANK: this machine: 0 on the first" in missing.stderr


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b", "SLURM_NTASKS_PER_NODE": "2"}


def test_slurm_starts_a_task_a_gpu_and_passes_the_runs_exit_code_on(machine):
    environment = {**JOB, "VIRTUAL_ENV": str(machine), "FAKE_RUN": "3"}
    assert run_bash(LAUNCH / "slurm.sbatch", "quickstart", "seed=1", cwd=machine, **environment).returncode == 3
    assert lines(machine / "started") == [
        f"RANK={rank} LOCAL_RANK={rank % 2} WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a"
        " : -m rlattn.train quickstart seed=1"
        for rank in range(4)
    ]
    assert [line.split(" bash ")[0] for line in lines(machine / "calls")] == [
        "srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --nodelist=a,b --kill-on-bad-exit=1"
    ]


@pytest.mark.parametrize(("code", "starts"), [("1", 3), ("137", 3), ("2", 1), ("143", 1), ("0", 1)])
def test_slurm_starts_ranks_that_fail_anew_and_no_others(machine, code, starts):
    environment = {**JOB, "SLURM_NTASKS_PER_NODE": "1", "VIRTUAL_ENV": str(machine), "FAKE_RUN": code}
    job = run_bash(LAUNCH / "slurm.sbatch", "quickstart", cwd=machine, **environment, MAX_RESTARTS="2")
    assert job.returncode == int(code)
    assert len(lines(machine / "started")) == 2 * starts  # two ranks
    assert job.stderr.count("restart 2 of 2") == (starts == 3)


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("100", False)])
def test_slurm_saves_before_the_time_limit_and_queues_itself_again(machine, restarts, requeued):
    environment = {**JOB, "PATH": f"{machine}/bin:{os.environ['PATH']}", "SLURM_RESTART_COUNT": restarts}
    environment |= {"VIRTUAL_ENV": str(machine), "FAKE_RUN": "long"}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "quickstart"]
    with subprocess.Popen(command, cwd=machine, env=environment) as job:
        while not (machine / "started").exists() or len(lines(machine / "started")) < 4:
            assert job.poll() is None
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 138
    assert ("scontrol requeue 7" in lines(machine / "calls")) == requeued


def test_slurm_gives_the_last_node_to_a_vllm_server(machine):
    environment = {**JOB, "VIRTUAL_ENV": str(machine), "VLLM_MODEL": "some/model"}
    assert run_bash(LAUNCH / "slurm.sbatch", "math_4b", "seed=1", cwd=machine, **environment).returncode == 0
    training = [line for line in lines(machine / "started") if "rlattn.train" in line]
    assert len(training) == 2 and "WORLD_SIZE=2" in training[0]
    overrides = training[0].split("math_4b ")[1].split()
    assert overrides[-1] == "seed=1"
    recipe = load_recipe("math_4b", overrides)
    assert recipe.trainer["vllm_server_host"] == "b" and recipe.trainer["vllm_mode"] == "server"
    assert any("--nodelist=b" in line and "vllm_serve --model some/model" in line for line in lines(machine / "calls"))
    alone = run_bash(LAUNCH / "slurm.sbatch", "math_4b", cwd=machine, **{**environment, "SLURM_JOB_NODELIST": "a"})
    assert alone.returncode == 2


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file):
    config = load_config_from_file(str(file))  # refuses keys that it does not know
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(file.stem, "DEEPSPEED")
    assert str(config.distributed_type).endswith(kind)
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["deepspeed_config_file"] == f"launch/deepspeed/{file.stem}.json"
        load_recipe("quickstart", [f"trainer.deepspeed={config.deepspeed_config['deepspeed_config_file']}"])


def accelerate_launch(config: str, program: Path, out: Path) -> None:
    command = [*PYTHON, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{config}.yaml"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [*command, "--num_processes=2", "--main_process_port=0", str(program), str(out)],
        cwd=REPO, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_deepspeed_trains_two_ranks_under_every_configuration(tmp_path):
    (tmp_path / "program.py").write_text(ONE_STEP_UNDER_EVERY_FILE)
    accelerate_launch("zero3", tmp_path / "program.py", tmp_path / "stages.json")
    files = [file.stem for file in (LAUNCH / "deepspeed").glob("*.json")]
    assert json.loads((tmp_path / "stages.json").read_text()) == {name: [int(name[4]), 2] for name in files}


def test_accelerates_fsdp2_configuration_reaches_the_recipe(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys; from rlattn.processes.launch import strategy_of_accelerate as strategy\n"
        "open(sys.argv[1], 'w').write(' '.join(strategy()))"
    )
    accelerate_launch("fsdp2", tmp_path / "program.py", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "trainer.deepspeed=null trainer.fsdp=true"


GPUS, GPU_MEMORY = (1, 2, 4, 8, 16), 72  # GB: a tenth of an 80 GB GPU is left free
SERVER = ["trainer.use_vllm=true", "trainer.vllm_mode=server"]
STRATEGIES = {
    "DDP": ["trainer.deepspeed=null"],
    **{
        f"ZeRO-{stage}{' offload' * away}": [f"trainer.deepspeed=launch/deepspeed/zero{stage}{'_offload' * away}.json"]
        for stage, away in ((1, False), (2, False), (3, False), (2, True), (3, True))
    },
}
STRATEGIES |= {f"{name}, server": [*STRATEGIES[name], *SERVER] for name in ("ZeRO-3", "ZeRO-3 offload")}
SIZES = {"all weights": ("0.6B", "1.7B", "4B", "8B", "14B", "32B"), "LoRA": ("8B", "14B", "32B")}
RECIPES = {"all weights": "countdown_4b", "LoRA": "countdown_4b_lora"}


def table_rows() -> list[str]:
    """launch/README.md's table of what fits: the first strategy, from the simplest on, whose estimate fits."""
    rows = []
    for what, name in RECIPES.items():
        recipes = {strategy: load_recipe(name, keys) for strategy, keys in STRATEGIES.items()}
        prompts = look_at_data(recipes["DDP"], build_task(recipes["DDP"]), 1).prompts
        for size in SIZES[what]:
            config = model_config(policy := f"Qwen/Qwen3-{size}")
            prompt, _ = prompt_tokens(prompts, policy)
            cells = []
            for ranks in GPUS:
                totals = {s: memory_a_rank(r, config, prompt, ranks, 80, 0).total / 1e9 for s, r in recipes.items()}
                cells.append(next((f"{s}: {gb:.0f}" for s, gb in totals.items() if gb <= GPU_MEMORY), "no"))
            rows.append(f"| {size}, {what} | {' | '.join(cells)} |")
    return rows


def test_the_table_of_what_fits_is_the_estimates():
    written = [row for row in (LAUNCH / "README.md").read_text().splitlines() if re.match(r"\| [\d.]+B, ", row)]
    assert written == table_rows(), "\n".join(table_rows())


def test_the_command_beside_the_table_says_the_same():
    large = load_recipe("countdown_4b", ["policy.path=Qwen/Qwen3-14B", *STRATEGIES["ZeRO-2"]])
    with pytest.raises(UserError, match="GB a rank and has 72"):
        check(large, ranks=4, gpu_memory=GPU_MEMORY)
    offload = load_recipe("countdown_4b", ["policy.path=Qwen/Qwen3-14B", *STRATEGIES["ZeRO-3 offload"]])
    found = "\n".join(check(offload, ranks=4, gpu_memory=GPU_MEMORY))
    assert "zero3 on 4, optimizer and gradients in main memory, weights in main memory, in GB" in found
    assert not {"weights  ", "optimizer  ", "gradients  "} & set(re.findall(r"(\w+  ) +[\d.]+", found))
