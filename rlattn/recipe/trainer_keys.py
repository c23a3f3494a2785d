"""Keys of GRPOConfig that a recipe sets elsewhere, or not at all."""

OWNED_ELSEWHERE = {
    "seed": "seed",
    "output_dir": "output_dir",
    "run_name": "name",
    "report_to": "tracking.report_to",
    "project": "tracking.project",
    "reward_weights": "rewards.<name>.weight",
    "multi_objective_aggregation": "rewards.combine",
    "save_total_limit": "resume.keep_last",
    "model_init_kwargs": "policy (path, revision, dtype, attn_implementation)",
}

REFUSED = {
    "trust_remote_code": "is off in rlattn: a run never executes code from a hub",
    "resume_from_checkpoint": "is not needed: the same command continues the run",
    "push_to_hub": "is not done while training: use `rlattn export RUN --push REPO`",
    "auto_find_batch_size": "would break groups apart: lower trainer.per_device_train_batch_size instead",
    "enable_jit_checkpoint": "is not needed: SIGTERM and SIGUSR1 save and stop, on all ranks alike",
    "eval_on_start": "is not needed: rlattn evaluates before, during and after training",
    **dict.fromkeys(
        ("hub_token", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "is not a recipe's business: log in with `hf auth login` and use `rlattn export RUN --push REPO`",
    ),
    "logging_strategy": "is fixed: every logging_steps steps",
    **dict.fromkeys(("disable_tqdm", "do_train", "do_eval", "do_predict"), "has no effect here"),
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better"), "has no effect: see resume.keep_last and resume.keep_best"
    ),
    **dict.fromkeys(
        ("save_only_model", "ignore_data_skip", "dataloader_persistent_workers"), "would make going on inexact"
    ),
    "load_best_model_at_end": "is not offered: model/ is the final policy; see resume.keep_best",
}

# A checkpoint brings them with it, so that another value would change nothing, or break it.
KEPT_BY_CHECKPOINT = (
    "policy.path",
    "policy.revision",
    "policy.lora",
    "policy.warm_start",
    *(
        f"trainer.{key}"
        for key in (
            "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
            "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio",
        )
    ),
)  # fmt: skip
