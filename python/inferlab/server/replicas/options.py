"""How many replicas there are, what each has, and all of it from one mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from inferlab.config import SpecdecConfig, load_config
from inferlab.errors import UsageError
from inferlab.server.settings import ServerSettings

Seconds = Annotated[float, Field(ge=0)]


class Scale(BaseModel):
    """How many replicas there are, and what each has.

    Attributes:
        replicas: how many; with ``max_replicas`` how many there are at least.
        max_replicas: how many there may be, as load asks for; None: always ``replicas``.
        target_ongoing_requests: at each replica, from which on there should be more of them; None:
            as many as a batch holds.
        upscale_delay_s, downscale_delay_s: for how long load asks before it is given.
        num_cpus: of each replica, and its threads.
        num_gpus: of each replica.
        ingresses: processes that take requests and have replicas answer.
        api_key_file: keys, a line each, read by each ingress where it runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = None
    upscale_delay_s: Seconds = 30.0
    downscale_delay_s: Seconds = 600.0
    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    ingresses: Annotated[int, Field(ge=1)] = 1
    api_key_file: str | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Scale:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas: must be at least replicas ({self.replicas})")
        return self

    @property
    def threads(self) -> int:
        """Of a replica."""
        return max(int(self.num_cpus), 1)


def from_mapping(given: Mapping[str, Any]) -> tuple[SpecdecConfig, ServerSettings, Scale]:
    """What `ray_app.build` is given: keys of `Scale`, `ServerSettings` and a ``specdec`` file, and
    ``config``, the path of such a file. Texts, as a command line has them, are read as YAML.

    Raises:
        UsageError, ConfigError: a key that is not known, or a value that is not allowed.
    """
    left = dict(given)
    path = left.pop("config", None)
    scale = {name: left.pop(name) for name in Scale.model_fields if name in left}
    names = [field.name for field in fields(ServerSettings)]
    server = {name: left.pop(name) for name in names if name in left}
    overrides = {
        name: yaml.safe_load(value) if isinstance(value, str) else value
        for name, value in left.items()
    }
    config = load_config(SpecdecConfig, path, overrides)
    if "share_prefixes" not in config.model_fields_set:
        config = config.model_copy(update={"share_prefixes": True})
    try:
        return (
            config,
            TypeAdapter(ServerSettings).validate_python(server),
            Scale.model_validate(scale),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{place}: {message}" if place else message) from error
