"""A policy whose folder lacks weights is refused before any is loaded: transformers would train random ones."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_inspect import save_model, save_tokenizer
from transformers import AutoModelForCausalLM

from rlattn.cli import main
from rlattn.errors import UserError
from rlattn.policy import load as policy
from rlattn.policy.load import load_model, prepare_policy
from rlattn.preflight.weight_files import check_weight_files
from rlattn.recipe.schema import Policy
from rlattn.tasks import Arithmetic

LOST = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(save_model(tmp_path / "policy"))
    return tmp_path / "policy"


def prepared(folder):
    return prepare_policy(Policy(path=str(folder), prompt_style="plain"), Arithmetic())


def without(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_lost_weight_is_named(folder):
    without(folder, LOST)
    with pytest.raises(UserError, match=rf"policy\.path: .* lacks 1 of its model's weights, first {LOST}\. Copy"):
        prepared(folder)


def test_weights_of_another_shape_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UserError, match=r"policy\.path: .* stores .* and its config\.json means \(32, 40\)\. They do"):
        prepared(folder)


def test_a_tied_head_is_stored_once_and_a_sharded_policy_in_many_files(folder):
    save_model(folder, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert prepared(folder).path == str(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len([*folder.glob("model-*.safetensors")]) > 2
    assert prepared(folder).path == str(folder)


def test_no_weight_is_read_to_find_out(folder, monkeypatch):
    found = []

    def loaded(*args, **how):
        model, account = real(*args, **how)
        found.extend(model.parameters())
        return model, account

    real = policy._loaded
    monkeypatch.setattr(policy, "_loaded", loaded)
    prepared(folder)
    assert found and all(parameter.is_meta for parameter in found)


def test_torn_files_are_refused_before_torch_is_imported(folder, tmp_path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    arguments = ["train", "quickstart", f"policy={{path: {folder}, prompt_style: plain}}", "credit=null"]
    code = (
        f"import sys\nfrom rlattn.cli import main\ntry: main({arguments})\nexcept SystemExit as end: print(end.code)\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "2\n"), result.stderr
    assert result.stderr.startswith(f"rlattn: policy.path: {folder} holds no loadable weights: model.safetensors: ")


def damaged(folder, what):
    if what == "no file":
        (folder / "model.safetensors").unlink()
        return
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    if what == "a lost shard":
        model.save_pretrained(folder, max_shard_size="30KB")
        max(folder.glob("model-*.safetensors")).unlink()
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        whole = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("no file", "has no weights"),
        ("a lost shard", "model-0"),
        ("a torn .bin", "pytorch_model.bin: .*end is missing"),
    ],
)
def test_files_that_are_lost_or_torn_are_named(folder, what, told):
    damaged(folder, what)
    with pytest.raises(UserError, match=told):
        check_weight_files(str(folder), "policy.path")


def test_files_that_transformers_does_not_read_do_not_matter(folder):
    for name in ("consolidated.safetensors", "._model.safetensors", "adapter.txt"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    check_weight_files(str(folder), "policy.path")
    assert prepared(folder).path == str(folder)


def test_a_folder_named_as_the_built_in_policy_is_not_it(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-reasoner").mkdir()
    (tmp_path / "tiny-reasoner" / "recipe.yaml").write_text("")
    reached = pytest.raises(RuntimeError, match="the run")
    monkeypatch.setattr("rlattn.run.run.dry_run", lambda _: (_ for _ in ()).throw(RuntimeError("the run")))
    with reached:
        main(["train", "quickstart", "--dry-run"])


@pytest.mark.parametrize("damage", ["lost", "shape"])
def test_an_adapter_over_a_base_that_does_not_fit_is_refused(folder, tmp_path, damage):
    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter"), "--model").num_parameters() > 0
    if damage == "lost":
        without(folder, LOST)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UserError, match=rf"--model: {folder} (lacks 1 of|stores .* as)"):
        load_model(str(tmp_path / "adapter"), "--model")
