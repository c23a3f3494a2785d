"""Second rollouts of a vision-language policy, with images and blind: a tiny LLaVA (CLIP, Qwen2) in real GRPO steps.

Run as a script under torchrun it writes what its rank was told.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import leave_ranks, torchrun
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import GRPOConfig

from rlattn import AttentionGRPOTrainer
from rlattn.credit import CREDIT_RULES
from rlattn.grpo.multimodal_prompts import ask
from rlattn.grpo.reward_function import RewardFunction
from rlattn.grpo.reward_hooks import RewardOptions
from rlattn.policy.prompts import without_images
from rlattn.policy.tiny import tiny_policy
from rlattn.tasks import Arithmetic
from rlattn.types import AttentionOptions, Rollout, WarmStart

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
QUESTIONS = ("What is 3 + 4 ?", "What is 12 - 5 ? Work it out .", "What is 9 + 9 ?", "10 - 1 ?")


def processor():
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy(Arithmetic(), warm_start=WarmStart(steps=0)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    how = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE, **how)


def policy(tokenizer):
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    mark = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=mark))
    model.model.multi_modal_projector.linear_2.weight.data.normal_(std=2.0)  # what it sees shows in what it writes
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


@dataclass
class Looking:
    """Asks every question again: with its image, blind, and with an image for every other one."""

    lag: int = 2
    told: list = field(default_factory=list)

    def prepare(self, batch):
        texts = [rollout.prompt_text for rollout in batch.rollouts]
        blind = [rollout.blind_text for rollout in batch.rollouts]
        images = [rollout.images for rollout in batch.rollouts]
        assert all(len(of_prompt) == 1 for of_prompt in images)
        half = [text if place % 2 else other for place, (text, other) in enumerate(zip(texts, blind, strict=True))]
        some = [of_prompt if place % 2 else None for place, of_prompt in enumerate(images)]
        self.told.append(
            {
                "step": batch.step, "prompts": texts, "blind prompts": blind,
                "seen": batch.generate(texts, images, max_new_tokens=6),
                "blind": batch.generate(blind, max_new_tokens=6),
                "half": batch.generate(half, some, max_new_tokens=6),
                "old": batch.generate(texts, images, max_new_tokens=6, lagged_policy=True),
            }
        )  # fmt: skip
        return self.told[-1]["seen"]

    def score(self, rollout):
        return float(sum(rollout.completion_ids) % 2) + (rollout.note is None)


def trained(folder, reward, ranks=1, options=None):
    reader = processor()
    rows = [
        {"prompt": [{"role": "user", "content": text}], "image": picture(seed), "row": {"seed": seed}}
        for seed, text in enumerate(QUESTIONS)
    ]
    trainer = AttentionGRPOTrainer(
        model=policy(reader.tokenizer),
        reward_funcs=[RewardFunction("looking", reward, Arithmetic(), reader, {})],
        args=GRPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=3,
            gradient_checkpointing=False, learning_rate=1e-2, num_generations=2, logging_steps=1,
            per_device_train_batch_size=8 // ranks, max_completion_length=8, save_strategy="no", shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=reader,
        credit=CREDIT_RULES["coupled_rhythm"](),
        attention=AttentionOptions(layers=(0, 1, 2), horizon=(1, 4)),
        **({"reward_options": options} if options else {}),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    reward = Looking()
    trainer = trained(tmp_path_factory.mktemp("images"), reward)
    return trainer, reward.told


def alone(model, reader, prompt, image=None):
    """transformers' own greedy answer to one prompt."""
    shown = {} if image is None else {"images": [[image]]}
    inputs = reader(text=[prompt], add_special_tokens=False, return_tensors="pt", **shown)
    length = inputs["input_ids"].shape[1]
    marks = [reader.image_token_id]  # TRL lets no policy write one
    ids = model.eval().generate(**inputs, do_sample=False, max_new_tokens=6, suppress_tokens=marks)[0, length:].tolist()
    end = reader.tokenizer.eos_token_id
    return reader.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)


def test_a_policy_that_is_shown_images_answers_as_transformers_alone_does(run):
    reader = processor()
    model, first = policy(reader.tokenizer), run[1][0]
    questions = {text: seed for seed, text in enumerate(QUESTIONS)}
    for place, prompt in enumerate(first["prompts"]):
        seed = next(seed for text, seed in questions.items() if text in prompt)
        assert first["seen"][place] == alone(model, reader, prompt, picture(seed))
        assert first["blind"][place] == alone(model, reader, first["blind prompts"][place])
        assert first["half"][place] == (first["seen"] if place % 2 else first["blind"])[place]
    assert first["seen"] != first["blind"]
    assert alone(model, reader, first["prompts"][0], picture(77)) != alone(
        model, reader, first["prompts"][0], picture(0)
    )


def test_training_goes_on_with_credit_and_the_lagged_policy_sees_too(run):
    trainer, told = run
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert [log["rewards/looking/failed"] for log in logs] == [0, 0, 0]
    assert all(log["credit/nonfinite_rows"] == 0 and log["credit/max"] > 1 for log in logs)
    assert told[0]["old"] == told[0]["seen"]
    assert told[1]["old"] != told[1]["seen"]  # the policy has moved, its copy has not


