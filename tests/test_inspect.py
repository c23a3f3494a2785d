"""`rlattn inspect` on tiny models of several architectures, through the command line as a user would."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlattn.attention import rhythm_signals
from rlattn.cli import main
from rlattn.credit import CREDIT_RULES
from rlattn.errors import UserError
from rlattn.inspection.figures import NO_GLYPH, draw_heads, draw_rhythm, token_label
from rlattn.inspection.inputs import make_folder
from rlattn.inspection.maps import average_maps
from rlattn.inspection.terminal import show

SIZES = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 256, "eos_token_id": 257,
    "bos_token_id": None,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ 'assistant: ' }}"
PROMPT, RESPONSE = "Two and two?", "Two and two,\n\tthat is $4$ or four: _the_ sum. "
TEXT = ("--prompt", PROMPT, "--response", RESPONSE)


def save_tokenizer(folder, template=None):
    """A token a byte, so that any text can be read."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={**vocabulary, "<pad>": 256, "<end>": 257}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def save_model(folder, model_type="llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **ARCHITECTURES.get(model_type, {}), **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders by name: one a architecture, and `chat`, which has a chat template."""
    root = tmp_path_factory.mktemp("models")
    for name in ARCHITECTURES:
        save_tokenizer(save_model(root / name, name))
    save_tokenizer(save_model(root / "chat", "qwen3"), TEMPLATE)
    return root


def inspect(folder, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--output", str(folder), *map(str, arguments)])
    assert ended.value.code == 0
    return json.loads((folder / "inspect.json").read_text(encoding="utf-8"))


def as_numbers(values_T):
    return [None if math.isnan(value) else value for value in values_T.tolist()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_numbers_are_those_of_rhythm_signals(models, tmp_path, name):
    report = inspect(tmp_path, "--model", models / name, *TEXT)
    tokenizer, model = AutoTokenizer.from_pretrained(models / name), AutoModelForCausalLM.from_pretrained(models / name)
    prompt, response = tokenizer(PROMPT)["input_ids"], tokenizer(RESPONSE)["input_ids"]
    ids = torch.tensor([prompt + response])
    mask = torch.ones_like(ids)
    signals = rhythm_signals(model, ids, mask, mask * (torch.arange(ids.shape[1]) >= len(prompt)), entropy=True)
    text, start = report["texts"][0], len(prompt)
    assert text["response"] == RESPONSE
    assert text["tokens"] == list(RESPONSE)
    assert text["waad"] == as_numbers(signals.waad_BN[0, start:])
    assert text["fai"] == as_numbers(signals.fai_BN[0, start:])
    assert text["entropy"] == as_numbers(signals.entropy_BN[0, start:])
    for rule, weights in text["weights"].items():
        assert weights == CREDIT_RULES[rule]()(signals).weights_BN[0, start:].tolist()
        assert max(weights) > 1
    spans = signals.span_BLH[0].flatten().tolist()
    assert [head["span"] for head in report["heads"]] == spans
    assert [head["local"] for head in report["heads"]] == signals.local_heads[0].flatten().float().tolist()
    for file in ("rhythm.png", "heads.png"):
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_drawn_maps_are_means_of_the_models_own(models, name):
    ids = torch.randint(0, 256, (30,), generator=torch.Generator().manual_seed(0))
    eager = AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager")
    maps = eager(input_ids=ids[None], output_attentions=True).attentions
    chosen = torch.zeros(2, 4, dtype=torch.bool)
    chosen[0, 1] = chosen[1, 3] = True
    expected = (maps[1][0, 1] + maps[3][0, 3]) / 2
    model = AutoModelForCausalLM.from_pretrained(models / name)
    before = model(input_ids=ids[None]).logits
    (found,) = average_maps(model, ids, 7, (1, 3), [chosen])
    torch.testing.assert_close(found, expected[7:, 7:].detach())
    assert torch.equal(model(input_ids=ids[None]).logits, before)


def test_rows_of_a_file_with_messages_and_completions(models, tmp_path, capsys):
    rows = [
        {"prompt": PROMPT, "response": RESPONSE},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Four.", "other": 1},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = inspect(tmp_path / "out", "--model", models / "chat", "--data", file, "--layers", "3,0", "--window", "4")
    assert report["layers"] == [0, 3]
    assert report["prompt_style"] == "chat"
    assert [text["where"] for text in report["texts"]] == [f"{file}, row 1", f"{file}, row 2"]
    assert report["texts"][0]["prompt_tokens"] == len(f"user: {PROMPT}\nassistant: ")
    assert report["texts"][1]["prompt_tokens"] == len("user: Hi\nassistant: ")
    assert max(report["texts"][0]["waad"]) <= 4
    assert report["texts"][1]["fai"] == [None] * 5
    assert sum(head["local"] for head in report["heads"]) == pytest.approx(round(0.3 * 8))
    # statistics run over both texts: a fifth of each, rounded up
    assert report["statistics"]["entropy_at_waad_peaks"]["peaks"] == math.ceil(len(RESPONSE) / 5) + 1
    shown = capsys.readouterr().out
    assert "1 of 2 responses have no more than 10 tokens, so FAI is undefined" in shown
    assert str(tmp_path / "out" / "rhythm.png") in shown
    assert "Next: " in shown


def test_a_prompt_that_holds_the_template_already_is_told(models, tmp_path, capsys):
    text = ("--prompt", f"<end> {PROMPT}", "--response", RESPONSE)
    inspect(tmp_path, "--model", models / "chat", *text)
    assert "warning: --prompt: the prompt already begins with <end>; with --plain" in capsys.readouterr().out
    inspect(tmp_path, "--model", models / "chat", "--plain", *text)
    assert "warning" not in capsys.readouterr().out


def test_plain_prompts_skip_the_chat_template(models, tmp_path):
    report = inspect(
        tmp_path, "--model", models / "chat", "--plain", "--prompt", PROMPT, "--response", "4", "--horizon", "1", "5"
    )
    assert report["prompt_style"] == "plain"
    assert report["texts"][0]["prompt_tokens"] == len(PROMPT)
    assert report["statistics"]["fai_at_or_after_waad_peaks"]["value"] is None  # one token, which none follows


def test_without_a_response_the_model_writes_one_greedily(models, tmp_path, capsys):
    report = inspect(tmp_path, "--model", models / "llama", "--prompt", PROMPT, "--max-new-tokens", "14")
    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    ids = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**ids, do_sample=False, max_new_tokens=14)[0, ids["input_ids"].shape[1] :]
    text = report["texts"][0]
    assert text["written_by_the_model"]
    assert text["tokens"] == [tokenizer.decode([token]) for token in written.tolist()]
    assert "the model writes: " in capsys.readouterr().out


def test_what_a_model_writes_cannot_steer_the_terminal(models, tmp_path, capsys):
    report = inspect(tmp_path, "--model", models / "llama", "--prompt", PROMPT, "--max-new-tokens", "3")
    capsys.readouterr()
    report["texts"][0]["response"] = "a\x1b[31mb"
    show(report, [tmp_path] * 3, "m")
    assert "a\\x1b[31mb" in capsys.readouterr().out


def test_an_output_folder_that_takes_no_files_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rlattn.inspection.inputs.TemporaryFile", denied)  # root may write anywhere
    with pytest.raises(UserError, match="--output"):
        make_folder(tmp_path)


def test_a_long_response_is_cut_in_the_figure_only(models, tmp_path):
    report = inspect(tmp_path, "--model", models / "llama", "--prompt", "a", "--response", "ab" * 90)
    assert report["figure"]["tokens"] == 120
    assert len(report["figure"]["local_map"]) == len(report["figure"]["global_map"][0]) == 120
    assert len(report["texts"][0]["waad"]) == 180


def test_a_lora_adapter_is_inspected_over_its_base(models, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    save_tokenizer(tmp_path / "adapter")
    report = inspect(tmp_path / "out", "--model", tmp_path / "adapter", *TEXT)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "adapter")(PROMPT + RESPONSE)["input_ids"]])
    mask = torch.ones_like(ids)
    response = mask * (torch.arange(ids.shape[1]) >= len(PROMPT))
    expected = rhythm_signals(adapted, ids, mask, response).waad_BN[0, len(PROMPT) :]
    with adapted.disable_adapter():
        base_waad = rhythm_signals(adapted, ids, mask, response).waad_BN[0, len(PROMPT) :]
    assert report["texts"][0]["waad"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert report["texts"][0]["waad"] != pytest.approx(base_waad.tolist(), abs=1e-3)


def test_labels_can_be_drawn_whatever_the_token():
    assert token_label(" the") == "the"
    assert token_label("\n\t") == "\\n\\t"
    assert token_label("  ") == "␣␣"
    assert token_label("\x00") == "\\x00"
    assert token_label("漢") == NO_GLYPH
    assert token_label("a" * 40).endswith("…")
    assert token_label("$x_{") == "$x_{"


def test_figures_draw_odd_tokens_without_a_warning(tmp_path):
    tokens = ["\n", "\t", "$", "$x$", "_{", "漢", "😀", "\x00", "", "   ", "\ufffd", "a" * 50, "\\frac", "%", "<b>"]
    count = len(tokens)
    heads = [
        {"layer": 1, "head": i, "span": 1.0 + i, "local": i == 0, "global": i == 2, "receiver": 0.5, "kurtosis": None}
        for i in range(3)
    ]
    text = {
        "where": "$odd$ row",
        "tokens": tokens,
        "waad": [1.0] * count,
        "fai": [None] * count,
        "entropy": [0.0] * count,
        "weights": {rule: [1.0] * count for rule in ("local_chunk", "global_anchor", "coupled_rhythm")},
    }
    maps = [[0.0] * count] * count
    report = {"model": "a$b$", "layers": [1], "window": 10, "horizon": [10, 100], "heads": heads, "texts": [text]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for local_map in (maps, None):
            report["figure"] = {"text": 0, "tokens": count, "local_map": local_map, "global_map": local_map}
            draw_rhythm(report, tmp_path / "rhythm.png")
        draw_heads(report, tmp_path / "heads.png")
    for name in ("rhythm.png", "heads.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def broken(models, tmp_path_factory):
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
    models, broken, tmp_path, monkeypatch, capsys, model, arguments, expected
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


def test_a_file_that_cannot_be_written_is_named(models, tmp_path, capsys):
    (tmp_path / "rhythm.png").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--model", str(models / "llama"), *TEXT, "--output", str(tmp_path)])
    assert ended.value.code == 2
    *_, told = capsys.readouterr().err.splitlines()
    assert told == f"rlattn: {tmp_path / 'rhythm.png'}: cannot be read or written: Is a directory."


def test_a_mistake_in_the_arguments_needs_no_torch(tmp_path):
    code = (
        "import sys\nfrom rlattn.cli import main\n"
        "try: main(['inspect', '--model', 'here/is/nothing', '--prompt', 'x'])\n"
        "except SystemExit as end: print(end.code)\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "2\n"
    assert "no folder 'here/is/nothing'" in result.stderr


def test_as_a_command_it_writes_into_inspect_and_says_so(models, tmp_path):
    command = [sys.executable, "-m", "rlattn.cli", "inspect", "--model", str(models / "qwen3"), *TEXT]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {file.name for file in (tmp_path / "inspect").iterdir()} == {"inspect.json", "rhythm.png", "heads.png"}
    assert "Warning" not in result.stderr
    *_, last = result.stdout.strip().splitlines()
    assert last.startswith("Next: ")
