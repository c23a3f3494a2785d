"""A checkpoint is whole or it is not used; the last good one is never lost."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch
from conftest import REPO, SMALL, rlattn
from test_resume import untimed
from test_reward_training import Parity, trained, weights
from test_trl_contract import policy  # noqa: F401

from rlattn.errors import UserError
from rlattn.run.run import of_the_disk
from rlattn.run_folder.checkpoints import (
    MANIFEST,
    PARTIAL,
    checkpoint_ranks,
    is_full_disk,
    newest_sound,
    problem,
    rotate,
    seal,
)
from rlattn.run_folder.jsonl import read_rows

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def folder(tmp_path):
    """Three sealed checkpoints of small files."""
    for step in (1, 2, 3):
        partial = tmp_path / PARTIAL / f"checkpoint-{step}"
        (partial / "global_step").mkdir(parents=True)
        (partial / "model.safetensors").write_bytes(bytes(range(256)) * step)
        (partial / "rank-0-of-2.pt").write_bytes(b"rollouts")
        (partial / "global_step" / "zero.pt").write_bytes(b"optimizer")
        seal(tmp_path, partial.name)
    return tmp_path


def damages(file):
    """The file truncated, emptied, with one bit flipped (first, middle, last byte), removed; whole at the end."""
    whole = file.read_bytes()
    flips = [
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in (0, len(whole) // 2, len(whole) - 1)
    ]
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", *flips):
        file.write_bytes(damaged)
        yield
    file.unlink()
    yield
    file.write_bytes(whole)


def test_every_damage_to_every_file_of_a_real_checkpoint_is_found(policy, tmp_path):  # noqa: F811
    trained(policy, tmp_path, {"parity": Parity()}, **SAVING, max_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "rank-0-of-1.pt", MANIFEST} <= {p.name for p in files}
    assert problem(checkpoint) is None
    for file in files:
        for _ in damages(file):
            sound, skipped = newest_sound(tmp_path)
            assert sound == tmp_path / "checkpoint-1"
            assert len(skipped) == 1
            assert skipped[0].startswith("checkpoint-2 is damaged and skipped: ")
            assert file.name in skipped[0]
    assert problem(checkpoint) is None
    assert not (tmp_path / PARTIAL).exists()


def test_all_damaged_is_an_error_that_names_each_and_none_is_a_start(folder, tmp_path):
    for step in (1, 2, 3):
        (folder / f"checkpoint-{step}" / "global_step" / "zero.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-3 is damaged.*checkpoint-1 is damaged.*zero\.pt is missing"):
        newest_sound(folder)
    assert newest_sound(tmp_path / "nothing") == (None, [])


def test_a_manifest_alone_and_one_that_is_a_pipe_are_no_checkpoints(folder):
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / MANIFEST).write_text('{"files": {}}')
    (folder / "checkpoint-8").mkdir()
    os.mkfifo(folder / "checkpoint-8" / MANIFEST)
    (folder / "checkpoint-9").symlink_to("/nowhere")
    sound, skipped = newest_sound(folder)
    assert sound == folder / "checkpoint-3" and len(skipped) == 3
    assert "checkpoint-7 is damaged and skipped: no rank's own file is there" in skipped[2]
    (folder / PARTIAL / "checkpoint-9").mkdir(parents=True)
    (folder / PARTIAL / "checkpoint-9" / "rank-0-of-1.pt").write_bytes(b"x")
    seal(folder, "checkpoint-9")  # in the link's place
    assert problem(folder / "checkpoint-9") is None


def test_a_full_disk_is_told_from_other_failures(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    assert is_full_disk(full) and is_full_disk(RuntimeError("Error while serializing: I/O error (os error 28)"))
    assert not is_full_disk(FileNotFoundError(2, "No such file", "x")) and not is_full_disk(ValueError())
    assert "is full" in str(of_the_disk(full, tmp_path))
    inside, outside = (
        IsADirectoryError(21, "Is a directory", str(place / "samples.jsonl")) for place in (tmp_path, REPO)
    )
    assert "samples.jsonl: Is a directory. Move it away" in str(of_the_disk(inside, tmp_path))
    assert of_the_disk(outside, tmp_path) is None


def test_what_was_never_sealed_is_never_read(folder):
    shutil.copytree(folder / "checkpoint-3", folder / PARTIAL / "checkpoint-9")
    (folder / "checkpoint-8").mkdir()
    sound, skipped = newest_sound(folder)
    assert sound is not None
    assert sound.name == "checkpoint-3"
    assert "checkpoint-8" in skipped[0]
    assert checkpoint_ranks(sound) == 2


def test_rotation_keeps_the_last_and_the_best_and_drops_a_course_that_was_given_up(folder):
    rotate(folder, 3, keep_last=1, best_step=1)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    rotate(folder, 1, keep_last=2)  # checkpoint-3 was damaged, the run went on from 0 and is at 1
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]
    rotate(folder, 1, keep_last=None)
    assert problem(folder / "checkpoint-1") is None


@pytest.mark.parametrize("room", [100_000, 6_000_000])  # not even the weights fit; the weights do, the optimizer not
def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(policy, tmp_path, capsys, room):  # noqa: F811
    class Filling(Parity):
        def prepare(self, batch):  # before the second step: no file may grow past `room`, as on a full disk
            limit = room if batch.step == 1 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return [None] * len(batch.rollouts)

    try:
        trainer = trained(policy, tmp_path, {"filling": Filling()}, **SAVING, max_steps=3, save_total_limit=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said = capsys.readouterr().out
    assert "checkpoint-2 could not be written" in said
    assert "the last good one is checkpoint-1" in said
    assert trainer.state.global_step == 3
    assert sorted(path.name for path in tmp_path.glob("*check*")) == ["checkpoint-1", "checkpoint-3"]
    assert newest_sound(tmp_path) == (tmp_path / "checkpoint-3", [])


FILLING = """
import os, resource
class Filling:
    def prepare(self, batch):
        full = batch.step == 1 and os.environ.get("FULL") == os.environ["RANK"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return [None] * len(batch.rollouts)
    def score(self, rollout): return float(len(rollout.completion_ids) % 2)
"""


def test_a_full_disk_of_one_rank_ends_a_deepspeed_run_which_then_goes_on(tmp_path, monkeypatch):
    (tmp_path / "filling.py").write_text(FILLING)
    command = (
        "train", "quickstart", "output_dir=run", "policy={path: tiny-reasoner, warm_start: {steps: 2, batch_size: 4}}",
        "task={kind: arithmetic, terms: [2, 2], eval_rows: 2, train_rows: 8}",
        "rewards={filling: {python: 'filling:Filling'}}",
        "trainer={max_steps: 2, num_generations: 4, per_device_train_batch_size: 2, max_completion_length: 8,"
        " eval_steps: 9, gradient_checkpointing: false, save_steps: 1, deepspeed: launch/deepspeed/zero2.json}",
    )  # fmt: skip
    monkeypatch.setenv("FULL", "1")
    full = rlattn(*command, cwd=tmp_path, ranks=2)
    assert full.returncode != 0
    assert "rank 1 failed in checkpoint: UserError: output_dir: checkpoint-2 could not be written" in full.stderr
    assert (
        "the last good one is checkpoint-1. Make room on the disk, or mend it; the same command then goes on."
        in full.stderr
    )
    monkeypatch.delenv("FULL")
    again = rlattn(*command, cwd=tmp_path, ranks=2)
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stdout
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]


def test_rotation_in_training_keeps_the_last(policy, tmp_path):  # noqa: F811
    whole = trained(policy, tmp_path, {"parity": Parity()}, **SAVING, max_steps=4, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    again = trained(policy, tmp_path, {"parity": Parity()}, resume=True, **SAVING, max_steps=4)
    assert torch.equal(weights(whole), weights(again))


HASHING = """
import hashlib, os
digest = hashlib.file_digest
def file_digest(*arguments):
    open("hashed-by-" + os.environ.get("RANK", "0"), "w").close()
    return digest(*arguments)
hashlib.file_digest = file_digest
class Silent:
    def score(self, rollout): return None
"""


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_and_one_rank_hashes(tmp_path):
    (tmp_path / "hashing.py").write_text(HASHING)
    settings = (
        *SMALL, "trainer.save_steps=1", "output_dir=run", "rewards.silent={python: 'hashing:Silent'}",
        "trainer.per_device_train_batch_size=4",
    )  # fmt: skip
    assert rlattn("train", "quickstart", *settings, cwd=tmp_path, ranks=2).returncode == 0
    rows = untimed(read_rows(tmp_path / "run/metrics.jsonl"))
    shutil.rmtree(tmp_path / "run/model")  # as if it had been killed before the end
    optimizer = tmp_path / "run/checkpoints/checkpoint-3/optimizer.pt"
    contents = optimizer.read_bytes()
    optimizer.write_bytes(contents[:-7] + bytes([contents[-7] ^ 4]) + contents[-6:])
    result = rlattn("train", "quickstart", *settings, cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.glob("hashed-by-*")] == ["hashed-by-0"]
    assert "checkpoint-3 is damaged and skipped: the contents of optimizer.pt have changed" in result.stdout
    assert "checkpoint-2\n" in result.stdout
    assert untimed(read_rows(tmp_path / "run/metrics.jsonl")) == rows
    manifest = json.loads((tmp_path / "run/checkpoints/checkpoint-3" / MANIFEST).read_text())
    assert "optimizer.pt" in manifest["files"]
