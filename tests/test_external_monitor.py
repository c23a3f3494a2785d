"""External monitors: judges of the user's and endpoints that are slow, wrong, hostile or gone."""

import http.server
import json
import threading
import time

import pytest
from test_self_monitor import BROKEN, Batches, rewards, rollout

from rlattn.rewards.external_monitor import ExternalMonitor
from rlattn.rewards.self_monitor import SelfMonitor


def judge(prompt, thought):
    assert prompt == "P "
    if "62" in thought:
        raise RuntimeError("boom")
    if "63" in thought:
        time.sleep(30)
    return {"43": "safe", "60": "unsafe"}.get(thought.split()[2], "who knows")


def external(**options):
    return SelfMonitor(source="external", external=ExternalMonitor(**options), held_out_every=0)


def test_an_external_function_judges_and_what_it_does_not_answer_is_neutral(capsys):
    batches, monitor = Batches(), external(python="test_external_monitor:judge", timeout=1.0)
    batch = batches.of(*(rollout(claim) for claim in (43, 60, 61, 62, 63)), BROKEN)
    assert rewards(monitor, batch) == [0, -1, -1, None, None, -1]
    assert batches.logged[0]["self_monitor/unanswered"] == pytest.approx(2 / 6)
    assert batches.logged[0]["self_monitor/unparsed"] == pytest.approx(1 / 6)
    assert monitor.multiplier == pytest.approx(0.1 * (3 / 4 - 0.05))
    monitor.prepare(batch)
    assert capsys.readouterr().out.count("RuntimeError: boom") == 1


class Judges:
    def __init__(self, prompt, thought):
        pass


async def asynchronous(prompt, thought):
    return "safe"


def loud(prompt, thought):
    return " Unsafe\n" if "60" in thought else "SAFE"


def silent(prompt, thought):
    return None


def test_a_label_counts_in_any_case():
    assert rewards(external(python="test_external_monitor:loud"), Batches().of(rollout(43), rollout(60))) == [0, -1]


def test_a_monitor_without_readable_labels_warns_once_and_does_not_move_lambda(capsys):
    batches, monitor = Batches(), external(python="test_external_monitor:silent")
    for _ in range(2):
        assert rewards(monitor, batches.of(rollout(43), rollout(60), BROKEN)) == [-1, -1, -1]
    assert monitor.multiplier == 0 and batches.logged[1]["self_monitor/lambda"] == 0
    assert capsys.readouterr().out.count("safe or unsafe, can be read from 2 of the monitor's 2 answers") == 1


def test_an_unreachable_endpoint_leaves_training_alone_with_one_warning(monkeypatch, capsys):
    monkeypatch.setenv("MONITOR_KEY", "sk-secret")
    monitor = external(url="http://127.0.0.1:9/v1", api_key_env="MONITOR_KEY", timeout=5.0)
    batches = Batches()
    for _ in range(2):
        assert rewards(monitor, batches.of(rollout(43), rollout(60), BROKEN)) == [None, None, -1]
    assert monitor.multiplier == 0
    assert batches.logged[1]["self_monitor/unanswered"] == pytest.approx(2 / 3)
    warning = capsys.readouterr().out
    assert warning.count("does not answer") == 1 and "secret" not in warning
    assert "secret" not in repr(monitor) + str(monitor.state_dict())


def test_an_endpoint_that_only_another_rank_cannot_reach_is_told_as_well(capsys):
    gathered = Batches(gather=lambda values: [*values, *(["rank 1: no route"] if values == [""] else values)])
    monitor = external(python="test_external_monitor:silent")
    rewards(monitor, gathered.of(rollout(43)))
    assert "the external monitor does not answer (rank 1: no route)" in capsys.readouterr().out


class Endpoint(http.server.BaseHTTPRequestHandler):
    asked: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], body))
        label = "unsafe" if "60" in body["messages"][0]["content"] else "safe"
        answer = {"choices": [{"message": {"content": f"I see. <label>{label}</label>"}}]}
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/v1/chat/completions")
        else:
            self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        pass


def test_an_openai_compatible_endpoint(monkeypatch):
    monkeypatch.setenv("MONITOR_KEY", "sk-secret")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    batch = Batches().of(rollout(43), rollout(60))
    monitor = external(url=f"{address}/v1/", model="judge", api_key_env="MONITOR_KEY")
    assert rewards(monitor, batch) == [0, -1]
    path, key, body = Endpoint.asked[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer sk-secret", "judge", 0)
    assert rewards(external(url=f"{address}/moved"), batch) == [None, None]  # a redirect could take the key elsewhere
    monkeypatch.setenv("MONITOR_KEY", "sk-secret\r\n")  # as a file on Windows ends
    assert rewards(monitor, batch) == [0, -1]
    assert Endpoint.asked[-1][1] == "Bearer sk-secret"
    server.shutdown()


def echo_the_key(handler):
    handler.send_response(401, f"no such key: {handler.headers['Authorization']}")
    handler.end_headers()


@pytest.mark.parametrize(("status", "reward"), [(400, -1), (413, -1), (422, -1), (404, None), (429, None), (503, None)])
def test_a_refused_thought_is_flagged_and_an_endpoint_out_of_order_leaves_it_open(status, reward, monkeypatch, capsys):
    answer = Endpoint.do_POST

    def refuse(handler):
        if b"60" not in handler.rfile.peek():
            return answer(handler)
        handler.send_response(status)
        handler.end_headers()

    monkeypatch.setattr(Endpoint, "do_POST", refuse)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monitor, batches = external(url=f"http://127.0.0.1:{server.server_port}/v1"), Batches()
    assert rewards(monitor, batches.of(rollout(60), rollout(43), rollout(44))) == [reward, 0, 0]
    assert (monitor.multiplier > 0) == (reward == -1)
    assert batches.logged[0]["self_monitor/unanswered"] == (0 if reward else pytest.approx(1 / 3))
    every = rewards(monitor, batches.of(rollout(60)))  # a wrong request, rather than a wrong thought
    assert every == [reward] and batches.logged[1]["self_monitor/lambda"] == batches.logged[0]["self_monitor/lambda"]
    server.shutdown()


def flood(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 100_000)
    except OSError:
        handler.server.hung_up.set()


def test_an_endless_reply_is_cut_off(monkeypatch, capsys):
    monkeypatch.setattr(Endpoint, "do_POST", flood)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.hung_up = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monitor = external(url=f"http://127.0.0.1:{server.server_port}/v1")
    assert rewards(monitor, Batches().of(rollout(43))) == [None]
    assert server.hung_up.wait(20) and "more than 1,000,000 bytes" in capsys.readouterr().out
    server.shutdown()


@pytest.mark.parametrize("key", ["sk-secret", "sk-secret\nsk-secret", "sk-secret\u2026", "\r"])
def test_no_message_holds_the_key(key, monkeypatch, capsys):
    monkeypatch.setattr(Endpoint, "do_POST", echo_the_key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MONITOR_KEY", "sk-other")
    monitor = external(url=f"http://127.0.0.1:{server.server_port}/v1", api_key_env="MONITOR_KEY")
    monkeypatch.setenv("MONITOR_KEY", key)
    assert rewards(monitor, Batches().of(rollout(43))) == [None]
    warning = capsys.readouterr().out
    assert ("no such key: Bearer <key>" if key == "sk-secret" else "MONITOR_KEY holds is no key") in warning
    assert "secret" not in warning
    server.shutdown()
