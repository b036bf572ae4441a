"""Configuration: what each kind of YAML file may say, its defaults and its ranges.

There are three kinds: BaselineConfig (plain Hugging Face decoding), SpecdecConfig (speculative
decoding) and VllmConfig (an OpenAI-compatible server). load_config reads one: a value given by the
caller (a flag or a keyword) beats the file, the file beats the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
)

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from inferlab.config_file import ConfigError, build, find_config, packaged_configs, read_yaml
from inferlab.config_types import (
    MAX_DRAFT,
    MAX_TREE_NODES,
    TREES,
    Count,
    Device,
    DeviceMap,
    DevicePriority,
    DraftCount,
    Dtype,
    Fraction,
    Host,
    LogLevel,
    ModelName,
    Penalty,
    Positive,
    PositiveCount,
    Quantization,
    Section,
    Seed,
    Temperature,
    Texts,
    TopP,
    Tree,
    allowed,
    as_tuple,
)
from inferlab.draft_modes import DRAFT_MODES, tree_misfit

__all__ = [
    "MAX_DRAFT",
    "MAX_TREE_NODES",
    "TREES",
    "BaselineConfig",
    "ConfigError",
    "EagleConfig",
    "EarlyExitConfig",
    "EnsembleConfig",
    "FakeConfig",
    "MedusaConfig",
    "NgramConfig",
    "SpecdecConfig",
    "VllmConfig",
    "find_config",
    "load_config",
    "packaged_configs",
]


MOST_BATCH = 1024
"""Of ``max_batch``: requests decoded together."""
_MEMBERS = tuple(name for name, mode in DRAFT_MODES.items() if mode.is_member)

if TYPE_CHECKING:
    DraftModeName: TypeAlias = str
    Member: TypeAlias = str
else:
    DraftModeName = Literal[tuple(DRAFT_MODES)]
    Member = Literal[_MEMBERS]


class MedusaConfig(Section):
    """Medusa heads. ``model``: trained ones, of ``draft_mode: medusa``. The other keys are those of
    ``medusa-lite``, whose heads are untrained: the target's own (tie), a copy of it, or random.
    """

    enabled: bool = False
    model: ModelName = "inferlab/tiny-medusa"
    num_heads: Annotated[int, Field(ge=1, le=MAX_DRAFT)] = 2
    head_init: Literal["tie", "copy", "random"] = "tie"
    temperature: Temperature = 0.7
    top_p: TopP = 1.0


class EagleConfig(Section):
    """EAGLE heads. ``model``: a trained one, of ``draft_mode: eagle``; the other keys are those of
    ``eagle-lite``, which extrapolates the target's hidden state by ``alpha``.
    """

    enabled: bool = False
    model: ModelName = "inferlab/tiny-eagle"
    alpha: Fraction = 0.7
    max_draft: DraftCount = 2


class NgramConfig(Section):
    """Prompt lookup: the longest suffix of min_match..max_match tokens (null: any number) that
    occurred before, in the text or in a ``corpus`` file."""

    min_match: Annotated[int, Field(ge=1, le=64)] = 1
    max_match: Annotated[int, Field(ge=1)] | None = None
    corpus: Annotated[str | None, allowed("a file of text or token ids")] = None

    @model_validator(mode="after")
    def _ordered(self) -> NgramConfig:
        if self.max_match is not None and self.min_match > self.max_match:
            raise ValueError(
                f"min_match: {self.min_match} is not allowed; "
                f"must be at most max_match ({self.max_match})"
            )
        return self


class EarlyExitConfig(Section):
    """``draft_mode: self``: how many of the target's first layers draft; null: a quarter."""

    layers: PositiveCount | None = None


