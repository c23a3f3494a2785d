"""Text and token ids: what a policy reads begins once, what it wrote is read whole, turns end as the template says."""

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

from rlattn import AttentionGRPOTrainer
from rlattn.formats.monitored_response import parse_four_parts
from rlattn.grpo.dialogues import Dialogue, hold
from rlattn.grpo.held_out import in_one_turn, score_greedy
from rlattn.grpo.multimodal_prompts import ask
from rlattn.grpo.reward_function import RewardFunction
from rlattn.grpo.second_rollouts import generate_texts
from rlattn.policy.chat_tokens import completion_text, encode_dialogue
from rlattn.policy.generate import write_hf
from rlattn.policy.prompts import decode, render_ids, render_text, text_ids
from rlattn.rewards.accuracy import Accuracy
from rlattn.rewards.format import Format
from rlattn.tasks.dataset.task import DatasetTask

TURNS = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MARKS = ["<think>", "</think>", "<answer>", "</answer>", "<monitor>", "</monitor>", "<label>", "</label>", "<output>"]
ROW = {"prompt": "What is 2+2?", "answer": "4"}


def spelling(*specials, bos=None, add_eos=False, eos="<eos>", pad="<pad>", template=TURNS):
    """A tokenizer with a token a byte, and special ones: pad, end of text, and what a template or rewards write."""
    marks = [*dict.fromkeys([pad, eos, "<|turn|>", "<|done|>", *([bos] if bos else []), *specials])]
    vocabulary = {token: i for i, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    if bos:
        around = f"{bos} $A {eos}" if add_eos else f"{bos} $A"
        named = [(bos, vocabulary[bos]), (eos, vocabulary[eos])]
        core.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    tokens = {"eos_token": eos, "pad_token": pad, **({"bos_token": bos} if bos else {})}
    made = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **tokens)
    made.chat_template = template
    return made


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- what a policy wrote ---


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"<think>It could be \boxed{5}.</think><answer>4</answer>", 1.0),
        (r"<think>Is it \boxed{4}? No.</think><answer>5</answer>", 0.0),
    ],
)
def test_marks_are_read_whether_or_not_they_are_special_tokens(text, right, special):
    tokenizer, task = spelling(*(MARKS if special else [])), DatasetTask(path="unused.jsonl")
    ids = [*ids_of(tokenizer, text), tokenizer.eos_token_id]
    assert decode(tokenizer, ids) == text
    for reward, expected in ((Accuracy(), right), (Format(), 1.0)):
        score = RewardFunction("reward", reward, task, tokenizer, {})
        assert score([ROW["prompt"]], completion_ids=[ids], row=[ROW]) == [expected]
    example = {"prompt": ROW["prompt"], "row": ROW}
    outcomes, kept = score_greedy(
        in_one_turn(lambda prompts: [ids], tokenizer, {}), tokenizer, task, [example],
        calls=1, batch_size=1, filler=example, template_kwargs={}, samples=1,
    )  # fmt: skip
    assert (outcomes[0].right, kept[0]["completion"]) == (right, text)


def test_only_padding_beginning_and_end_tokens_are_dropped():
    tokenizer = spelling(*MARKS, bos="<s>")
    done = tokenizer.convert_tokens_to_ids("<|done|>")
    ids = ids_of(tokenizer, "<s><think>a</think> b<|turn|>c<|done|><eos><pad>")
    assert decode(tokenizer, ids, [done]) == "<think>a</think> b<|turn|>c"
    assert decode(tokenizer, ids) == "<think>a</think> b<|turn|>c<|done|>"


def test_the_four_parts_are_read_where_their_tags_are_special_tokens():
    tokenizer = spelling(*MARKS)
    text = "<think> a </think> <monitor> b </monitor> <label> safe </label> <output> 4 </output>"
    parts = parse_four_parts(decode(tokenizer, [*ids_of(tokenizer, text), tokenizer.eos_token_id]))
    assert parts is not None and (parts.thought, parts.label, parts.output) == ("a", "safe", "4")


