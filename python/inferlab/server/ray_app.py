"""The server with many replicas, for Ray Serve: `serve run inferlab.server.ray_app:build`."""

from __future__ import annotations

from typing import Any

from inferlab.server.replicas.deployments import application
from inferlab.server.replicas.options import from_mapping


def build(args: dict[str, Any]) -> Any:
    """The application, of Ray's type ``Application``.

    ``serve run inferlab.server.ray_app:build replicas=2 num_gpus=1 base_model=NAME``

    Args:
        args: keys of `Scale`, of `ServerSettings` and of a ``specdec`` file (see `from_mapping`).
    """
    return application(*from_mapping(args))
