"""The application in this process: what it says once something in it has broken."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from inferlab import SpeculativePipeline
from inferlab.server.app import create_app

BODY = {"prompt": "a", "max_tokens": 4}


@pytest.fixture
def pipeline():
    return SpeculativePipeline(implementation="fake", draft_mode="none")


@pytest.fixture
def client(pipeline):
    with TestClient(create_app(pipeline), raise_server_exceptions=False) as made:
        yield made


def broken(*args, **named):
    raise RuntimeError("broken, and that is nobody's business")


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_told_of(client, pipeline, stream):
    assert client.get("/health").status_code == 200
    pipeline.engine.step = broken
    answer = client.post("/v1/completions", json={**BODY, "stream": stream})
    assert answer.status_code == (200 if stream else 500)
    assert '"server_error"' in answer.text
    assert "[DONE]" not in answer.text
    for path in ("/health", "/ready"):
        refused = client.get(path)
        assert refused.status_code == 503
        assert "broken" in refused.json()["error"]["message"]
    assert client.post("/v1/completions", json=BODY).status_code == 503


def test_faults_of_the_server_have_the_form_of_errors_and_say_nothing(client, pipeline):
    pipeline.encode = broken
    answer = client.post("/v1/completions", json=BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "business" not in answer.text
    assert client.get("/health").status_code == 200
