"""The report of a run folder: what is there, what is missing, and safe against what a policy may write."""

import html.parser
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlattn.grpo.token_log import write_tokens
from rlattn.recipe.load import load_recipe
from rlattn.report import page, read_run, write_report
from rlattn.report.alarms import ACCURACY, enough_for_alarms, find_alarms, onset
from rlattn.report.data import curves
from rlattn.report.metrics import describe_metric
from rlattn.report.thin import shortened, spread, thinned
from rlattn.run_folder.jsonl import append_row

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\u200b<!--"


def rollout(number=0, text=("<answer>", " 4"), right=1.0, credit=True):
    count = len(text)
    signals = {"waad": [3.0] * count, "fai": [0.5] * (count - 1) + [float("nan")]} if credit else {}
    marks = {"anchor": [True] * count, "preplan": [False] * count} if credit else {}
    return {
        "rollout": number, "group": number // 4, "trained": [True] * count, "token_id": list(range(count)),
        "token": list(text), "advantage": [0.5] * count, "logprob": [-0.1] * count, "entropy": [0.2] * count,
        "weight": [1.5] * count, "reward": right, "rewards": {"accuracy": right}, "prompt": "2 + 2 ?",
        **signals, **marks,
    }  # fmt: skip


def run_folder(folder, completion="<answer> 4 </answer>"):
    (folder / "recipe.yaml").write_text("name: x\ntrainer:\n  max_steps: 40\n")
    (folder / "environment.json").write_text('{"rlattn": "0"}')
    for step in range(3):
        row = {"step": step, "reward": 0.1 * step, "entropy": float("nan"), "rewards/accuracy/mean": 0.5}
        if step != 1:
            row |= {"eval/accuracy": 0.25 * (step + 1), "eval/low": 0.2, "eval/high": 0.8}
        append_row(folder / "metrics.jsonl", row)
    sample = {"step": 2, "prompt": "2 + 2 ?", "completion": completion, "gold": "4", "score": 1.0}
    append_row(folder / "samples.jsonl", sample)
    write_tokens(folder / "tokens/step-000002.parquet", [rollout(0, ["a", completion]), rollout(5, right=0.0)])
    heads = {"layers": [1], "span": [[2.0, 9.0]], "local": [[1.0, 0.0]], "global": [[0.0, 1.0]]}
    append_row(folder / "heads.jsonl", {"step": 2, **heads})
    return folder