class EnsembleConfig(Section):
    """``draft_mode: ensemble``: whose trees are merged."""

    drafters: Annotated[
        tuple[Member, ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
        allowed("a list of " + ", ".join(_MEMBERS[:-1]) + " and " + _MEMBERS[-1]),
    ] = ("eagle", "ngram")


class FakeConfig(Section):
    """FakeLM: how often its draft proposes what its target would have chosen."""

    agreement: Fraction = 1.0


class Sampled(Section):
    """What all kinds of files that decode here have in common.

    ``ignore_generation_config``: of the checkpoint's generation_config.json follow the token ids
    only, see `inferlab.models.generation_defaults`.
    """

    do_sample: bool = True
    ignore_generation_config: bool = False
    log_level: LogLevel = "INFO"
    seed: Seed = 1234
    max_memory_mb: Positive | None = None
    device_priority: DevicePriority = ("mps", "cuda", "cpu")
    trust_remote_code: bool = False
    allow_pickle: bool = False
    iterations: PositiveCount = 5
    warmup_iterations: Count = 1


class BaselineConfig(Sampled):
    """Plain decoding by Hugging Face ``generate`` (``configs/baseline.yaml``).

    ``top_k`` and ``top_p`` left out are those of the model's own generation configuration.
    """

    model: ModelName = "inferlab/tiny"
    torch_dtype: Dtype = "float32"
    device: Device = "auto"
    max_new_tokens: PositiveCount = 48
    temperature: Temperature = 0.7
    top_p: TopP | None = None
    top_k: Count | None = None

    @property
    def effective_temperature(self) -> float:
        """The temperature to decode with: ``do_sample: false`` means 0 (greedy)."""
        return self.temperature if self.do_sample else 0.0


class SpecdecConfig(Sampled):
    """Speculative decoding (``configs/specdec.yaml``, ``configs/specdec_hf.yaml``).

    Without a file: the bundled pair of real models, greedy, lossless, drafting what pays. ``K`` is
    another name of ``max_draft``, and ``k`` of ``agree_k``, the k of the ``topk_agree`` policy.
    ``max_draft`` left out is what suits the drafter (`DRAFT_MODES`). So is ``tree``: chain;
    optimal, the ``tree_nodes`` nodes most likely to be accepted; grown, as many where the draft is
    sure of itself, ``eagle`` expanding ``tree_width`` nodes per level; or children per node by
    depth. ``coupled_noise: false`` lets drafts above temperature 0 draw with noise of their own:
    for comparison, they agree less often. ``controller`` left out is fixed where ``max_draft`` or
    the tree's widths are given, for fake models, and where ``policy`` is not longest_prefix; else
    cost. ``cost_cache: false``: what steps cost is neither read from the user's cache directory nor
    kept there. ``repetition_penalty`` and ``min_new_tokens`` left out are the checkpoint's own,
    else off. ``kv_memory_mb`` and ``num_pages`` bound the KV cache, the smaller one wins; without
    both it is sized for the batch. ``share_prefixes``: texts that begin alike share what was read
    of it, as long as weights stay as they are; a text that was decoded before is found again, so
    times of prompts that are repeated are not those of new ones. ``engine`` says what runs
    forwards, of target and draft model: ``native``, compiled calls, which is an error for models
    that they do not cover; ``hf``, the model's own modules; ``auto``, the first that can.
    ``quantization`` and ``draft_quantization`` pack the weights of the target and of the draft
    model when they are loaded: ``int8`` and ``int4`` on a CPU, the others by the packages
    bitsandbytes and torchao. Weights that come rounded (GPTQ, AWQ, compressed-tensors) are
    multiplied with as they are on a CPU, where that loses nothing, with ``dense`` never.
    ``kv_cache_dtype``: how the target's keys and values are kept, on a CPU: as they are (``auto``),
    in int8 with a scale for each token and head, or in float8 (e4m3), which takes half the pages'
    memory; the target is another one then, as with packed weights.
    ``tensor_parallel`` shares the target out over so many processes, each with a device of its own;
    left out it is as many as torchrun started, else 1.
    ``device_map`` puts its layers on several devices in turn, as accelerate does it: auto,
    balanced, balanced_low_0, sequential, or the device of each module. ``kv_memory_mb`` counts on
    each device alone. Draft models lie on one device. ``record`` is the directory that each
    pipeline adds a recorded run to, for ``inferlab replay``.
    """

    aliases: ClassVar[Mapping[str, str]] = {"K": "max_draft", "k": "agree_k"}

    implementation: Literal["hf", "fake"] = "hf"
    base_model: ModelName = "inferlab/tiny"
    draft_model: ModelName = "inferlab/tiny-draft"

    draft_mode: DraftModeName = "vanilla"
    max_draft: DraftCount | None = None
    tree: Tree | None = None
    tree_nodes: Annotated[int, Field(ge=1, le=MAX_TREE_NODES - 1)] | None = None
    tree_width: Annotated[int, Field(ge=1, le=64)] = 4
    coupled_noise: bool = True
    ngram: NgramConfig = NgramConfig()
    medusa: MedusaConfig = MedusaConfig()
    eagle: EagleConfig = EagleConfig()
    early_exit: EarlyExitConfig = EarlyExitConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    fake: FakeConfig = FakeConfig()

    policy: Literal["longest_prefix", "rejection", "conf_threshold", "topk_agree", "typical"] = (
        "longest_prefix"
    )
    tau: Fraction = 0.5
    agree_k: PositiveCount = 5
    p: Fraction = 0.9

    controller: Literal["fixed", "adaptive", "cost"] | None = None
    cost_cache: bool = True
    min_k: DraftCount = 1
    max_k: DraftCount = 8
    target_acceptance: Fraction = 0.7

    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: Count = 0
    min_p: Fraction = 0.0
    repetition_penalty: Positive = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    max_new_tokens: PositiveCount = 64
    min_new_tokens: Count = 0
    stop: Texts = ()

    device: Device = "auto"
    force_device: Literal["cpu", "mps", "cuda"] | None = None
    dtype: Dtype = "auto"
    engine: Literal["auto", "native", "hf"] = "auto"
    quantization: Quantization = "none"
    draft_quantization: Quantization = "none"
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] | None = None
    device_map: DeviceMap | None = None
    page_size: Literal[1, 2, 4, 8, 16, 32, 64, 128, 256] = 16
    max_batch: Annotated[int, Field(ge=1, le=MOST_BATCH)] = 32
    kv_memory_mb: Positive | None = None
    num_pages: PositiveCount | None = None
    share_prefixes: bool = False
    record: Annotated[str, StringConstraints(min_length=1), allowed("a directory")] | None = None
    verbose: bool = False

    @property
    def effective_temperature(self) -> float:
        """The temperature to decode with: ``do_sample: false`` means 0 (greedy)."""
        return self.temperature if self.do_sample else 0.0

    @property
    def controller_name(self) -> str:
        """``controller``; else fixed where K is given, where tokens depend on what is drafted, as
        what pays is not the same in every run, and for fake models, which take no time; else
        cost."""
        by_hand = self.max_draft is not None or isinstance(self.tree, tuple)
        exact = self.policy == "longest_prefix" and self.implementation == "hf"
        return self.controller or ("cost" if exact and not by_hand else "fixed")

    @property
    def levels(self) -> int:
        """``max_draft``, or what suits the drafter."""
        mode = DRAFT_MODES[self.draft_mode]
        return mode.levels if self.max_draft is None else self.max_draft

    @property
    def nodes(self) -> int:
        """``tree_nodes``, or what suits the drafter."""
        mode = DRAFT_MODES[self.draft_mode]
        return mode.nodes if self.tree_nodes is None else self.tree_nodes

    @property
    def requested_device(self) -> str:
        """``force_device`` where it is set, else ``device`` (which may be "auto")."""
        return self.force_device or self.device

    @model_validator(mode="after")
    def _consistent(self) -> SpecdecConfig:
        for key, usual in (
            ("engine", "auto"),
            ("quantization", "none"),
            ("draft_quantization", "none"),
            ("kv_cache_dtype", "auto"),
        ):
            if self.implementation == "fake" and getattr(self, key) != usual:
                raise ValueError(
                    f"{key}: {getattr(self, key)!r} is not for implementation: 'fake', which has "
                    "no weights; set implementation to 'hf', or leave it out"
                )
        self._check_placement()
        for mode, enabled in (("medusa", self.medusa.enabled), ("eagle", self.eagle.enabled)):
            if enabled and not self.draft_mode.startswith(mode):
                raise ValueError(
                    f"{mode}.enabled: true contradicts draft_mode: {self.draft_mode!r}; the mode "
                    f"says who drafts: set it to {mode!r} (trained heads) or '{mode}-lite'"
                )
        misfit = tree_misfit(self.draft_mode, self.tree)
        if misfit:
            tree = list(self.tree) if isinstance(self.tree, tuple) else self.tree
            raise ValueError(f"tree: {tree!r} is not for draft_mode: {self.draft_mode!r}; {misfit}")
        adapts = self.controller == "adaptive" or "min_k" in self.model_fields_set
        if adapts and self.min_k > self.max_k:
            raise ValueError(
                f"min_k: {self.min_k} is not allowed; must be at most max_k ({self.max_k})"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: {self.min_new_tokens} is not allowed; "
                f"must be at most max_new_tokens ({self.max_new_tokens})"
            )
        if isinstance(self.tree, tuple):
            nodes = 1 + sum(math.prod(self.tree[: i + 1]) for i in range(len(self.tree)))
            if nodes > MAX_TREE_NODES:
                raise ValueError(
                    f"tree: {list(self.tree)} is not allowed: it has {nodes} nodes; "
                    f"must have at most {MAX_TREE_NODES}, the root included"
                )
        return self

    def _check_placement(self) -> None:
        """What several devices rule out."""
        spread = [
            f"{key}: {value!r}"
            for key, value in (
                ("tensor_parallel", self.tensor_parallel if self.tensor_parallel != 1 else None),
                ("device_map", self.device_map),
            )
            if value is not None
        ]
        if not spread:
            return
        if len(spread) > 1:
            raise ValueError(
                f"{spread[0]} contradicts {spread[1]}: one shares out each layer, the other puts "
                "layers one after the other; give one of them"
            )
        for key, usual in (("implementation", "hf"), ("quantization", "none")):
            value = getattr(self, key)
            if value != usual:
                raise ValueError(f"{spread[0]} is not for {key}: {value!r}; leave one of them out")
        if self.engine == "native":
            raise ValueError(
                f"{spread[0]} is not for engine: 'native', which has a model on one device; set "
                "engine to 'auto', or leave it out"
            )
        if ":" in self.requested_device:
            raise ValueError(
                f"{spread[0]} contradicts device: {self.requested_device!r}, which is one device; "
                "leave device out, and choose devices by CUDA_VISIBLE_DEVICES"
            )