def test_a_thought_that_the_prompt_opened_and_nobody_closed_holds_no_answer():
    tokenizer = spelling(template=TURNS.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    task = DatasetTask(path="unused.jsonl")
    prompt = [{"role": "user", "content": ROW["prompt"]}]
    score = RewardFunction("accuracy", Accuracy(), task, tokenizer, {})
    texts = [r"It is \boxed{4}", r"It is \boxed{5}.</think> \boxed{4}", r"It is \boxed{4}.</think> \boxed{5}"]
    completions = [ids_of(tokenizer, text) for text in texts]
    assert score([prompt] * 3, completion_ids=completions, row=[ROW] * 3) == [0.0, 1.0, 0.0]
    example = {"prompt": prompt, "row": ROW}
    outcomes, _ = score_greedy(
        in_one_turn(lambda prompts: completions, tokenizer, {}), tokenizer, task, [example] * 3,
        calls=1, batch_size=3, filler=example, template_kwargs={},
    )  # fmt: skip
    assert [outcome.right for outcome in outcomes] == [0.0, 1.0, 0.0]


# --- dialogues ---


class Asking:
    questions, style, turn_tokens = 2, "text", 16

    def __init__(self):
        self.heard = []

    def reply(self, turn, row):
        self.heard.append(turn)
        return f"Answer {len(self.heard)}."


def held(tokenizer, turns, ends=()):
    """A dialogue in which the policy says `turns`: the dialogue, what the task heard, and the template's own text."""
    task, left = Asking(), iter(turns)
    asked = {"role": "user", "content": "Ask."}
    dialogue = Dialogue(prompt_ids=render_ids(tokenizer, [asked], {}), row={})
    hold(
        lambda prompts: ([ids_of(tokenizer, next(left)) for _ in prompts], None), tokenizer, task, [dialogue],
        most_tokens=500, template_kwargs={}, ends=ends,
    )  # fmt: skip
    said = [{"role": "assistant", "content": text} for text in task.heard]
    told = [{"role": "user", "content": f"Answer {number}."} for number in range(1, len(said) + 1)]
    messages = [asked, *(message for pair in zip(said, told, strict=True) for message in pair)]
    return dialogue, task.heard, render_text(tokenizer, messages, {})


GLM = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>{{ '\n' }}"
PROSE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.mark.parametrize(
    ("template", "end", "trained"),
    [
        (TURNS, "<|done|>", "<|done|>"),  # the template's end, as Gemma, Phi and Llama 3 write it
        (TURNS, "<eos>", ""),  # the tokenizer's own, which the template never writes
        (TURNS, "<|other|>", ""),  # another one of the model's
        (TURNS, "", ""),  # a turn that was cut
        (GLM, "<|user|>", "<|user|>"),  # turns end where the next begins
        (PROSE, "<eos>", ""),
    ],
)
def test_every_turn_follows_what_the_chat_template_makes_of_those_before(template, end, trained):
    tokenizer = spelling("<|other|>", "<|user|>", "<|assistant|>", template=template)
    ends = [tokenizer.convert_tokens_to_ids(mark) for mark in ("<|done|>", "<|other|>", "<|user|>")]
    dialogue, heard, expected = held(tokenizer, [f"What size?{end}", f"Why?{end}", f"So.{end}"], ends)
    assert heard == ["What size?", "Why?"]
    assert tokenizer.decode(dialogue.prompt_ids + dialogue.completion_ids) == f"{expected}So.{end}"
    own = [token for token, mine in zip(dialogue.completion_ids, dialogue.policy_mask, strict=True) if mine]
    assert tokenizer.decode(own) == f"What size?{trained}Why?{trained}So.{end}"
    said = completion_text(tokenizer, dialogue.completion_ids, dialogue.policy_mask, ends).split("<reply>")
    assert said[0].strip() == "What size?" and said[2].endswith("So.")


def test_a_turn_ends_at_the_templates_end_where_generation_does_not():
    """As with a base model whose generation settings name its end of text alone."""
    tokenizer = spelling()
    dialogue, heard, expected = held(tokenizer, ["One?<|done|>\n<|turn|>user\nMine.", "Two?<|done|>", "So.<|done|>"])
    assert heard == ["One?", "Two?"]
    assert tokenizer.decode(dialogue.prompt_ids + dialogue.completion_ids) == f"{expected}So.<|done|>"


def test_a_turn_of_nothing_but_a_foreign_end_token_ends_the_dialogue():
    tokenizer = spelling()
    dialogue, _, _ = held(tokenizer, ["<eos>"])
    assert dialogue.over and dialogue.completion_ids == [tokenizer.eos_token_id] and dialogue.policy_mask == [True]


def test_written_turns_end_as_the_template_ends_them():
    tokenizer = spelling()
    ids, own = encode_dialogue(tokenizer, [("What size?", "Small."), ("So.", None)])
    assert tokenizer.decode(ids) == ("What size?<|done|>\n<|turn|>user\nSmall.<|done|>\n<|turn|>assistant\nSo.<|done|>")
    policys = [token for token, mine in zip(ids, own, strict=True) if mine]
    assert tokenizer.decode(policys) == "What size?<|done|>So.<|done|>"


def test_special_marks_stay_in_a_transcript():
    tokenizer = spelling("<spec>", "</spec>")
    ids, own = encode_dialogue(tokenizer, [("<spec> a </spec>?", "Small."), ("<spec> b </spec>", None)])
    text = completion_text(tokenizer, ids, own)
    assert text.startswith("<spec> a </spec>? <reply>") and text.endswith("</reply> <spec> b </spec>")
    assert "<|turn|>" not in text and "<|done|>" not in text


# --- what a policy reads ---

PLAIN, CHAT = "2+2 is", [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize("template", ["{{ bos_token }}" + TURNS, TURNS])
@pytest.mark.parametrize("prompt", [PLAIN, CHAT])
def test_a_second_rollout_and_a_stored_prompt_begin_as_the_policy_s_own_does(template, prompt):
    tokenizer = spelling(bos="<s>", template=template)
    read = list(render_ids(tokenizer, prompt, {}))
    text = render_text(tokenizer, prompt, {})
    assert ask(tokenizer, [text, [text, [7]]]).prompt_ids == [read, [*read, 7]]
    assert render_ids(tokenizer, text, {}) == read  # `inspect --plain`, and data that has been rendered


def test_a_text_begins_as_the_tokenizer_begins_texts_once_and_goes_on():
    tokenizer = spelling(bos="<s>", add_eos=True)
    begun = [tokenizer.bos_token_id, *ids_of(tokenizer, PLAIN)]
    assert text_ids(tokenizer, PLAIN) == text_ids(tokenizer, f"<s>{PLAIN}") == begun  # and no end token after it
    assert text_ids(tokenizer, [[5], PLAIN]) == [5, *begun[1:]]  # ids stay what they are
    assert text_ids(spelling(), PLAIN) == ids_of(spelling(), PLAIN)


# --- padding ---


def policy(tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


STOPS = ("0", "1", "2", "3", "k", "x", "z")


def is_whole(tokenizer, ids, most):
    """Whether a completion holds what was written up to its stop text, end token or limit, and nothing after it."""
    text = tokenizer.decode(ids[:-1])
    stopped = tokenizer.decode(ids[-1:]) in STOPS
    return not any(stop in text for stop in STOPS) and (
        stopped or ids[-1] == tokenizer.eos_token_id or len(ids) == most
    )


@pytest.mark.parametrize("pad", ["<eos>", "x", "<pad>"])
def test_padding_after_a_stop_text_is_no_part_of_a_completion(pad):
    """Whatever the padding token is: the end token, as for many policies, or one that the policy writes."""
    tokenizer = spelling()
    tokenizer.pad_token = pad
    torch.manual_seed(0)
    written = write_hf(
        policy(tokenizer), tokenizer, [ids_of(tokenizer, f"{i}?") for i in range(16)],
        max_new_tokens=40, temperature=1.0, stop_strings=STOPS,
    )  # fmt: skip
    assert len({len(ids) for ids in written}) > 3
    assert all(is_whole(tokenizer, ids, 40) for ids in written)


class Seen:
    """Keeps what rewards read, and asks for second rollouts."""

    def __init__(self):
        self.rollouts, self.second = [], []

    def prepare(self, batch):
        self.rollouts += batch.rollouts
        self.second += batch.generate([rollout.prompt_text for rollout in batch.rollouts], max_new_tokens=4)
        return [None] * len(batch.rollouts)

    def score(self, rollout):
        return float(len(rollout.completion_ids))


def test_training_reads_rendered_texts_once_begun_and_trains_on_no_padding(tmp_path):
    tokenizer = spelling(bos="<s>", pad="<eos>", template="{{ bos_token }}" + TURNS)
    reward, read = Seen(), []

    class Spy(AttentionGRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *rest, **more):
            read.append(prompt_ids)
            return super()._generate_single_turn(prompt_ids, *rest, **more)

    prompts = [PLAIN, render_text(tokenizer, CHAT, {})]
    trainer = Spy(
        model=policy(tokenizer),
        reward_funcs=[RewardFunction("seen", reward, DatasetTask(path="unused.jsonl"), tokenizer, {})],
        args=GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=2,
            per_device_train_batch_size=8, num_generations=4, max_completion_length=40, gradient_checkpointing=False,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "row": ROW} for prompt in prompts]),
        processing_class=tokenizer,
        stop_strings=STOPS,
    )  # fmt: skip
    trainer.train()
    expected = {(tokenizer.bos_token_id, *ids_of(tokenizer, PLAIN)), tuple(render_ids(tokenizer, CHAT, {}))}
    assert {tuple(ids) for batch in read for ids in batch} == expected  # first and second rollouts alike
    assert len(reward.rollouts) == len(reward.second) == 16
    assert all(is_whole(tokenizer, list(rollout.completion_ids), 40) for rollout in reward.rollouts)
    assert generate_texts(trainer.port, ask(tokenizer, prompts), max_new_tokens=3)
