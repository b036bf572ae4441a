"""What the server's own document allows, and what it does not, made up by Schemathesis: no answer
is a fault of the server, each is one that the document names, and has the form that it gives."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from helpers.served import Served

pytestmark = pytest.mark.network

LEFT_OUT = (
    # A schema cannot say all: room in the context, what stands in a vocabulary, tokens of texts.
    schemathesis.checks.positive_data_acceptance,
)


@pytest.fixture(scope="module")
def server():
    with Served("--impl", "fake", "--draft-mode", "ngram") as served:
        yield served
        served.wait_until_idle(120)
        assert "Traceback" not in served.log.read_text()


@pytest.fixture(scope="module")
def api(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/completions", "POST"),
        ("/v1/chat/completions", "POST"),
        ("/v1/models", "GET"),
        ("/v1/models/{model}", "GET"),
        ("/health", "GET"),
        ("/ready", "GET"),
        ("/metrics", "GET"),
    ],
)
def test_the_document_is_kept(api, path, method, mode):
    examples = 80 if method == "POST" else 5

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(excluded_checks=LEFT_OUT)

    try:
        check()
    except Unsatisfiable:
        assert method == "GET"  # nothing can be wrong with what has no parameters