class VllmConfig(Section):
    """An OpenAI-compatible server (``configs/vllm.yaml``).

    ``base_url`` beats ``host`` and ``port``. ``timeout`` and ``retry_delay`` are
    seconds; ``retry_attempts`` counts the first try.
    """

    host: Host = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    base_url: Annotated[
        str, StringConstraints(pattern=r"^https?://.+"), allowed("an http:// or https:// address")
    ] | None = None  # fmt: skip
    api_key: Annotated[str | None, Field(repr=False), allowed("a text")] = None
    model: ModelName = "llama-2-7b"
    endpoint: Literal["chat", "completions"] = "chat"
    max_tokens: PositiveCount = 50
    temperature: Temperature = 0.7
    seed: Seed | None = None
    timeout: Positive = 30.0
    retry_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    retry_delay: Annotated[float, Field(ge=0.0, le=3600.0, allow_inf_nan=False)] = 1.0
    log_level: LogLevel = "INFO"
    iterations: PositiveCount = 5
    warmup_iterations: Count = 1

    @property
    def url(self) -> str:
        """The server's address without a trailing slash."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (self.base_url or f"http://{host}:{self.port}").rstrip("/")


KINDS: dict[str, type[Section]] = {
    "baseline": BaselineConfig,
    "specdec": SpecdecConfig,
    "vllm": VllmConfig,
}

ConfigT = TypeVar("ConfigT", BaselineConfig, SpecdecConfig, VllmConfig)


def load_config(
    kind: type[ConfigT],
    path: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    names: Mapping[str, str] | None = None,
) -> ConfigT:
    """Reads, merges and validates one configuration.

    Args:
        kind: BaselineConfig, SpecdecConfig or VllmConfig.
        path: a YAML file, or None for the defaults alone. ``configs/NAME.yaml`` is found from any
            directory: a file at that path wins, else the packaged one is read.
        overrides: values that beat the file. Those that are None count as not given. A
            ``temperature`` here also beats a ``do_sample: false`` of the file.
        names: how the caller's user wrote each override (``{"max_draft": "--K"}``), for messages.

    Raises:
        ConfigError: naming file (or flag), key, value and what is allowed.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    values = read_yaml(path) if path is not None else {}
    if "temperature" in given and "do_sample" not in given and "do_sample" in kind.model_fields:
        values.pop("do_sample", None)
    return build(kind, path, values, given, names or {}, KINDS, kind.aliases)


def choices(config: type[Section], key: str) -> tuple[str, ...]:
    """The values of a key that has a fixed set of them, for ``choices=`` of its flag."""
    annotation = config.model_fields[key].annotation
    parts = [annotation, *get_args(annotation)]
    return tuple(
        choice for part in parts if get_origin(part) is Literal for choice in get_args(part)
    )
