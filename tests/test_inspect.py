"""`rlattn inspect` on tiny models of several architectures, through the command line as a user would."""

import json
import math
import subprocess
import warnings

import pytest
import tokenizers
import torch
from conftest import command_without
from forked import PYTHON
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


def test_a_mistake_in_the_arguments_needs_no_torch(tmp_path):
    arguments = ["inspect", "--model", "here/is/nothing", "--prompt", "x"]
    result = command_without({"torch", "transformers", "matplotlib"}, *arguments, cwd=tmp_path)
    assert result.stdout == "2\n"
    assert "no folder 'here/is/nothing'" in result.stderr


def test_as_a_command_it_writes_into_inspect_and_says_so(models, tmp_path):
    command = [*PYTHON, "-m", "rlattn.cli", "inspect", "--model", str(models / "qwen3"), *TEXT]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {file.name for file in (tmp_path / "inspect").iterdir()} == {"inspect.json", "rhythm.png", "heads.png"}
    assert "Warning" not in result.stderr
    *_, last = result.stdout.strip().splitlines()
    assert last.startswith("Next: ")
