import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
import torch
from bridge.exchange.errors import RequestError
from huggingface_hub import constants
from llm_perturb.evaluation import hub
from llm_perturb.evaluation.corpus import CorpusOptions
from llm_perturb.evaluation.models import load
from llm_perturb.evaluation.texts import read_texts
from tiny_models import save_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Unavailable(BaseHTTPRequestHandler):
    status = 503

    def do_HEAD(self):
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Refusing(Unavailable):
    status = 403


@pytest.fixture
def online(monkeypatch, tmp_path):
    """As if nobody had chosen offline mode, with an empty cache; gives what sets the hub's address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    hub.why_unreachable.cache_clear()
    yield lambda port: monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    hub.why_unreachable.cache_clear()


@pytest.fixture
def closed_port(online):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    online(port)


@pytest.fixture
def server():
    servers = []

    def start(handler):
        servers.append(HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[0].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return servers[0].server_port

    yield start
    servers[0].shutdown()
    servers[0].server_close()


def test_a_closed_port_puts_every_library_offline(closed_port, capsys):
    assert "refused" in hub.why_unreachable()
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    assert hub.why_unreachable() == hub.why_unreachable()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the hub cannot be reached at http://127.0.0.1:")


def test_a_socket_that_never_answers_is_given_up(online, monkeypatch):
    assert hub.SECONDS <= 5
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online(silent.getsockname()[1])
        begin = time.monotonic()
        assert "ime" in hub.why_unreachable()
        assert time.monotonic() - begin < 3


def test_a_hub_out_of_service_is_not_reached(online, server):
    online(server(Unavailable))
    assert "status 503" in hub.why_unreachable()
    assert constants.HF_HUB_OFFLINE


def test_a_hub_that_refuses_is_reached(online, server):
    online(server(Refusing))
    assert hub.why_unreachable() is None
    assert not constants.HF_HUB_OFFLINE


def test_a_model_that_is_not_cached_is_refused_at_once(closed_port):
    begin = time.monotonic()
    with pytest.raises(RequestError, match=r"model 'some/model' cannot be loaded .*the hub cannot be reached at http"):
        load("some/model", device="cpu")
    assert time.monotonic() - begin < 10


def test_a_data_set_that_is_not_cached_is_refused_at_once(closed_port):
    begin = time.monotonic()
    with pytest.raises(RequestError, match=r"--dataset some/texts cannot be loaded: the hub cannot be reached at http"):
        read_texts(CorpusOptions(dataset="some/texts"))
    assert time.monotonic() - begin < 10


def test_a_cached_model_still_loads(closed_port, tmp_path):
    repository = tmp_path / "cache/models--some--model"
    snapshot = repository / "snapshots" / COMMIT
    save_checkpoint(snapshot, "neox", n_layers=1)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    cached, local = load("some/model", device="cpu"), load(str(snapshot), device="cpu")
    assert cached.metadata["revision"] == COMMIT
    values, expected = cached.model.state_dict(), local.model.state_dict()
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    shutil.rmtree(repository)
