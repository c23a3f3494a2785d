"""A policy that cannot be trained is refused before weights load; an adapter goes with the base it was trained on."""

import json

import huggingface_hub
import pytest
import torch
from conftest import command_without
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_inspect import TEMPLATE, save_model, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlattn.cli import main
from rlattn.errors import UserError
from rlattn.evaluation.answers import check, load
from rlattn.evaluation.plan import make_plan
from rlattn.evaluation.subjects import Subject
from rlattn.inspection.inputs import load_config
from rlattn.policy import load as policy
from rlattn.policy.load import load_model, prepare_policy
from rlattn.preflight.policy_files import check_policy, model_config
from rlattn.preflight.weight_files import check_weight_files
from rlattn.recipe.load import parse_recipe
from rlattn.recipe.schema import Lora, Policy
from rlattn.run.build import prepare
from rlattn.run_folder.export import export
from rlattn.tasks import Arithmetic

LOST = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(save_model(tmp_path / "policy"))
    return tmp_path / "policy"


def prepared(folder, **changes):
    return prepare_policy(Policy(path=str(folder), prompt_style="plain", **changes), Arithmetic())


def adapted(folder, **lora):
    """The policy in a folder with an adapter that changes it."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **lora))


def finished_run(run, model):
    model.save_pretrained(run / "model")
    save_tokenizer(run / "model")
    (run / "environment.json").write_text('{"rlattn": "0"}')
    return run


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
    result = command_without({"torch"}, *arguments, cwd=tmp_path)
    assert result.stdout == "2\n"
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
    monkeypatch.setattr("rlattn.run.run.dry_run", lambda *_: (_ for _ in ()).throw(RuntimeError("the run")))
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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub's in which main and v1 of `me/tiny` are two models; v1 has the longer context."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--me--tiny"
    for commit, revision, context in (("1" * 40, "main", 256), ("2" * 40, "v1", 512)):
        folder = repo / "snapshots" / commit
        save_tokenizer(save_model(folder, max_position_embeddings=context))
        weights = load_file(folder / "model.safetensors")
        save_file({k: w + int(commit[0]) for k, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    return repo


V1, V1_NORM = {"path": "me/tiny", "revision": "v1", "prompt_style": "plain"}, 3.0  # 1 as made, and 2


def test_an_adapter_takes_the_revision_of_its_base_with_it(hub, tmp_path, capsys):
    source = prepare_policy(Policy(**V1, lora=Lora(r=2, target_modules=("q_proj",))), Arithmetic())
    base = AutoModelForCausalLM.from_pretrained(source.path, **source.init_kwargs)
    run = finished_run(tmp_path / "run", get_peft_model(base, source.peft_config))
    assert load_model(str(run / "model"), "--model").model.norm.weight.unique().item() == V1_NORM
    assert load_config(str(run / "model")).max_position_embeddings == 512
    out = export(run, tmp_path / "merged", merge=True, push=None)
    assert load_file(out / "model.safetensors")["model.norm.weight"].unique().item() == V1_NORM
    with pytest.raises(SystemExit):
        main(["export", str(run), "--out", str(tmp_path / "copied")])
    copied = tmp_path / "copied"
    assert f"Next: AutoModelForCausalLM.from_pretrained('{copied}', revision='v1')\n" in capsys.readouterr().out
    read = AutoModelForCausalLM.from_pretrained(copied, revision="v1")  # as the line says
    assert read.model.norm.weight.unique().item() == V1_NORM


def test_an_evaluation_reads_the_recipes_policy_at_the_recipes_revision(hub, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Two and two?", "answer": "4"}\n')
    asked = {"data": str(tmp_path / "rows.jsonl"), "task": None, "samples": 1, "k": None, "temperature": None}
    subject = Subject(name="me/tiny", path="me/tiny")
    for pin, context, norm in (([], 256, 2.0), (["policy.revision=v1"], 512, V1_NORM)):
        plan = make_plan(subject, overrides=[*pin, "trainer.max_completion_length=8"], limit=None, **asked)
        checked = check(subject, plan, "MODEL")
        assert checked.context == context
        assert load(checked).model.model.norm.weight.unique().item() == norm


def test_a_revisions_configuration_is_not_taken_from_the_shipped_ones(hub):
    assert model_config("Qwen/Qwen3-4B")["model_type"] == "qwen3"
    with pytest.raises(UserError, match="the hub does not give its configuration"):
        model_config("Qwen/Qwen3-4B", "v1")
    assert model_config("me/tiny", "v1")["max_position_embeddings"] == 512


def recipe_of(**changes):
    task = {"kind": "arithmetic", "eval_rows": 2}
    return parse_recipe({"name": "x", "policy": changes, "task": task, "rewards": {"accuracy": {}}})


@pytest.mark.parametrize("beside", [[], ["config.json"], ["config.json", "model.safetensors"]])
def test_an_adapter_is_refused_as_a_policy(folder, tmp_path, beside):
    run = finished_run(tmp_path / "run", adapted(folder, target_modules=["q_proj"]))
    for name in beside:
        (folder / name).rename(run / "model" / name)
    told = rf"^policy\.path: {run}/model holds a LoRA adapter, .* `rlattn export {run} --merge --out FOLDER`"
    for refusing in (lambda: check_policy(recipe_of(path=str(run / "model"))), lambda: prepared(run / "model")):
        with pytest.raises(UserError, match=told):
            refusing()


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_on_the_hub_is_refused_as_a_policy(hub, whole):
    snapshot = hub / "snapshots" / ("2" * 40)
    (snapshot / "adapter_config.json").write_text('{"base_model_name_or_path": "me/other", "peft_type": "LORA"}')
    told = "me/tiny holds a LoRA adapter, not a whole model"
    if not whole:
        (snapshot / "config.json").unlink()
        with pytest.raises(UserError, match=told):
            model_config("me/tiny", "v1")
    with pytest.raises(UserError, match=told):
        prepare_policy(Policy(**V1), Arithmetic())


@pytest.mark.parametrize(
    ("made", "targets", "told"),
    [
        ({}, ("q_proj", "lm_head"), "output layer 'lm_head' would not be trained"),
        ({"model_type": "gpt2"}, ("c_attn", "transformer.wte"), "'wte' shares its weights with the output layer"),
        ({"tie_word_embeddings": True}, ("q_proj", "embed_tokens"), "'embed_tokens' shares its weights"),
        ({"tie_word_embeddings": True}, ("q_proj",), ""),
        ({"tie_word_embeddings": True}, "all-linear", ""),
        ({"tie_word_embeddings": False}, ("q_proj", "embed_tokens"), ""),
    ],
)
def test_lora_on_the_output_layer_or_on_what_it_shares_is_refused(folder, made, targets, told):
    save_model(folder, **made)
    lora = Lora(r=2, target_modules=targets)
    if not told:
        assert prepared(folder, lora=lora).peft_config.r == 2
        return
    with pytest.raises(UserError, match=rf"^policy\.lora\.target_modules: .*{told}"):
        prepared(folder, lora=lora)
    if made != {"model_type": "gpt2"}:  # whose layers' names rlattn does not know
        with pytest.raises(UserError, match=told):
            check_policy(recipe_of(path=str(folder), lora={"target_modules": list(targets)}))


def test_a_merge_that_gives_another_policy_is_refused_and_leaves_nothing(folder, tmp_path):
    save_model(folder, tie_word_embeddings=True)
    run = finished_run(tmp_path / "run", adapted(folder, target_modules=["embed_tokens"]))
    with pytest.raises(UserError, match="merged, it would be another policy: log-probabilities would be off by up to"):
        export(run, tmp_path / "merged", merge=True, push=None)
    assert {path.name for path in tmp_path.iterdir()} == {"policy", "run"}


def test_a_merge_keeps_changes_that_the_bases_dtype_would_round_away(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    trained = adapted(folder, target_modules=["q_proj"])
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            weight.mul_(1e-3 if "lora_B" in name else 1)
    run = finished_run(tmp_path / "run", trained)
    merged = load_file(export(run, tmp_path / "merged", merge=True, push=None) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    layer = trained.get_submodule(f"base_model.model.{name}")
    delta = layer.get_delta_weight("default").float()
    assert delta.abs().max() > 0
    torch.testing.assert_close(merged[f"{name}.weight"] - layer.weight.float(), delta, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("pad", [True, False])
def test_a_token_beyond_the_embeddings_is_refused(folder, pad):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mark = {"pad_token": "[MARK]"} if pad else {"additional_special_tokens": ["[MARK]"]}
    tokenizer.add_tokens([f"[{n}]" for n in range(2)])
    tokenizer.add_special_tokens(mark)
    tokenizer.chat_template = TEMPLATE if pad else f"[MARK]{TEMPLATE}"
    tokenizer.save_pretrained(folder)
    told = r"policy\.path: .* gives '\[MARK\]' the id 260, and the model has 260 embeddings"
    with pytest.raises(UserError, match=told):
        prepared(folder)
    if pad:
        with pytest.raises(UserError, match=told):
            check_policy(recipe_of(path=str(folder)))


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        prepared(folder)


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (NO_SYSTEM + TEMPLATE, "refuses it: .*System role not supported"),
        (TEMPLATE.replace("messages %}", "messages if m.role == 'user' %}"), "leaves it out"),
    ],
)
def test_a_system_prompt_that_the_chat_template_does_not_take_is_refused(folder, template, told):
    save_tokenizer(folder, template)
    recipe = recipe_of(path=str(folder), system_prompt="Be brief.")
    for refusing in (check_policy, prepare):
        with pytest.raises(UserError, match=rf"policy\.system_prompt: the chat template of {folder} {told}"):
            refusing(recipe)
    check_policy(recipe_of(path=str(folder)))
