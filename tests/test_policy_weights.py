"""A policy whose folder lacks weights is refused before any is loaded: transformers would train random ones."""

import json

import pytest
from safetensors.torch import load_file, save_file
from test_inspect import save_model, save_tokenizer
from transformers import AutoModelForCausalLM

from rlattn import policy
from rlattn.cli import main
from rlattn.errors import UserError
from rlattn.policy import prepare_policy
from rlattn.recipe import Policy
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


@pytest.mark.parametrize("damage", ["torn", "none"])
def test_torn_or_missing_files_are_refused_before_torch_is_imported(folder, capsys, damage):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50]) if damage == "torn" else file.unlink()
    task = "task={kind: arithmetic, terms: [3, 3], eval_rows: 8}"
    with pytest.raises(SystemExit) as ended:
        main(["train", "quickstart", f"policy={{path: {folder}, prompt_style: plain}}", task, "credit=null"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("rlattn: policy.path: ")
    assert ("model.safetensors" if damage == "torn" else "has no weights") in told