class Scripts(html.parser.HTMLParser):
    """What a browser would take for elements, and the text of scripts."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text):
        if self.tags[-1:] and self.tags[-1][0] == "script":
            self.texts.append(text)


def parsed(text):
    parser = Scripts()
    parser.feed(text)
    return parser


def test_a_report_holds_everything_and_needs_no_network(tmp_path):
    found = parsed(write_report(run_folder(tmp_path)).read_text())
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert not [attrs for _, attrs in found.tags if {"src", "href"} & attrs.keys()]
    policy = next(attrs["content"] for tag, attrs in found.tags if "Content-Security-Policy" in attrs.values())
    assert "default-src 'none'" in policy and "unsafe" not in policy
    data = json.loads(found.texts[0])
    titles = [curve["title"] for curve in data["curves"]]
    assert titles[:3] == ["Reward", "Rewards", "Held-out accuracy"]
    assert data["curves"][2]["series"][0]["band"] == [[0, 0.2, 0.8], [2, 0.2, 0.8]]
    assert [(r["step"], r["rollout"], r["right"]) for r in data["tokens"]["rollouts"]] == [(2, 0, True), (2, 5, False)]
    assert data["tokens"]["rollouts"][1]["fai"] == [0.5, None]
    assert data["tokens"]["rollouts"][0]["marks"] == "11"
    assert data["heads"]["steps"][0]["span"] == [[2, 9]]
    assert {"label": "Steps", "value": "2 of 40", "note": "running, or stopped early"} in data["tiles"]


def test_hostile_text_stays_data(tmp_path):
    text = page(read_run(run_folder(tmp_path, HOSTILE)))
    found = parsed(text)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in found.tags]
    assert json.loads(found.texts[0])["samples"][0]["completion"] == HOSTILE
    assert HOSTILE in json.loads(found.texts[0])["tokens"]["vocabulary"]
    assert not {"\u202e", "\u200b"} & set(text)


def test_it_tells_what_failed_and_what_the_run_was(tmp_path):
    run = run_folder(tmp_path)
    for step, count in ((3, 2), (4, 5)):
        append_row(run / "metrics.jsonl", {"step": step, "rewards/mine/failed": count})
        row = {"step": step, "reward": "mine", "failed": count, "problem": f"KeyError: '{step}'", "completion": HOSTILE}
        append_row(run / "failures.jsonl", row)
    recipe = load_recipe("quickstart", ["credit.top_fraction=0.3", f"output_dir={run}"])
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    data = read_run(run)
    told = {"reward": "mine", "step": 3, "problem": "KeyError: '3'", "completion": HOSTILE, "count": 7}
    assert data["failures"] == [told]
    assert dict(data["setup"]) == {
        "policy": "tiny-reasoner", "task": "arithmetic", "rewards": "accuracy × 1, format × 0.1 (sum)",
        "credit": "coupled_rhythm, top_fraction 0.3", "learning rate": "0.00015", "seed": "0",
    }  # fmt: skip
    assert HOSTILE not in page(data)
    (run / "recipe.yaml").write_text("policy: [\n")
    assert read_run(run)["setup"] == []


def test_only_what_was_logged_is_explained(tmp_path):
    names = [line[0] for line in read_run(run_folder(tmp_path))["metrics"]]
    assert "reward" in names and "rewards/*/mean" in names and "self_monitor/lambda" not in names


def test_every_curve_has_its_own_caption_where_they_differ():
    rows = [{"step": 1, "completions/clipped_ratio": 0.5, "completions/duplicates": 0.7, "rewards/a/mean": 1.0}]
    by_title = {chart["title"]: chart for chart in curves([{**rows[0], "rewards/b/mean": 0.0}])}
    assert by_title["Rewards"]["about"] and "about" not in by_title["Rewards"]["series"][0]
    healthy = [one["about"].rpartition("Healthy: ")[2] for one in by_title["Cut and repeated rollouts"]["series"]]
    assert healthy == ["< 0.3.", "< 0.9."] and not by_title["Cut and repeated rollouts"]["about"]


def damage_nothing(run):
    shutil.rmtree(run)
    run.mkdir()


def damage_torn(run):
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3, "rew')
    (run / "summary.json").write_text('{"sec')
    (run / "tokens/step-000003.parquet").write_bytes(b"PAR1 torn")


def damage_metrics(run):
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('[1]\n"x"\n\0\0\n{"reward": 1}\n{"step": true}\n{"step": 1' + 40 * "0" + "}\n")
        lines.write('{"step": 3, "reward": "nan", "eval/accuracy": NaN, "eval/low": [1], "kl": 1' + 400 * "0" + "}\n")
        lines.write('{"step": 4, "self_monitor/alarm": 1, "self_monitor/safe": "all", "eval/effort_x/tokens": 1}\n')


def damage_disk(run):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/proc/self/mem")  # reading it is an input/output error


def damage_foreign(run):
    pq.write_table(pa.table({"rollout": [1], "token": [None], "weight": [float("nan")]}), run / "tokens/step-3.parquet")
    pq.write_table(pa.table({"rollout": ["a"], "token": ["b"], "reward": ["c"]}), run / "tokens/step-4.parquet")
    (run / "tokens/step-5.parquet").mkdir()


def damage_flipped(run):
    (file,) = (run / "tokens").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 8] ^= 255
    file.write_bytes(content)


def damage_old(run):
    shutil.rmtree(run / "tokens")
    (run / "heads.jsonl").unlink()
    append_row(run / "metrics.jsonl", {"step": 3, "reward": "high", "eval/accuracy": [1]})
    append_row(run / "samples.jsonl", {"step": 3})
    (run / "summary.json").write_text('{"seconds": "long", "supervised_control": 3}')


def damage_pipes(run):
    for name in ("recipe.yaml", "summary.json", "tokens/step-000009.parquet"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)


def damage_links(run):
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").symlink_to("/etc/passwd")
    (run / "environment.json").unlink()
    (run / "environment.json").symlink_to("/dev/zero")


def damage_names(run):
    append_row(run / "metrics.jsonl", {"step": 3, "x" * 3_000_000: 1.0})


def damage_heads(run):
    (run / "heads.jsonl").write_text('{"step": 1, "layers": [1], "span": [[1]], "local": 3, "global": []}\n')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_nothing, "metrics.jsonl"),
        (damage_torn, "step-000003.parquet: ArrowInvalid"),
        (damage_torn, "metrics.jsonl: lines that cannot be read are left out (4)."),
        (damage_torn, "Nothing to be read in summary.json."),
        (damage_metrics, "metrics.jsonl: lines that cannot be read are left out (4, 5, 6, 7, 8 and 1 more)."),
        (damage_metrics, "no finite number is left out (eval/accuracy, eval/low, kl, reward, self_monitor/safe)."),
        (damage_disk, "metrics.jsonl cannot be read (Input/output error)."),
        (damage_foreign, "left out (step-4.parquet: ValueError, step-5.parquet: "),
        (damage_flipped, "step-000002.parquet: OSError"),
        (damage_old, "tokens/"),
        (damage_pipes, "Nothing to be read in recipe.yaml."),
        (damage_links, "Nothing to be read in recipe.yaml."),
        (damage_names, "metrics.jsonl: names of more than 200 characters are left out (1)."),
        (damage_heads, "Nothing to be read in heads.jsonl."),
    ],
)
def test_a_damaged_folder_gives_a_report_of_what_is_there(tmp_path, damage, said):
    (tmp_path / "run").mkdir()
    run = run_folder(tmp_path / "run")
    damage(run)
    data = read_run(run)
    assert any(said in line for line in data["missing"])
    text = write_report(run).read_text()
    assert len(text) < 1e6 and "root:" not in text


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path):
    run = run_folder(tmp_path)
    (run / "report.html").mkdir()
    with pytest.raises(OSError, match="report"):
        write_report(run)
    assert not list(run.glob(".*partial"))


def test_a_runs_name_cannot_turn_the_title_around(tmp_path):
    (tmp_path / "a\u202eb").mkdir()
    assert "<title>aU+202Eb - rlattn</title>" in page(read_run(run_folder(tmp_path / "a\u202eb")))


def test_thinned_curves_keep_their_extremes():
    points = [[i, 0.0] for i in range(10_000)]
    points[4321][1], points[7777][1] = 5.0, -3.0
    kept = thinned(points)
    assert [4321, 5.0] in kept and [7777, -3.0] in kept
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert kept == sorted(kept)


def test_the_beginning_of_a_spread_order_is_spread():
    assert spread(list(range(9))) == [0, 8, 4, 2, 6, 1, 3, 5, 7]
    assert spread([1]) == [1] and spread([]) == []


def test_a_shortened_text_says_how_much_is_gone():
    assert shortened("all", 10) == "all"
    assert shortened("a" * 500 + "b" * 500, 102) == 50 * "a" + " [… 900 characters left out …] " + 50 * "b"
    assert len(json.dumps(shortened("的" * 10_000, 600))) < 700


def rows(key, early, late):
    return [{"step": i + 1, key: early if i < 15 else late} for i in range(30)]


@pytest.mark.parametrize(
    ("key", "early", "late", "alarm"),
    [
        ("groups_without_signal", 0.2, 0.95, "zero-std groups"), ("entropy", 1.0, 0.1, "entropy"),
        ("entropy", 0.2, 1.0, "entropy"), ("completions/clipped_ratio", 0.0, 0.6, "clipped completions"),
        ("completions/mean_length", 100, 30, "length"), ("completions/mean_length", 100, 300, "length"),
        ("rewards/format/mean", 0.9, 0.4, "format"), ("reward", 0.9, 0.4, "reward"),
        ("credit/effective_tokens", 0.9, 0.3, "weight concentration"),
        ("credit/share_undefined", 0.1, 0.8, "undefined signals"), ("credit/nonfinite_rows", 0, 2, "nonfinite signals"),
        ("credit/refused_rows", 0, 2, "refused weights"),
        ("completions/duplicates", 0.1, 0.99, "duplicate completions"),
        ("rewards/mine/failed", 0, 1, "rewards/mine/failed"),
        ("self_monitor/alarm", 0, 1, "safe share"),
    ],
)  # fmt: skip
def test_every_collapse_is_told_with_advice_and_health_is_not(key, early, late, alarm):
    (found,) = find_alarms(rows(key, early, late))
    assert found.name == alarm and found.advice
    assert find_alarms(rows(key, early, early)) == []


def test_a_trial_of_a_few_steps_without_any_signal_is_told():
    def steps(*shares):
        return [{"step": i + 1, "groups_without_signal": share} for i, share in enumerate(shares)]

    assert [alarm.name for alarm in find_alarms(steps(1.0, 1.0, 1.0))] == ["zero-std groups"]
    assert find_alarms(steps(1.0, 1.0)) == find_alarms(steps(1.0, 0.5, 1.0)) == []


def test_a_reward_whose_failures_are_all_that_it_tells_is_named():
    at_step = {"rewards/mine/failed": 1, "rewards/mine/failed_gap": 0.0}
    told = [{"step": i + 1, **at_step, "rewards/mine/std": 0.0} for i in range(12)]
    assert "it gave the same number" in next(str(one) for one in find_alarms(told) if "bias" in one.name)
    told[-1]["rewards/mine/std"] = 0.2
    assert [one.name for one in find_alarms(told)] == ["rewards/mine/failed"]


@pytest.mark.parametrize("key", ["rewards/mine/failed", "credit/nonfinite_rows", "credit/refused_rows"])
def test_a_count_of_lines_that_speak_for_several_steps_is_no_round_zero(key):
    (found,) = find_alarms([{"step": 5, key: 0.2}, {"step": 10, key: 0.0}])
    assert "1 or more rollouts" in found.found


def test_a_long_run_is_shortened_without_losing_an_alarm():
    long = [
        {"step": i + 1, "entropy": 1.0 if i < 500 else 0.1, "rewards/mine/failed": int(i == 400)} for i in range(999)
    ]
    assert len(enough_for_alarms(long)) == 61
    assert find_alarms(enough_for_alarms(long)) == find_alarms(long) != []


def test_an_alarm_says_since_when():
    found = [{"step": i + 1, "completions/clipped_ratio": float(i >= 200)} for i in range(300)]
    assert onset(found, "clipped completions") == 204  # more than 0.3 of ten steps


def test_what_was_told_and_is_over_is_not_denied(tmp_path):
    run = run_folder(tmp_path)
    for step in range(3, 60):
        append_row(run / "metrics.jsonl", {"step": step, "completions/clipped_ratio": 0.9 if step > 45 else 0.0})
    cut = {"name": "clipped completions", "found": "cut", "advice": "raise"}
    append_row(run / "alarms.jsonl", {"step": 52, **cut})
    append_row(run / "alarms.jsonl", {"step": 20, "name": "length", "found": "Completions went", "advice": "Read"})
    append_row(run / "alarms.jsonl", {"step": 56, **cut})
    found = read_run(run)["alarms"]
    assert [(alarm["name"], alarm["since"], alarm.get("over", False)) for alarm in found] == [
        ("clipped completions", 52, False), ("length", 20, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "early", "late", "also"),
    [
        ("reward", 1.0, 0.2, {"rewards/mine/weight": (1.0, 0.1)}),  # a ramp
        ("completions/mean_length", 90, 30, {"effort/average": (80, 40)}),  # what it is paid for
        ("completions/mean_length", 90, 30, {"rewards/brevity/mean": (0.2, 0.8)}),
    ],
)
def test_what_a_recipe_asks_for_is_no_alarm(key, early, late, also):
    run = [
        {"step": i + 1, key: late if i > 19 else early, **{name: pair[i > 19] for name, pair in also.items()}}
        for i in range(40)
    ]
    assert find_alarms(run) == []
    assert find_alarms([{name: value for name, value in row.items() if name in ("step", key)} for row in run])


def test_a_lost_format_is_told_under_whatever_name():
    run = [{"step": i + 1, "self_monitor/malformed": 0.7 if i > 19 else 0.0} for i in range(40)]
    assert [alarm.name for alarm in find_alarms(run)] == ["format"]


def test_a_fall_of_held_out_accuracy_is_told_and_chance_is_not():
    before = {"step": 0, "eval/accuracy": 0.644, "eval/low": 0.583}
    after = [{"step": step, "reward": 1.0 * step} for step in range(1, 101)]
    after[59] |= {"eval/accuracy": 0.580, "eval/low": 0.52}
    (found,) = find_alarms(enough_for_alarms([before, *after]))
    assert found.name == "held-out accuracy" and "from 64.4 % (step 0) to 58.0 %" in found.found
    after[79] |= {"eval/accuracy": 0.6, "eval/low": 0.54, "eval/high": 0.66}
    assert find_alarms([before, *after]) == find_alarms([before]) == []
    rare = [{"step": 0, ACCURACY: 0.012, "eval/low": 0.004}, {"step": 9, ACCURACY: 0.003, "eval/high": 0.022}]
    assert find_alarms(rare) == []  # 3 and 1 of 256
    after[79] |= {"eval/accuracy": 0.95, "eval/low": 0.9, "eval/high": 0.98}
    after[89] |= {"eval/accuracy": 0.7, "eval/low": 0.6, "eval/high": 0.8}  # above the first, far below the best
    (found,) = find_alarms([before, *after])
    assert "from 95.0 % (step 80) to 70.0 %" in found.found


def test_a_drifted_monitor_is_told():
    drifted = {"self_monitor/alarm": 0.0, "self_monitor/drifted": 1.0, "self_monitor/flag_rate": 0.8}
    (found,) = find_alarms([{"step": 1, **drifted, "self_monitor/held_out_flag_rate": 0.06}])
    assert found.name == "monitor drift" and "80 %" in found.found and "6 %" in found.found


def test_the_metric_table_knows_what_a_run_logs():
    for key in ("reward", "rewards/mine/mean", "credit/gini", "eval/accuracy", "time/step", "entropy", "grad_norm"):
        assert describe_metric(key), key
    assert describe_metric("eval/accuracy").unit == "share"
    assert describe_metric("task/gain").unit == describe_metric("eval/gain").unit == "bits a dialogue"
    assert describe_metric("self_monitor/malformed").unit == "share"
    assert describe_metric("nonsense") is None
