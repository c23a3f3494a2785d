"""Captured metrics against transformers' own eager attention maps, reduced in float64, on many architectures."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.masking_utils import create_sliding_window_causal_mask

from rlattn.attention import attention_metrics, rhythm_signals
from rlattn.attention.capture import attention_layers, capture, text_decoder, window_of
from rlattn.attention.row_masks import row_masks
from rlattn.types import AttentionOptions

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "gpt_oss": {"head_dim": 8, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
    "smollm3": {},
    "granite": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # learned positions, no rotary ones
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "phimoe": {"sliding_window": 6, "num_local_experts": 2},  # a window that the mask alone shows
    "qwen2_moe": {
        "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "diffllama": {},  # attends twice a layer, with one query
    "falcon_h1": {
        "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8
    },
}  # fmt: skip
WINDOW, HORIZON = 3, (2, 6)


def build(model_type: str, implementation: str, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, **ARCHITECTURES.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name or "q_proj" in name or "k_proj" in name or "qkv_proj" in name or "c_attn" in name:
            parameter.data.normal_(std=0.3)  # peaked attention, and sinks that take their share
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 64, (3, 24), generator=generator)
    attention_mask = torch.ones(3, 24, dtype=torch.long)
    attention_mask[0, :5] = 0
    attention_mask[1, 20:] = 0
    response_mask = attention_mask.clone()
    response_mask[:, :9] = 0
    response_mask[2, 14] = 0  # a tool's token amid the response
    return input_ids.masked_fill(attention_mask == 0, 0), attention_mask, response_mask


def dense(map_HNN: torch.Tensor, response_N: torch.Tensor):
    """The definitions, written plainly: rows t, columns s."""
    p, n = map_HNN.double(), len(response_N)
    t, s = torch.arange(n)[:, None], torch.arange(n)[None]
    rows = response_N.bool()
    span_H = (p * (t - s).clamp(min=0)).sum(-1)[:, rows].mean(-1)
    waad_HN = (p * (t - s).clamp(0, WINDOW)).sum(-1).masked_fill(~rows, torch.nan)
    inside = (t >= s + HORIZON[0]) & (t <= s + HORIZON[1]) & rows[:, None]
    fai_HN = (p * inside).sum(-2) / inside.sum(-2)
    return span_H, waad_HN, fai_HN.masked_fill(~rows, torch.nan)


def options(layers):
    return AttentionOptions(layers=tuple(layers), window=WINDOW, horizon=HORIZON)


def captured(model, layers):
    input_ids, attention_mask, response_mask = batch()
    with (
        torch.no_grad(),
        capture(model, attention_mask, response_mask, options=options(layers)) as found,
    ):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return found.metrics()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_metrics_are_those_of_the_eager_maps(model_type, implementation):
    eager = build(model_type, "eager")
    # transformers has no sdpa for these: softcap and sinks need the scores
    model = eager if model_type in ("gemma2", "gpt_oss") else build(model_type, implementation)
    input_ids, attention_mask, response_mask = batch()
    with torch.no_grad():
        maps = eager(input_ids=input_ids, attention_mask=attention_mask, output_attentions=True).attentions
    assert len(maps) == 4
    equals_the_maps(captured(model, range(4)), maps, response_mask)


def equals_the_maps(found, maps, response_mask):
    """Of every chosen layer of every text; maps: those of these layers."""
    for layer, map_BHNN in enumerate(maps):
        for row in range(3):
            expected = dense(map_BHNN[row], response_mask[row])
            for metric, reference in zip(found, expected):
                actual = metric[row, layer].double()
                assert torch.equal(actual.isnan(), reference.isnan())
                error = (actual - reference).abs().nan_to_num(0).max()
                assert error <= 1e-5 * max(1, reference.nan_to_num(0).abs().max()), f"layer {layer} row {row}: {error}"


def test_predictor_rows_are_those_that_drew_the_tokens():
    eager, (input_ids, attention_mask, response_mask) = build("llama", "eager"), batch()
    of_rows = AttentionOptions(layers=(1, 2), window=WINDOW, horizon=HORIZON, rows="predictor")
    with torch.no_grad(), capture(eager, attention_mask, response_mask, options=of_rows) as found:
        maps = eager(input_ids=input_ids, attention_mask=attention_mask, output_attentions=True).attentions
    every_waad_BLHN = torch.stack(
        [torch.stack([dense(maps[layer][row], torch.ones(24))[1] for layer in (1, 2)]) for row in range(3)]
    )
    own_BN = response_mask.bool()
    for row in range(3):
        drew = own_BN[row].nonzero().flatten() - 1
        waad_LHT = found.metrics()[1][row][..., own_BN[row]].double()
        torch.testing.assert_close(waad_LHT, every_waad_BLHN[row][..., drew], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("window", [3, 6, 20, 100])
def test_a_window_is_read_off_the_mask_of_any_implementation(implementation, window):
    config = AutoConfig.for_model("mistral", **TINY, sliding_window=window, attn_implementation=implementation)
    attention_mask = batch()[1]
    mask = create_sliding_window_causal_mask(
        config=config, inputs_embeds=torch.zeros(3, 24, 32), attention_mask=attention_mask, past_key_values=None,
        position_ids=None,
    )  # fmt: skip
    assert window_of(mask, attention_mask.bool()) == (window if window < 24 else None)
    assert window_of(None, attention_mask.bool()) is None


def test_masks_are_worked_out_once_a_forward_for_all_layers(monkeypatch):
    model, (input_ids, attention_mask, response_mask) = build("qwen3", "sdpa"), batch()
    whole, made = captured(model, range(4)), []
    monkeypatch.setattr("rlattn.attention.capture.row_masks", lambda *a: made.append(row_masks(*a)) or made[-1])
    monkeypatch.setattr("rlattn.attention.metrics.row_masks", None)
    with torch.no_grad(), capture(model, attention_mask, response_mask, options=options(range(4))) as found:
        for part in (slice(0, 2), slice(2, 3)):  # as TRL chunks its batches
            model(input_ids=input_ids[part], attention_mask=attention_mask[part], use_cache=False)
    assert [len(masks.real_BN) for masks in made] == [2, 1]
    for metric, expected in zip(found.metrics(), whole):
        torch.testing.assert_close(metric, expected, equal_nan=True)


def hybrid(implementation):
    pattern = ["linear_attention", "full_attention"] * 2
    return build(
        "qwen3_next", implementation, head_dim=8, layer_types=pattern, num_experts=0, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, decoder_sparse_step=1,
        mlp_only_layers=[0, 1, 2, 3],
    )  # fmt: skip


def test_a_hybrid_refuses_its_linear_layers_by_number_and_reads_the_others():
    model, (input_ids, attention_mask, response_mask) = hybrid("sdpa"), batch()
    assert attention_layers(text_decoder(model)) == (1, 3)
    with torch.no_grad():
        seen = hybrid("eager")(input_ids=input_ids, attention_mask=attention_mask, output_attentions=True).attentions
    maps = [map_BHNN for map_BHNN in seen if map_BHNN is not None]
    assert len(maps) == 2
    equals_the_maps(captured(model, (1, 3)), maps, response_mask)
    with pytest.raises(ValueError, match="layer 0 has no queries and keys"):
        captured(model, (0, 1))
    assert set(rhythm_signals(model, *batch()).layers) <= {1, 3}


def test_llama_4_is_read_where_it_attends_to_the_whole_text_and_its_chunked_layers_are_refused():
    def llama4(implementation):
        return build(
            "llama4_text", implementation, head_dim=8, num_local_experts=2, attention_chunk_size=6,
            intermediate_size_mlp=48, no_rope_layers=[1, 1, 1, 0],
        )  # fmt: skip

    input_ids, attention_mask, response_mask = batch()
    with torch.no_grad():
        maps = llama4("eager")(input_ids=input_ids, attention_mask=attention_mask, output_attentions=True).attentions
    model = llama4("sdpa")
    assert attention_layers(text_decoder(model)) == (3,)
    equals_the_maps(captured(model, (3,)), maps[3:], response_mask)
    with pytest.raises(ValueError, match="layer 2 has chunked_attention"):
        captured(model, (2, 3))


def test_a_position_bias_is_refused():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, query = build("llama", "sdpa"), torch.zeros(3, 4, 24, 8)
    module, bias = model.model.layers[1].self_attn, torch.zeros(1, 4, 24, 24)
    with capture(model, *batch()[1:], options=options((1,))), pytest.raises(ValueError, match="layer 1 has a position"):
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, query, query, None, position_bias=bias)


def test_nothing_stays_behind_after_the_context():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = build("llama", "sdpa")
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with pytest.raises(RuntimeError, match="midway"), capture(model, *batch()[1:]):
        raise RuntimeError("midway")
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == before


def test_chunked_forwards_give_what_one_forward_gives():
    model = build("qwen3", "sdpa")
    input_ids, attention_mask, response_mask = batch()
    whole = captured(model, range(4))
    with (
        torch.no_grad(),
        capture(model, attention_mask, response_mask, options=options(range(4))) as found,
    ):
        for row in range(3):
            model(input_ids=input_ids[row : row + 1], attention_mask=attention_mask[row : row + 1], use_cache=False)
    for one, many in zip(whole, found.metrics()):
        torch.testing.assert_close(one, many, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_gradients_and_logits_are_untouched():
    model = build("qwen3", "sdpa")
    input_ids, attention_mask, response_mask = batch()

    def gradients():
        model.zero_grad()
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain_logits, plain = gradients()
    with capture(model, attention_mask, response_mask):
        logits, grads = gradients()
    assert torch.equal(logits, plain_logits)
    assert all(torch.equal(a, b) for a, b in zip(plain, grads))


def test_rhythm_signals_stops_after_the_last_chosen_layer_and_gives_entropy_on_request():
    model = build("qwen3", "sdpa")
    calls = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    signals = rhythm_signals(model, *batch(), options=options((1, 2)))
    assert calls == [0, 1]
    assert signals.entropy_BN is None
    entropy = rhythm_signals(model, *batch(), options=options((1, 2)), entropy=True).entropy_BN
    mask = batch()[2].bool()
    assert entropy[mask].isfinite().all()
    assert entropy[~mask].isnan().all()
    assert entropy[mask].max() <= torch.log(torch.tensor(64.0)) + 1e-4


def test_padding_that_the_response_mask_covers_is_no_response():
    model = build("qwen3", "sdpa")
    ids, attention_mask, response_mask = batch()
    attention_mask = attention_mask.clone()
    attention_mask[0, -3:] = 0
    response_mask = response_mask.clone()
    response_mask[0, -3:] = 1
    found = rhythm_signals(model, ids, attention_mask, response_mask, entropy=True)
    expected = rhythm_signals(model, ids, attention_mask, response_mask * attention_mask, entropy=True)
    assert not found.mask_BN[0, -3:].any()
    for name in ("mask_BN", "waad_BN", "fai_BN", "entropy_BN"):
        assert torch.equal(getattr(found, name).nan_to_num(-1), getattr(expected, name).nan_to_num(-1))


def test_masks_and_models_that_do_not_fit_are_refused():
    model = build("qwen3", "sdpa")
    ids, attention_mask, response_mask = batch()
    with pytest.raises(ValueError, match="response_mask: expected"):
        rhythm_signals(model, ids, attention_mask, response_mask[:, 1:])
    with pytest.raises(ValueError, match="attention_mask: expected"):
        rhythm_signals(model, ids, attention_mask[0], response_mask)
    with pytest.raises(ValueError, match="at least one token"):
        rhythm_signals(model, ids[:0], attention_mask[:0], response_mask[:0])
    with pytest.raises(ValueError, match="no head that gives logits"):
        rhythm_signals(model.model, ids, attention_mask, response_mask, entropy=True)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_bfloat16_metrics_are_those_of_float64_maps_of_the_same_queries_and_keys(model_type):
    model = build(model_type, "eager" if model_type in ("gemma2", "gpt_oss") else "sdpa", dtype=torch.bfloat16)
    kept = {}
    original = attention_metrics

    def keep(query, key, **settings):
        kept[len(kept)] = query.double(), key.double(), settings
        return original(query, key, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlattn.attention.capture.attention_metrics", keep)
        found = captured(model, range(4))
    assert len(kept) == 4
    mask_BN = batch()[1].bool()
    for layer, (query, key, settings) in kept.items():
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(2, 3) * settings["scaling"]
        if settings["softcap"]:
            scores = settings["softcap"] * torch.tanh(scores / settings["softcap"])
        place = torch.arange(24)
        distance = place[:, None] - place[None]
        seen = (distance >= 0) & (distance < (settings["sliding_window"] or 24)) & mask_BN[:, None, None, :]
        scores = scores.masked_fill(~seen, -1e9)
        if settings["sinks"] is not None:
            sinks = settings["sinks"].double()[None, :, None, None].expand(3, -1, 24, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        maps = scores.softmax(dim=-1)[..., :24]
        for row in range(3):
            for metric, reference in zip(found, dense(maps[row], batch()[2][row])):
                error = (metric[row, layer].double() - reference).abs().nan_to_num(0).max()
                assert error <= 5e-3 * max(1, reference.nan_to_num(0).abs().max()), f"layer {layer} row {row}: {error}"


def test_of_a_vision_language_model_only_the_text_tower_is_read():
    text = {k: v for k, v in TINY.items() if not k.endswith("token_id")}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2_vl",
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config=vision, image_token_id=60, vision_start_token_id=61, vision_end_token_id=62, video_token_id=63,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    eager = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    input_ids, attention_mask, response_mask = batch()
    input_ids = input_ids.clamp(max=59)
    input_ids[:, 5:9] = torch.tensor([61, 60, 60, 62])
    image = {
        "pixel_values": torch.randn(3 * 8, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 2, 4]] * 3),
        "mm_token_type_ids": (input_ids == 60).long(),
    }
    with torch.no_grad(), capture(model, attention_mask, response_mask, options=options(range(4))) as found:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **image)
    with torch.no_grad():
        maps = eager(input_ids=input_ids, attention_mask=attention_mask, output_attentions=True, **image).attentions
    assert len(maps) == 4
    equals_the_maps(found.metrics(), maps, response_mask)


def test_lora_adapters_are_read_through():
    model = build("qwen3", "sdpa")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with_adapter = captured(adapted, range(4))
    merged = captured(adapted.merge_and_unload(), range(4))
    for one, other in zip(with_adapter, merged):
        torch.testing.assert_close(one, other, equal_nan=True, atol=1e-4, rtol=1e-4)
