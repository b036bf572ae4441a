"""The kinds of values that configurations hold, each with its range and the words for it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
)
from pydantic_core import PydanticCustomError

MAX_DRAFT = 64
"""Most draft tokens of one step, along one path."""

MAX_TREE_NODES = 256
"""Most nodes of a draft tree, its root included."""

_DTYPE_NAMES = {
    "fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16",
    "half": "float16",
}  # fmt: skip


def _long_dtype_name(value: object) -> object:
    return _DTYPE_NAMES.get(value, value) if isinstance(value, str) else value


def as_tuple(value: object) -> object:
    """YAML has lists, frozen configurations hold tuples; a single text is a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def allowed(text: str) -> Any:
    """A field whose error message says ``must be <text>``."""
    return Field(json_schema_extra={"allowed": text})


def _as_host(value: str) -> str:
    """The host, without the brackets of an IPv6 address."""
    host = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)
            return host
    except ValueError:
        pass
    else:
        if re.fullmatch(r"[^\s/\[\]@?#\\]+", value):
            return value
    raise PydanticCustomError("host", "not a host")


Host = Annotated[
    str,
    AfterValidator(_as_host),
    allowed("a host name or IP address alone; the port goes to port, a whole address to base_url"),
]
ModelName = Annotated[str, StringConstraints(min_length=1), allowed("a hub id or a directory")]
Device = Annotated[
    str,
    StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"),
    allowed("auto, cpu, mps, cuda or cuda:N"),
]


def _as_device_map(value: object) -> str | dict[str, int | str]:
    if value in _DEVICE_MAPS:
        return value  # type: ignore[return-value]
    is_map = isinstance(value, Mapping) and len(value) > 0
    if is_map and all(type(name) is str and _is_place(place) for name, place in value.items()):  # type: ignore[attr-defined]
        return dict(value)  # type: ignore[call-overload, no-any-return]
    raise PydanticCustomError("device_map", "not a device map")


def _is_place(value: object) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"cpu|disk|mps|cuda(:\d+)?", value) is not None
    return type(value) is int and value >= 0


_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap = Annotated[
    str | dict[str, int | str],
    PlainValidator(_as_device_map),
    allowed(
        f"{', '.join(_DEVICE_MAPS)} or devices by module: {{model.embed_tokens: 0, model.layers.0: "
        "1, ...}"
    ),
]
DeviceKind = Literal["mps", "cuda", "cpu"]
Quantization = Literal[
    "none", "dense", "int8", "int4", "bnb-8bit", "bnb-4bit", "torchao-int8", "torchao-int4"
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_long_dtype_name)
]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Temperature = Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
PositiveCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
DraftCount = Annotated[int, Field(ge=0, le=MAX_DRAFT)]
DevicePriority = Annotated[
    tuple[DeviceKind, ...],
    BeforeValidator(as_tuple),
    Field(min_length=1),
    allowed("a list of mps, cuda and cpu, in the order to try"),
]
Texts = Annotated[
    tuple[Annotated[str, StringConstraints(min_length=1)], ...],
    BeforeValidator(as_tuple),
    allowed("a list of texts, none of them empty"),
]
TREES = ("chain", "optimal", "grown")


def _as_tree(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str) and value in TREES:
        return value
    is_list = isinstance(value, list | tuple) and 1 <= len(value) <= MAX_DRAFT
    if is_list and all(type(width) is int and width >= 1 for width in value):  # type: ignore[attr-defined]
        return tuple(value)  # type: ignore[arg-type]
    raise PydanticCustomError("tree", "not a tree")


Tree = Annotated[
    str | tuple[int, ...],
    PlainValidator(_as_tree),
    allowed(
        f"{', '.join(TREES)} or a list of 1 to {MAX_DRAFT} numbers >= 1, children per node by "
        "depth: [4, 2, 1]"
    ),
]


class Section(BaseModel):
    """Frozen, without unknown keys, and without silent conversions ("4" is not 4)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names under which files and callers may give a key."""
