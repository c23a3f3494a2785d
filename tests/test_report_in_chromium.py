"""The report in a real browser: its controls do what they say, and what a policy wrote does nothing.

Needs Chromium (Debian: `apt-get install chromium`) and skips without it.
"""

import shutil

import pytest
from test_report import HOSTILE, rollout, run_folder

from rlattn.grpo.token_log import write_tokens
from rlattn.report import page, write_report
from rlattn.report.compare import compare
from rlattn.run_folder.folder import write_text
from rlattn.run_folder.jsonl import append_row

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = {"phone": 390, "desk": 1280}
QUIET = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, chromium_sandbox=False)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two steps with four rollouts each, right and wrong ones, one of them hostile."""
    run = run_folder(tmp_path_factory.mktemp("run"), HOSTILE)
    words = ["<think>", " carry", HOSTILE, " 4"]
    first = [rollout(i, text=words, right=float(i == 1)) for i in range(4)]
    first[0] |= {"weight": [1.0, 1.5, 1.0, 1.75], "entropy": [0.1, 2.0, 0.3, 0.05], "neutral": {"accuracy": True}}
    first[1] |= {
        "trained": [True, True, False, True],
        "entropy": [0.1, 2.0, 9.0, 0.05],
        "advantage": [1.0, -0.5, 7.0, 1.0],
    }
    write_tokens(run / "tokens/step-000001.parquet", first)
    write_tokens(run / "tokens/step-000002.parquet", [rollout(i, right=float(i % 2)) for i in range(4)])
    return write_report(run)


class Opened:
    """A page, and everything it did that a report must not do."""

    def __init__(self, browser, file, *, width=1280, scheme="light"):
        self.misdeeds = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("dialog", lambda dialog: (self.misdeeds.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.misdeeds.append(f"error {error}"))
        self.page.on("console", lambda line: self.misdeeds.append(f"console {line.text}"))
        self.page.on("request", lambda sent: sent.url == file.as_uri() or self.misdeeds.append(f"request {sent.url}"))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")

    def text(self, selector):
        return self.page.inner_text(selector)

    def shading(self):
        return self.page.eval_on_selector_all(".tokens .token", "all => all.map(t => t.style.getPropertyValue('--x'))")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()


@pytest.fixture
def opened(browser, report):
    with Opened(browser, report) as found:
        yield found
        assert found.misdeeds == []


def test_hostile_text_is_text(opened):
    opened.page.locator("#step").press("Home")
    shown = opened.text(".tokens")
    assert "</script><script>alert(1)</script><img src=x onerror=alert(1)>" in shown
    assert "U+202E" in shown and "U+200B" in shown
    assert opened.page.locator("img, iframe, object").count() == 0
    assert opened.page.locator("script").count() == 2


def test_the_slider_goes_from_step_to_step(opened):
    assert opened.text("output[for=step]") == "step 2"
    opened.page.locator("#step").press("ArrowLeft")
    assert opened.text("output[for=step]") == "step 1" and "carry" in opened.text(".tokens")
    opened.page.locator("#step").press("ArrowRight")
    assert opened.text("output[for=step]") == "step 2" and "carry" not in opened.text(".tokens")


def test_the_filter_leaves_right_or_wrong_rollouts(opened):
    for choice, rollouts in (("right", {1, 3}), ("wrong", {0, 2}), ("all", {0, 1, 2, 3})):
        opened.page.select_option("#filter", choice)
        options = opened.page.locator("#rollout option").all_inner_texts()
        assert {int(option.split("rollout ")[1].split(",")[0]) for option in options} == rollouts
        if choice != "all":
            assert opened.text("#tokens p b") == choice
    opened.page.locator("#step").press("Home")
    opened.page.select_option("#filter", "right")
    assert opened.page.locator("#rollout option").count() == 1


def test_next_and_previous_go_round(opened):
    value = "document.getElementById('rollout').value"
    opened.page.get_by_label("Previous rollout").click()
    assert opened.page.evaluate(value) == "3"
    opened.page.get_by_label("Next rollout").click()
    assert opened.page.evaluate(value) == "0"


def test_a_reward_that_failed_on_a_rollout_is_said_beside_it(opened):
    opened.page.locator("#step").press("Home")
    assert "accuracy 0 (failed or silent: its group's mean)" in opened.text("#tokens")
    opened.page.get_by_label("Next rollout").click()
    assert "accuracy 1)" in opened.text("#tokens") and "silent" not in opened.text("#tokens")


def test_what_the_policy_did_not_write_is_told_apart_and_not_coloured(opened):
    opened.page.locator("#step").press("Home")
    opened.page.get_by_label("Next rollout").click()
    tokens = opened.page.locator(".tokens .token")
    opened.page.get_by_role("button", name="Entropy").click()
    assert "tool" in tokens.nth(2).get_attribute("class") and opened.shading()[1:3] == ["75%", ""]
    assert opened.text(".scale").endswith(" 2") and "Italic: written by a tool" in opened.text("#tokens")
    assert "advantage 0.5;" in opened.text("#tokens")  # the mean of what is trained


def test_every_signal_colours_the_tokens(opened):
    opened.page.locator("#step").press("Home")
    colours = {}
    for button in opened.page.locator(".buttons button").all():
        button.click()
        assert opened.page.locator(".buttons button[aria-pressed=true]").all_inner_texts() == [button.inner_text()]
        colours[button.inner_text()] = opened.shading()
    assert list(colours) == ["Weight", "WAAD", "FAI", "Entropy", "Advantage", "Log-prob"]
    assert colours["Weight"] == ["0%", "50%", "0%", "75%"]  # 1, 1.5, 1, 1.75
    assert colours["Entropy"][1] == "75%" and colours["Entropy"][3] == "0%"
    assert colours["FAI"][3] == ""  # undefined: not coloured


def test_a_token_tells_its_values_to_mouse_and_keyboard(opened):
    opened.page.locator("#step").press("Home")
    opened.page.locator(".tokens .token").nth(1).hover()
    assert "token 2 of 4" in opened.text(".detail") and "Entropy 2" in opened.text(".detail")
    opened.page.locator(".tokens").press("ArrowRight")
    opened.page.locator(".tokens").press("End")
    assert "token 4 of 4" in opened.text(".detail") and "Weight 1.75" in opened.text(".detail")
    assert "anchor" in opened.text(".detail")


def test_without_credit_the_tokens_are_coloured_by_something_that_varies(browser, tmp_path):
    run = run_folder(tmp_path)
    for file in (run / "tokens").iterdir():
        file.unlink()
    plain = [rollout(i, credit=False) | {"weight": [1.0, 1.0], "entropy": [0.1, 0.9]} for i in range(2)]
    write_tokens(run / "tokens/step-000002.parquet", plain)
    with Opened(browser, write_report(run)) as found:
        assert found.text(".buttons button[aria-pressed=true]") == "Entropy"
        assert found.shading() == ["0%", "75%"] and found.misdeeds == []


def test_it_tells_which_tokens_got_credit_and_where(browser, tmp_path):
    run = run_folder(tmp_path)
    words, weights = ["so", " 4", " =", " 4", " !"], [1.0, 1.5, 1.2, 1.75, 1.0]
    found = [rollout(i, text=words) | {"weight": weights} for i in range(6)]
    found[5]["trained"] = [True] * 4 + [False]  # a tool's token
    write_tokens(run / "tokens/step-000002.parquet", found)
    with Opened(browser, write_report(run)) as opened:
        tables = opened.page.locator("#credit table")
        assert tables.first.locator("tr").all_inner_texts()[1:] == [
            "␣4\t1.63\t12", "␣=\t1.20\t6", "so\t1.00\t6", "␣!\t1.00\t5",
        ]  # fmt: skip
        chart = opened.page.locator("#credit figure").first
        chart.locator("svg").press("Home")
        assert chart.locator(".readout").inner_text() == "at 5 %: 1"
        chart.locator("svg").press("ArrowRight")
        assert chart.locator(".readout").inner_text() == "at 25 %: 1.5"
        assert opened.misdeeds == []


def test_tokens_without_ink_are_spelled_and_faded_weights_are_not_ranked(browser, tmp_path):
    run = run_folder(tmp_path)
    words, faded = ["\n\n", " ", "\t", "so"], {"weight": [1.0] * 4}
    weighed = [rollout(i, text=words) | {"weight": [1.5, 1.4, 1.3, 1.0]} for i in range(5)]
    write_tokens(run / "tokens/step-000001.parquet", weighed)
    for step in (2, 3, 4, 5):  # a schedule has let them fade
        write_tokens(run / f"tokens/step-00000{step}.parquet", [rollout(i, text=words) | faded for i in range(5)])
    with Opened(browser, write_report(run)) as opened:
        rows = opened.page.locator("#credit table").first.locator("tr").all_inner_texts()
        assert rows[1:] == ["↵↵\t1.50\t5", "␣\t1.40\t5", "⇥\t1.30\t5", "so\t1.00\t5"]
        assert opened.misdeeds == []


def test_names_that_turn_text_around_are_codes_everywhere(browser, tmp_path):
    run = run_folder(tmp_path)
    append_row(run / "metrics.jsonl", {"step": 3, "rewards/\u202eab/mean": 1.0, "rewards/c/mean": 0.0})
    with Opened(browser, write_report(run)) as opened:
        assert "\u202e" not in opened.page.evaluate("document.documentElement.outerHTML.replace(/<script[^]*/, '')")
        assert "U+202Eab = 1" in opened.text("#learning")


def test_heads_that_emerged_are_named(browser, tmp_path):
    run = run_folder(tmp_path)
    later = {"layers": [1], "span": [[2.0, 9.0]], "local": [[0.0, 1.0]], "global": [[0.2, 1.0]]}
    append_row(run / "heads.jsonl", {"step": 3, **later})
    with Opened(browser, write_report(run)) as opened:
        said = "Emerged since step 2: local L1H1; global none. No longer: local L1H0; global none."
        assert opened.text("#emerged") == said and opened.misdeeds == []


def test_a_head_without_a_span_is_shown_as_such(browser, tmp_path):
    run = run_folder(tmp_path)
    heads = {"layers": [1, 2], "span": [[2.0, None], [None, None]], "local": [[1, 0]] * 2, "global": [[0, 1]] * 2}
    for step in (2, 3):
        append_row(run / "heads.jsonl", {"step": step, **heads})
    with Opened(browser, write_report(run)) as opened:
        assert "2.0 L" in opened.text("#heads") and "– G" in opened.text("#heads") and opened.misdeeds == []


def test_marks_can_be_hidden(opened):
    assert opened.page.locator(".tokens.marked .anchor").count() == 2
    opened.page.locator("#marks").uncheck()
    assert opened.page.locator(".tokens.marked").count() == 0


def test_a_chart_is_read_with_the_arrow_keys(opened):
    chart = opened.page.locator("figure", has=opened.page.get_by_role("heading", name="Reward", exact=True))
    assert chart.locator(".readout").inner_text() == "step 2: 0.2"
    chart.locator("svg").press("Home")
    assert chart.locator(".readout").inner_text() == "step 0: 0"
    assert chart.locator(".cursor").count() == 1


def test_every_control_is_reached_by_tab(opened):
    reached = set()
    for _ in range(80):
        opened.page.keyboard.press("Tab")
        reached.add(opened.page.evaluate("document.activeElement.id || document.activeElement.getAttribute('class')"))
    assert {"step", "filter", "rollout", "signal-weight", "signal-entropy", "marks", "tokens marked"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_it_fits_the_screen_and_can_be_read(browser, report, device, scheme):
    with Opened(browser, report, width=WIDTHS[device], scheme=scheme) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[device]
        for selector in ("body", ".tile small", "figcaption", ".right", ".wrong", "nav a", ".detail"):
            assert contrast(found.page, selector) >= 4.5, selector  # WCAG 2.2, AA
        background = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (luminance(background) < 0.2) == (scheme == "dark")
        assert found.misdeeds == []


def test_a_comparison_opens_and_overlays_the_runs(browser, tmp_path):
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        run.mkdir()
        run_folder(run)
        append_row(run / "metrics.jsonl", {"step": 3, "reward": 0.9})
    write_text(tmp_path / "compare.html", page(compare(runs)))
    append_row(runs[0] / "metrics.jsonl", {"step": 4, "reward": 0.7})
    write_text(tmp_path / "compare.html", page(compare(runs)))
    with Opened(browser, tmp_path / "compare.html", width=390) as found:
        chart = found.page.locator("figure", has=found.page.get_by_role("heading", name="reward", exact=True))
        assert chart.locator("path.curve").count() == 2
        assert chart.locator(".readout").inner_text() == "step 4: a = 0.7 · b ≈ 0.9"
        assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert found.misdeeds == []


def luminance(colour):
    """Relative luminance of `rgb(…)` (WCAG 2.2)."""
    channels = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page, selector):
    """Of the first such element's text to what lies behind it."""
    behind = """node => { for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!colour.endsWith(", 0)")) return [getComputedStyle(node).color, colour];
    } }"""
    light, dark = sorted(map(luminance, page.eval_on_selector(selector, behind)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
