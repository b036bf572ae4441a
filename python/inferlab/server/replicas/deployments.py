"""The application as Ray Serve runs it: replicas with a pipeline each, ingresses before them."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from inferlab import _C
from inferlab.config import SpecdecConfig
from inferlab.server.app import create_app
from inferlab.server.gate import Gate
from inferlab.server.replicas.forward import Forward, NoneFree, ReplicaLost
from inferlab.server.replicas.messages import HttpCall, answers
from inferlab.server.replicas.options import Scale
from inferlab.server.settings import ServerSettings, read_keys
from inferlab.specdec.pipeline import SpeculativePipeline

log = logging.getLogger(__name__)

FIGURES_SECONDS = 10.0
INGRESS_REQUESTS = 10_000
HEALTH_SECONDS = 5.0


class Replica:
    """A pipeline, the thread that makes its steps, and the application that serves it."""

    def __init__(self, config: SpecdecConfig, settings: ServerSettings, threads: int) -> None:
        torch.set_num_threads(threads)
        self._app = create_app(SpeculativePipeline(config=config), settings)
        self._service = self._app.state.service
        self._service.start()
        self.name = serve.get_replica_context().replica_id.unique_id

    async def answer(self, call: HttpCall) -> AsyncGenerator[Any]:
        """Its name, now that it has taken the request, then its application's messages."""
        yield self.name
        async with aclosing(answers(self._app, call)) as messages:
            async for came in messages:
                yield came

    def check_health(self) -> None:
        """Raises where the engine is dead: Ray then replaces the replica."""
        if self._service.engine.failure is not None:
            raise RuntimeError(f"the engine has broken down: {self._service.engine.failure}")

    def figures(self) -> tuple[str, str]:
        """Its name and its metrics."""
        return self.name, self._service.metrics.text().decode()

    def facts(self) -> dict[str, Any]:
        """What it is and what it does, for operators and tests."""
        return {
            "name": self.name,
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "threads": torch.get_num_threads(),
            "kernel_threads": _C.num_threads(),
            "running": self._service.engine.num_running,
            "waiting": self._service.engine.num_waiting,
        }

    def __del__(self) -> None:
        """Ray calls this once nothing runs here any more, or not in time."""
        if (service := getattr(self, "_service", None)) is not None:
            service.engine.drain()
            service.engine.stop()


class ServeReplicas:
    """Replicas behind a handle of Ray Serve, as `Forward` wants them."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def ask(self, call: HttpCall) -> AsyncGenerator[Any]:
        response = self._streams.answer.remote(call)
        try:
            async for came in response:
                yield came
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise NoneFree(str(error)) from error
        except (RayTaskError, TaskCancelledError):
            raise
        except RayError as error:
            raise ReplicaLost(type(error).__name__) from error
        finally:
            response.cancel()

    async def figures(self) -> dict[str, str]:
        told = await self._handle.broadcast("figures").results_async(
            timeout_s=FIGURES_SECONDS, return_exceptions=True
        )
        return dict(one for one in told if not isinstance(one, BaseException))


@serve.ingress()
class Ingress:
    """What clients reach: keys and sizes are checked here, the rest is the replicas'."""

    def __init__(
        self, replicas: DeploymentHandle, settings: ServerSettings, api_key_file: str | None
    ) -> None:
        keys = settings.api_keys + (read_keys(api_key_file) if api_key_file else ())
        self._app = Gate(Forward(ServeReplicas(replicas)), keys, settings.max_body_bytes)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def application(config: SpecdecConfig, settings: ServerSettings, scale: Scale) -> Any:
    """The application to run, of Ray's type ``Application``."""
    at_once = settings.max_waiting + config.max_batch
    shared: dict[str, Any] = {
        "logging_config": {"enable_access_log": False},
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": HEALTH_SECONDS,
    }
    replicas = serve.deployment(Replica, name="Replica").options(
        **shared,
        **_count(scale, config.max_batch),
        ray_actor_options={
            "num_cpus": scale.num_cpus,
            "num_gpus": scale.num_gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(scale.threads)}},
        },
        max_ongoing_requests=at_once,
        max_queued_requests=settings.max_waiting,
        request_router_config=RequestRouterConfig(
            request_router_class="inferlab.server.replicas.router.PrefixRouter"
        ),
    )
    ingress = serve.deployment(Ingress, name="Ingress").options(
        **shared,
        num_replicas=scale.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_REQUESTS,
    )
    behind = replicas.bind(config, replace(settings, api_keys=()), scale.threads)
    return ingress.bind(behind, settings, scale.api_key_file)


def _count(scale: Scale, max_batch: int) -> dict[str, Any]:
    if scale.max_replicas is None:
        return {"num_replicas": scale.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=scale.target_ongoing_requests or max_batch,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
        )
    }