def test_images_that_cannot_be_shown_are_told():
    reader = processor()
    with pytest.raises(ValueError, match="reads text only"):
        ask(reader.tokenizer, ["<image> ?"], [[picture(0)]])
    with pytest.raises(ValueError, match=r"prompt 1 has 1 image\(s\), and <image> for 0: 'What is it"):
        ask(reader, ["a", "What is it ?"], [None, [picture(0)]])
    with pytest.raises(ValueError, match=r"prompt 0 has 2 image\(s\), and <image> for 1"):
        ask(reader, ["<image> a", "<image> <image> b"], [[picture(0), picture(1)], [picture(2)]])
    for images, message in [
        ([[picture(0)]], "one entry a prompt, 2, got 1"),
        ({0: [picture(0)]}, "expected a list with one entry a prompt, 2, got dict"),
        ([picture(0), None], r"images\[0\]: expected a list of images, or None, got Image"),
        (["a.png", None], r"images\[0\]: expected a list of images, or None, got str"),
        ([None, ["http://a/b.png"]], r"images\[1\]\[0\]: expected a PIL image or an array, got str"),
        ([None, [None]], r"images\[1\]\[0\]: expected a PIL image or an array, got NoneType"),
    ]:
        with pytest.raises(ValueError, match=message):
            ask(reader, ["<image> ?", "<image> ?"], images)
    assert ask(reader, ["a", ["b", [7]]], [None, []]).images is None
    reader.tokenizer.image_token = "<image>"  # as tokenizers of such policies have it
    assert ask(reader.tokenizer, ["a b"]).prompt_ids == [reader.tokenizer("a b", add_special_tokens=False)["input_ids"]]


def test_a_mark_that_a_policy_quoted_is_text():
    """Were it a mark, one rollout's words would take the image of another, or end the run."""
    reader = processor()
    mark, quoted = reader.image_token_id, "<image> what ? It says <image> there"
    seeing = ask(reader, [quoted, ["<image> ?", [5, 6], " <image>"]], [[picture(0)], [picture(1)]])
    assert [ids.count(mark) for ids in seeing.prompt_ids] == [4, 4]
    assert [5, 6] in [seeing.prompt_ids[1][place : place + 2] for place in range(len(seeing.prompt_ids[1]))]
    assert len(seeing.fields["pixel_values"]) == 2
    blind = ask(reader, [quoted], None)
    assert mark not in blind.prompt_ids[0] and len(blind.prompt_ids[0]) > 6 and not blind.fields


def test_fields_of_tokens_get_a_row_for_every_prompt():
    """As Gemma's and Qwen's `token_type_ids`: a prompt without images has zeros."""
    reader = processor()

    class Typed:
        tokenizer, image_processor, image_token = reader.tokenizer, reader.image_processor, "<image>"

        def __call__(self, **asked):
            made = reader(**asked)
            mark = reader.image_token_id
            return {**made, "token_type_ids": [[int(token == mark) for token in ids] for ids in made["input_ids"]]}

    asked = ask(Typed(), ["two plus", "<image> ? <image>", "<image>"], [None, [picture(0), picture(1)], [picture(2)]])
    types = asked.fields["token_type_ids"]
    assert [len(row) for row in types] == [len(ids) for ids in asked.prompt_ids]
    assert [sum(row) for row in types] == [0, 8, 4]
    assert len(asked.fields["pixel_values"]) == 3


def test_images_are_found_in_messages():
    parts = [{"type": "image", "image": "A"}, "?", {"type": "image", "image": None}]
    messages = [{"role": "system", "content": "look"}, {"role": "user", "content": parts}, {"role": "assistant"}]
    given = {"prompt_text": "", "completion": "", "row": {}, "task": None}
    assert Rollout(prompt=messages, **given).images == ["A"]
    assert Rollout(prompt="What ?", **given).images == []
    assert without_images(messages)[1] == {"role": "user", "content": ["?"]}
    assert without_images(messages, keep_marks=True)[1]["content"] == [{"type": "image"}, "?", {"type": "image"}]
    assert without_images(messages)[::2] == messages[::2] and without_images("What ?") == "What ?"


@dataclass
class Careless:
    """Calls what the arguments do not allow."""

    call: dict
    heard: list = field(default_factory=list)

    def prepare(self, batch):
        try:
            batch.generate([rollout.prompt_text for rollout in batch.rollouts], **self.call)
        except ValueError as error:
            self.heard.append(str(error))
        return [None] * len(batch.rollouts)

    def score(self, rollout):
        return float(sum(rollout.completion_ids) % 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"max_new_tokens": 2, "lagged_policy": True}, "attribute `lag`"),
        ({"max_new_tokens": 2, "first_policy": True}, "attribute `first_policy`"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 2, "temperature": -1}, "temperature -1"),
    ],
)
def test_a_call_that_cannot_be_is_refused(call, message, tmp_path):
    reward = Careless(call)
    trained(tmp_path, reward)
    assert message in reward.heard[0]


def test_a_failure_is_kept_with_its_question(tmp_path):
    class Failing:
        def score(self, rollout):
            raise ValueError("boom")

    kept = []
    options = RewardOptions(requires={}, ramps={}, max_failed_share=1.0, on_failure=kept.append)
    trained(tmp_path, Failing(), options=options)
    assert kept[0]["prompt"][0]["content"] == [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]


def test_two_ranks_are_told_what_one_is(run, tmp_path):
    result = torchrun(__file__, str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name in ("prompts", "seen", "blind", "half"):
        assert ranks[0][0][name] + ranks[1][0][name] == run[1][0][name]


if __name__ == "__main__":
    looking = Looking()
    trained(sys.argv[1], looking, ranks=2)
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(looking.told))
    leave_ranks()
