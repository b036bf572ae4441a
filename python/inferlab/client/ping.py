"""Client for OpenAI-compatible servers: vLLM, SGLang, llama.cpp, ``transformers serve``, OpenAI.

What a server does wrong is a result (``success: False`` and the reason), never an exception.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from inferlab.client.answers import Answer, read_answer, read_models, read_stream
from inferlab.client.connection import OpenAIConnection, Reply
from inferlab.client.results import request_record, result_mapping
from inferlab.config import VllmConfig, load_config
from inferlab.types import check_text

logger = logging.getLogger(__name__)

PATHS = {"chat": "/chat/completions", "completions": "/completions"}


def load_server_config(
    path: str | None, overrides: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> VllmConfig:
    """The configuration of file and overrides; a host or port given beats a base_url of the file.

    A base_url that is the whole address of ``/completions`` says which endpoint is meant.

    Raises:
        ValueError: a value that is not allowed, or base_url given together with host or port.
    """
    named = overrides.get("host") is not None or overrides.get("port") is not None
    if named and overrides.get("base_url") is not None:
        raise ValueError("base_url stands instead of host and port; give one or the other")
    config = load_config(VllmConfig, path, overrides, names=names)
    if named:
        return config.model_copy(update={"base_url": None})
    path = (config.base_url or "").rstrip("/")
    if path.endswith("/completions") and "endpoint" not in config.model_fields_set:
        endpoint = "chat" if path.endswith("/chat/completions") else "completions"
        return config.model_copy(update={"endpoint": endpoint})
    return config


class VLLMPingClient:
    """Asks one OpenAI-compatible server. Usable as a context manager.

    Args:
        host, port: of the server; http. An IPv6 address with or without brackets.
        config_path: YAML of the kind ``configs/vllm.yaml``. Arguments beat it.
        base_url: the server's whole address instead of host and port, for https or a path;
            ``/v1`` may be left out, ``/chat/completions`` may stand behind it.
        api_key: bearer token; else ``api_key`` of the configuration, else ``OPENAI_API_KEY``.
        model: which model to ask; else the configuration's, else the first that the server lists.
        endpoint: "chat" (the prompt is one user message) or "completions" (the prompt as it is).
        timeout: seconds for one request.
        retry_attempts: tries in all, >= 1. Only connect errors, 429 and 5xx are tried again.
        retry_delay: seconds before the second try, doubled for each one after; a ``Retry-After``
            of the server beats it.
        config: a configuration made elsewhere, in place of all of the above.

    Raises:
        ValueError: an argument (or a key of the configuration) is not allowed.
    """

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        config_path: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        model: str | None = None,
        endpoint: str | None = None,
        timeout: float | None = None,
        retry_attempts: int | None = None,
        retry_delay: float | None = None,
        config: VllmConfig | None = None,
    ) -> None:
        if config is None:
            overrides = {
                "host": host, "port": port, "base_url": base_url, "api_key": api_key,
                "model": model, "endpoint": endpoint, "retry_attempts": retry_attempts,
                "timeout": None if timeout is None else float(timeout),
                "retry_delay": None if retry_delay is None else float(retry_delay),
            }  # fmt: skip
            config = load_server_config(config_path, overrides)
        self.config = config
        self.host, self.port = self.config.host, self.config.port
        self._connection = OpenAIConnection(
            self.config.url,
            api_key=self.config.api_key or os.environ.get("OPENAI_API_KEY") or None,
            timeout=self.config.timeout,
            attempts=self.config.retry_attempts,
            retry_delay=self.config.retry_delay,
        )
        self.base_url = self._connection.root_url
        self.model = self.config.model if "model" in self.config.model_fields_set else None
        self._first_model: str | None = None
        self._listed = False

    def __enter__(self) -> VLLMPingClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"VLLMPingClient(base_url={self.base_url!r}, model={self.model!r})"

    def close(self) -> None:
        """Closes the connections to the server."""
        self._connection.close()

    def ping(self, timeout: float | None = None) -> bool:
        """Whether the server is up now: one try, no retries.

        Asks ``/health``, or, where the server does not know that, ``/v1/models``.

        Args:
            timeout: seconds, instead of the client's own.
        """
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout!r}; it must be a number of seconds above 0")
        reply = self._get(f"{self.base_url}/health", timeout)
        if reply.status in (401, 403, 404, 405):
            reply = self._get(f"{self._connection.api_url}/models", timeout)
        if reply.error is not None:
            logger.warning("%s is not ready: %s", self.base_url, reply.error)
        return reply.error is None

    def _get(self, url: str, timeout: float | None) -> Reply[bytes]:
        return self._connection.request("GET", url, b"".join, attempts=1, timeout=timeout)

    def get_models(self) -> dict[str, Any]:
        """The models that the server offers.

        Returns:
            ``success``, ``models`` (the server's whole answer) and ``model_ids``; on failure
            ``success`` False, ``error`` and ``status_code``.
        """
        url = f"{self._connection.api_url}/models"
        reply = self._connection.request("GET", url, _read_list)
        if reply.value is None:
            return {"success": False, "error": reply.error, "status_code": reply.status}
        ids = [entry["id"] for entry in reply.value["data"]]
        return {"success": True, "models": reply.value, "model_ids": ids}

    def generate(
        self,
        prompt: str,
        max_tokens: int | None = None,
        temperature: float | None = None,
        model: str | None = None,
        *,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | list[str] | None = None,
        endpoint: str | None = None,
        stream: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Sends a prompt and waits for the whole answer.

        Args:
            max_tokens, temperature, seed, endpoint, model: else those of the configuration.
            stream: ask for the tokens one by one, so that their times can be told.
            extra_body: further keys of the request that this server knows, such as ``top_k``.

        Returns:
            ``success`` True, ``generated_text``, ``latency_ms`` (of the attempt that succeeded, to
            the last byte), ``elapsed_ms`` (with retries and waits), ``tokens_generated`` (also as
            ``num_tokens``), ``tokens_counted_by`` ("usage": the server's own count, "chunks":
            pieces of the stream, "words": an estimate), ``tokens_per_second``, ``prompt_tokens``,
            ``finish_reason``, ``model``, ``prompt``, ``endpoint``, ``attempts``, ``status_code``,
            ``raw_response``, and ``record``: what these are read off, as JSON types;
            :func:`inferlab.record_of` makes a :class:`inferlab.RequestRecord` of it.

            With ``stream`` also ``ttft_ms`` (to the first chunk with text: a chunk with the role
            alone is none), ``itl_ms`` (times between chunks with text, a list; the first token is
            not among them) and ``tpot_ms`` (from the first text to the last, by token after the
            first). Where no text came ``ttft_ms`` is None; ``tpot_ms`` is None, too, where all came
            at one time: a single token, or a server that does not stream.

            On failure ``success`` False, ``error`` (the reason), ``latency_ms``, ``elapsed_ms``,
            ``attempts``, ``status_code``, ``model``, ``prompt``, ``endpoint``, ``record``. An HTTP
            error, an error object under status 200 or within a stream, an answer with neither text
            nor a finish reason, broken JSON, a body or stream cut short and a time-out are
            failures. An empty text with a finish reason is an answer: the model had nothing to say.

        Raises:
            ValueError: an argument is not allowed; nothing was sent.
        """
        config = self.config
        endpoint = endpoint if endpoint is not None else config.endpoint
        if endpoint not in PATHS:
            raise ValueError(f"endpoint is {endpoint!r}; it must be one of {', '.join(PATHS)}")
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompt is {prompt!r}; it must be a text that is not empty")
        stops = [stop] if isinstance(stop, str) else stop or []
        for named, text in (("prompt", prompt), ("model", model), *(("stop", s) for s in stops)):
            check_text(named, text or "")
        payload: dict[str, Any] = {
            "max_tokens": max_tokens if max_tokens is not None else config.max_tokens,
            "temperature": temperature if temperature is not None else config.temperature,
        }
        optional = {"seed": seed if seed is not None else config.seed, "top_p": top_p, "stop": stop}
        payload.update({key: value for key, value in optional.items() if value is not None})
        _check_sampling(payload)
        if endpoint == "chat":
            payload["messages"] = [{"role": "user", "content": prompt}]
        else:
            payload["prompt"] = prompt
        if stream:
            payload.update(stream=True, stream_options={"include_usage": True})
        payload.update(extra_body or {})

        name = model or self.model
        reply: Reply[Any] | None = None
        if name is None:
            name, reply = self._default_model()
        if name is not None:
            payload["model"] = name
        if reply is None:
            reply = self._complete(endpoint, payload)
        record = request_record(
            reply, payload, prompt=prompt, server=self.base_url, endpoint=endpoint
        )
        return {**result_mapping(record, reply.value.raw if reply.value is not None else None)}

    def _complete(self, endpoint: str, payload: dict[str, Any]) -> Reply[Answer]:
        url = self._connection.api_url + PATHS[endpoint]
        logger.debug("POST %s %s", url, payload)
        if not payload.get("stream"):
            return self._connection.request("POST", url, _read_whole, payload)
        reply = self._connection.request("POST", url, read_stream, payload)
        if reply.status in (400, 422) and "stream_options" in (reply.error or ""):
            # Not every server knows this key, without which vLLM sends no usage.
            without = {key: value for key, value in payload.items() if key != "stream_options"}
            reply = self._connection.request("POST", url, read_stream, without)
        return reply

    def _default_model(self) -> tuple[str | None, Reply[Any] | None]:
        """(first model that the server lists, None), or (None, why the list cannot be read).

        A server that lists no model, or has no list, is asked without a model's name.
        """
        if not self._listed:
            url = f"{self._connection.api_url}/models"
            reply = self._connection.request("GET", url, _read_list)
            if reply.value is None and reply.status not in (404, 405):
                reply.error = f"no model is given and {url} cannot be read: {reply.error}"
                return None, reply
            entries = reply.value["data"] if reply.value else []
            self._first_model = entries[0]["id"] if entries else None
            self._listed = True
        return self._first_model, None


def _check_sampling(payload: Mapping[str, Any]) -> None:
    def number(key: str, low: float, high: float, allowed: str, whole: bool = False) -> None:
        value = payload.get(key)
        if value is None:
            return
        kinds = int if whole else (int, float)
        right = isinstance(value, kinds) and not isinstance(value, bool)
        if not right or not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{key} is {value!r}; it must be {allowed}")

    number("max_tokens", 1, math.inf, "an integer >= 1", whole=True)
    number("temperature", 0, 100, "a number from 0 to 100")
    number("top_p", 0, 1, "a number from 0 to 1")
    number("seed", 0, 2**63 - 1, "an integer from 0 to 2**63 - 1", whole=True)


def _read_whole(chunks: Iterator[bytes]) -> Answer:
    return read_answer(b"".join(chunks))


def _read_list(chunks: Iterator[bytes]) -> dict[str, Any]:
    return read_models(b"".join(chunks))
