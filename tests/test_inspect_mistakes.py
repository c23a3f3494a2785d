"""What `rlattn inspect` is asked wrongly: one line, exit code 2, nothing written."""

import json
import math

import pytest
from safetensors.torch import load_file, save_file
from test_inspect import SIZES, TEXT, models, save_model, save_tokenizer  # noqa: F401
from transformers import AutoConfig

from rlattn.cli import main


@pytest.fixture(scope="module")
def broken(models, tmp_path_factory):  # noqa: F811
    """Model folders that cannot be inspected, by name."""
    root = tmp_path_factory.mktemp("broken")
    save_model(root / "no-tokenizer")
    save_tokenizer(root / "no-config")
    run = root / "run"
    save_tokenizer(save_model(run / "model"))
    nan = root / "nan"
    save_tokenizer(save_model(nan))
    weights = load_file(nan / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, nan / "model.safetensors", metadata={"format": "pt"})
    one = root / "inf"  # in one head: the others are finite
    save_tokenizer(save_model(one))
    weights = load_file(one / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = math.inf
    save_file(weights, one / "model.safetensors", metadata={"format": "pt"})
    less = root / "less"
    save_tokenizer(save_model(less))
    weights = load_file(less / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, less / "model.safetensors", metadata={"format": "pt"})
    for name, model_type in {"encoder": "bert", "encoder-decoder": "t5", "mamba": "mamba", "vision": "vit"}.items():
        AutoConfig.for_model(model_type).save_pretrained(root / name)
        save_tokenizer(root / name)
    for name, config in {"damaged": "{", "unknown": '{"model_type": "nonesuch"}'}.items():
        save_tokenizer(root / name)
        (root / name / "config.json").write_text(config)
    hybrid = AutoConfig.for_model("qwen3_next", **SIZES, layer_types=["linear_attention", "full_attention"] * 2)
    hybrid.save_pretrained(root / "hybrid")
    save_tokenizer(root / "hybrid")
    hybrid.layer_types = ["linear_attention"] * 4
    hybrid.save_pretrained(root / "linear")
    save_tokenizer(root / "linear")
    save_model(root / "small-vocabulary", vocab_size=50, pad_token_id=0, eos_token_id=1)
    save_tokenizer(root / "small-vocabulary")
    (root / "no-weights").mkdir()
    (root / "no-weights" / "config.json").write_text((run / "model" / "config.json").read_text())
    save_tokenizer(root / "no-weights")
    save_tokenizer(save_model(root / "unfit"))
    config = json.loads((root / "unfit" / "config.json").read_text())
    (root / "unfit" / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    (root / "a-file").write_text("x")
    (root / "torn.parquet").write_bytes(b"PAR1" + bytes(50) + b"\x10\0\0\0PAR1")
    for name, content in {
        "empty.jsonl": "",
        "bad.jsonl": '{"prompt": "a", "response": "b"}\n{"prompt": "a", ',
        "near.jsonl": '{"prompt": "a", "respons": "b"}',
        "promt.jsonl": '{"promt": "a", "response": "b"}',
        "blank.jsonl": '{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": " "}',
        "answered.jsonl": '{"prompt": [{"role": "assistant", "content": "a"}], "response": "b"}',
        "null.jsonl": '{"prompt": null, "response": "b"}',
        "messages.jsonl": '{"prompt": [{"role": "user", "content": "a"}], "response": "b"}',
        "half.jsonl": '{"prompt": "a", "response": "\\ud800"}',
        "list.jsonl": "[1]",
        "rows.txt": "x",
    }.items():
        (root / name).write_text(content)
    return root


# (the model, the other arguments, what the message must hold); {} is the folder of broken things
MISTAKES = [
    ("llama", (), ("--prompt", "--response", "--data FILE")),
    ("llama", ("--response", "x"), ("--response", "Add --prompt")),
    ("llama", ("--prompt", " "), ("--prompt", "is empty")),
    ("llama", ("--prompt", "x", "--response", ""), ("--response", "is empty")),
    ("llama", ("--prompt", "\udcff"), ("--prompt", "not UTF-8")),
    ("llama", ("--prompt", "x", "--response", "\udcff"), ("--response", "not UTF-8")),
    ("llama", ("--data", "{}/half.jsonl"), ("half.jsonl, line 1", "surrogate")),
    ("llama", ("--prompt", "x", "--data", "{}/near.jsonl"), ("--data", "Keep one")),
    ("llama", ("--data", "{}/nonesuch.jsonl"), ("nonesuch.jsonl", "no such file")),
    ("llama", ("--data", "{}/empty.json"), ("no such file", "Did you mean 'empty.jsonl'")),
    ("llama", ("--data", "{}"), ("--data", "is a folder")),
    ("llama", ("--data", "{}/rows.txt"), ("cannot read '.txt'",)),
    ("llama", ("--data", "{}/empty.jsonl"), ("--data", "is empty")),
    ("llama", ("--data", "{}/bad.jsonl"), ("bad.jsonl, line 2", "bad JSON")),
    ("llama", ("--data", "{}/list.jsonl"), ("list.jsonl, row 1", "expected an object")),
    ("llama", ("--data", "{}/near.jsonl"), ("row 1", "no column 'response'", "Did you mean 'respons'?")),
    ("llama", ("--data", "{}/promt.jsonl"), ("row 1", "no column 'prompt'", "Did you mean 'promt'?")),
    ("llama", ("--data", "{}/blank.jsonl"), ("row 2", "its response is empty")),
    ("llama", ("--data", "{}/null.jsonl"), ("row 1", "neither text nor chat messages")),
    ("llama", ("--data", "{}/answered.jsonl"), ("row 1", "ends in a message of the assistant's")),
    ("llama", ("--data", "{}/messages.jsonl"), ("row 1", "no chat template")),
    ("llama", (*TEXT, "--layers", "one"), ("--layers", "'one'")),
    ("llama", (*TEXT, "--layers", "1,-2"), ("--layers", "from 0")),
    ("llama", (*TEXT, "--layers", "1,4"), ("--layers", "layers 0 to 3", "got 4")),
    ("llama", (*TEXT, "--window", "0"), ("--window", "expected 1 to", "got 0")),
    ("llama", (*TEXT, "--horizon", "9", "3"), ("--horizon", "low <= high")),
    ("llama", (*TEXT, "--chat"), ("--chat", "no chat template", "--plain")),
    ("llama", ("--prompt", "x" * 200, "--response", "y" * 57), ("200 prompt and 57 response tokens", "context of 256")),
    ("llama", ("--prompt", "x" * 256), ("256 prompt", "context of 256")),
    ("llama", (*TEXT, "--output", "{}/a-file"), ("--output", "a-file")),
    ("tiny-reasoner", TEXT, ("--model", "runs/quickstart/model")),
    ("{}/lama", TEXT, ("--model", "no folder")),
    ("{}/no-tokeniser", TEXT, ("--model", "no folder", "Did you mean 'no-tokenizer'?")),
    ("nobody/nonesuch", TEXT, ("--model", "'nobody/nonesuch'", "network")),
    ("{}/a-file", TEXT, ("--model", "is a file")),
    ("{}/no-config", TEXT, ("--model", "no config.json")),
    ("{}/run", TEXT, ("--model", "no config.json", "Did you mean", "run/model")),
    ("{}/no-tokenizer", TEXT, ("--model", "no tokenizer", "save_pretrained")),
    ("{}/damaged", TEXT, ("--model", "config.json")),
    ("{}/unknown", TEXT, ("--model", "config.json", "nonesuch")),
    ("{}/encoder", TEXT, ("--model", "(bert)", "is an encoder", "decoder-only")),
    ("{}/encoder-decoder", TEXT, ("--model", "(t5)", "encoder-decoder", "decoder-only")),
    ("{}/vision", TEXT, ("--model", "(vit)", "decoder-only")),
    ("{}/mamba", TEXT, ("--model", "(mamba)", "no full-attention layer")),
    ("{}/linear", TEXT, ("--model", "(qwen3_next)", "no full-attention layer")),
    ("{}/hybrid", (*TEXT, "--layers", "1,2"), ("--layers", "layer 2", "no full attention", "1, 3")),
    ("{}/small-vocabulary", TEXT, ("--model", "knows 50 ids")),
    ("llama", ("--data", "{}/torn.parquet"), ("torn.parquet: is no readable Parquet file",)),
    ("{}/no-weights", TEXT, ("--model", "has no weights")),
    ("{}/unfit", TEXT, ("--model", "down_proj.weight as (32, 48)", "means (32, 40)", "not belong together")),
    ("{}/nan", TEXT, ("--model", "NaN or inf", "model.layers.1.mlp.up_proj.weight")),
    ("{}/inf", TEXT, ("--model", "NaN or inf", "model.layers.1.self_attn.q_proj.weight")),
    ("{}/less", TEXT, ("--model", "lacks 1 of its model's weights", "model.layers.1.mlp.up_proj.weight")),
    ("{}/nan", ("--prompt", "x", "--max-new-tokens", "3"), ("--model", "NaN or inf")),
]


@pytest.mark.parametrize(("model", "arguments", "expected"), MISTAKES, ids=str)
def test_a_mistake_gets_one_line_and_exit_code_2(
    models,  # noqa: F811
    broken,
    tmp_path,
    monkeypatch,
    capsys,
    model,
    arguments,
    expected,
):
    monkeypatch.chdir(tmp_path)
    model = str(models / model) if (models / model).is_dir() else model.replace("{}", str(broken))
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--model", model, *(part.replace("{}", str(broken)) for part in arguments)])
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert written.err.startswith("rlattn: ")
    assert written.err.count("\n") == 1
    assert written.out == ""
    for part in expected:
        assert part in written.err
    assert not (tmp_path / "inspect" / "inspect.json").exists()


def test_a_file_that_cannot_be_written_is_named(models, tmp_path, capsys):  # noqa: F811
    (tmp_path / "rhythm.png").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--model", str(models / "llama"), *TEXT, "--output", str(tmp_path)])
    assert ended.value.code == 2
    *_, told = capsys.readouterr().err.splitlines()
    assert told == f"rlattn: {tmp_path / 'rhythm.png'}: cannot be read or written: Is a directory."
