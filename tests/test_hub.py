"""When rlattn turns the hub's offline mode on. The hub is a socket on this machine."""

import os
import socket
import threading

import pytest

from rlattn.preflight import hub


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hub, "SECONDS", 0.2)


@pytest.fixture
def listening(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_a_hub_that_is_slow_is_no_hub_that_is_away(listening, capsys):
    hub.go_offline_if_unreachable()  # connected, and nothing answers
    assert "HF_HUB_OFFLINE" not in os.environ
    assert capsys.readouterr().out == ""


def test_a_hub_that_refuses_has_answered(listening, capsys):
    def answer():
        with listening.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    hub.go_offline_if_unreachable()
    thread.join()
    assert "HF_HUB_OFFLINE" not in os.environ
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://hub.invalid", "hub", "http://hub invalid"])
def test_where_no_connection_comes_about_offline_mode_is_on_and_said(address, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", address)
    for _ in range(2):
        hub.go_offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    said = capsys.readouterr().out
    assert said.count("warning: ") == said.count(f"{address} cannot be reached (") == 1
    assert "HF_HUB_OFFLINE=1" in said
