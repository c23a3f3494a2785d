"""A run that W&B would refuse is refused before a model loads."""

import pytest

from rlattn.errors import UserError
from rlattn.preflight.wandb_login import check_wandb
from rlattn.run.wandb import wandb_environment

NETRC = "machine api.wandb.ai\n  login user\n  password {}\n".format("x" * 40)


@pytest.mark.parametrize("environment", [{"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}, {"WANDB_API_KEY": "x"}])
def test_offline_or_with_a_key_it_may_run(environment, tmp_path):
    check_wandb(environment, tmp_path)


def test_without_a_key_it_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no API key for https://api\.wandb\.ai.*wandb login.*WANDB_MODE=offline"):
        check_wandb({}, tmp_path)
    with pytest.raises(UserError, match=r"WANDB_MODE: 'ofline' is no mode .*'offline'"):
        check_wandb({"WANDB_MODE": "ofline"}, tmp_path)


def test_what_wandbs_own_commands_have_written_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".netrc").write_text(NETRC)
    check_wandb({}, tmp_path)
    with pytest.raises(UserError, match=r"no API key for https://wandb\.lab"):
        check_wandb({"WANDB_BASE_URL": "https://wandb.lab"}, tmp_path)
    (tmp_path / ".netrc").unlink()
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nmode = offline\n")  # `wandb offline`
    check_wandb({}, tmp_path)


def test_a_damaged_run_id_is_named(tmp_path):
    first = wandb_environment(tmp_path)
    assert wandb_environment(tmp_path) == first
    (tmp_path / "wandb-id.txt").write_text("a/b c:")
    with pytest.raises(UserError, match=r"wandb-id\.txt: holds no W&B run id"):
        wandb_environment(tmp_path)
