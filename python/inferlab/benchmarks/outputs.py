"""The JSON of a benchmark as types, of which its schema is made."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from inferlab.client.results import PingAnswer
from inferlab.records import BaselineResult, RecordJson
from inferlab.specdec.results import SpecdecResult

Interval = tuple[float, float] | None


class Summary(TypedDict):
    """See `statistics.summarize`."""

    mean: float
    median: float
    std: float
    min: float
    max: float
    p90: float
    p99: float
    mean_ci95: Interval
    median_ci95: Interval
    raw: list[float]


class Speedup(TypedDict):
    """See `statistics.ratio_of_medians`."""

    ratio: float
    ci95: Interval
    by_group: list[float]


class Environment(TypedDict):
    """See `environment.describe_environment`."""

    time: str
    system: str
    processor: str
    cores: int | None
    torch_threads: int | None
    kernel_threads: int
    simd: str
    gpus: list[str]
    inferlab: str
    torch: str
    transformers: str
    numpy: str
    python: str


class Figures(TypedDict, total=False):
    """Summaries over runs, and where the time of a token went; what a mode does not measure is
    left out."""

    latency_ms: Summary
    tokens_per_second: Summary
    ms_per_token: Summary
    num_tokens: Summary
    acceptance_rate: Summary
    mean_accepted_length: Summary
    target_forwards: Summary
    first_token_ms: Summary
    ttft_ms: Summary
    tpot_ms: Summary
    energy_j: Summary
    phases_ms_per_token: dict[str, float]


class AnyRun(TypedDict):
    """One run; with ``error`` it has no figures."""

    mode: str
    iteration: int
    order: int
    latency_ms: NotRequired[float]
    num_tokens: NotRequired[int]
    tokens_per_second: NotRequired[float]
    ms_per_token: NotRequired[float]
    acceptance_rate: NotRequired[float]
    mean_accepted_length: NotRequired[float]
    target_forwards: NotRequired[int]
    first_token_ms: NotRequired[float]
    ttft_ms: NotRequired[float]
    tpot_ms: NotRequired[float]
    energy_j: NotRequired[float]
    perplexity: NotRequired[float | None]
    error: NotRequired[str | None]


class RunRow(AnyRun):
    """A run of one prompt. ``where``: its line in its file."""

    prompt_index: int
    batch_size: NotRequired[int]
    where: NotRequired[str]


class BatchRow(AnyRun):
    """A run of prompts that were decoded together. ``timings_ms``: by phase, of the batch."""

    batch_size: int
    prompt_indices: list[int]
    timings_ms: dict[str, float]
    records: list[RecordJson]


class Place(TypedDict):
    """Which run a raw result is of, and how the target judged it."""

    prompt_index: int
    iteration: int
    perplexity: NotRequired[float | None]
    perplexity_loss: NotRequired[float | None]


class RawSpecdec(SpecdecResult, Place):
    """A result of the engine."""


class RawBaseline(BaselineResult, Place):
    """A result of the local baseline."""


class RawHTTP(PingAnswer, Place):
    """A result of the client."""


class OfPrompt(TypedDict):
    """Medians over the iterations of a prompt."""

    prompt_index: int
    iterations: int
    latency_ms: float
    tokens_per_second: float
    ms_per_token: NotRequired[float]


class Perplexity(TypedDict):
    """See `perplexity.add_perplexity`; what is infinite is null."""

    perplexity: float | None
    loss: float | None
    tokens: int
    model: str


class Difference(TypedDict):
    """The first difference of a prompt's token ids, and whether it is a tie."""

    prompt_index: int
    where: NotRequired[str]
    modes: list[str]
    position: int
    token_ids: list[int | None]
    tie: bool | None
    scores: NotRequired[list[float | None]]
    gap: NotRequired[float | None]
    rounding_step: NotRequired[float]


class TokenIds(TypedDict):
    """See `token_ids.compare_runs`."""

    compared: list[str]
    not_compared: dict[str, str]
    prompts: int
    identical: bool
    verdict: Literal["identical", "ties", "different", "nothing to compare"]
    differences: list[Difference]


class OtherRecord(TypedDict):
    """A request of a mode that the one measured is compared with."""

    mode: str
    prompt_index: int
    iteration: int
    record: RecordJson


class Comparison(TypedDict):
    """See `comparison.compare_modes`."""

    modes: dict[str, Figures]
    records: list[OtherRecord]
    speedup_vs_plain: NotRequired[Speedup | None]
    speedup_vs_hf: NotRequired[Speedup | None]
    baseline: str
    latency_ms: Summary | None
    tokens_per_second: Summary | None
    token_ids: TokenIds


class BenchmarkStats(Figures):
    """See `BenchmarkRunner.run_benchmark`."""

    mode: str
    runner_name: str
    iterations: int
    warmup_iterations: int
    prompt: str
    prompts: list[str]
    num_prompts: int
    environment: Environment
    failures: list[RunRow]
    interrupted: bool
    runs: list[RunRow]
    raw_results: NotRequired[list[RawSpecdec] | list[RawBaseline] | list[RawHTTP]]
    by_prompt: NotRequired[list[OfPrompt]]
    perplexity: NotRequired[Perplexity]
    baseline_comparison: NotRequired[Comparison]
    error: NotRequired[str]
    # What was measured, as far as the mode knows it.
    implementation: NotRequired[str]
    base_model: NotRequired[str]
    draft_model: NotRequired[str | None]
    draft_mode: NotRequired[str]
    max_draft: NotRequired[int]
    tree: NotRequired[str | list[int] | None]
    policy: NotRequired[dict[str, Any]]
    controller: NotRequired[dict[str, Any]]
    server: NotRequired[str]
    endpoint: NotRequired[str]
    stream: NotRequired[bool]
    model: NotRequired[str | None]
    device: NotRequired[str]
    dtype: NotRequired[str]
    max_new_tokens: int
    temperature: float
    seed: int


class ModeFigures(TypedDict):
    """Figures of a mode among all."""

    tokens_per_second: float
    target_forwards: NotRequired[float]
    accepted_length: NotRequired[float | None]
    acceptance_by_position: NotRequired[list[float]]
    phases_ms_per_token: NotRequired[dict[str, float]]
    x_plain: NotRequired[Speedup | None]
    x_hf: NotRequired[Speedup | None]


class ModesSettings(TypedDict):
    """What the modes ran on, and with what."""

    base_model: str
    device: str
    dtype: str
    prompts: int
    max_new_tokens: int
    temperature: float
    seed: int
    controller: str
    policy: str
    iterations: int
    drafters: dict[str, dict[str, Any]]


class ModesStats(TypedDict):
    """See `modes.ModesResult`; batch sizes are keys, and so texts."""

    environment: Environment
    settings: ModesSettings
    batches: dict[str, dict[str, ModeFigures]]
    token_ids: dict[str, TokenIds]
    prompts: list[str]
    runs: list[BatchRow]
    failures: list[RunRow]
    interrupted: bool


class TargetFigures(TypedDict):
    """A target of one format: ``forward_ms``: by rows; ``same_tokens``: of the prompts that both
    decoded (``compared``), those that it continues as the unquantised one; ``first_difference``:
    where it does not, after how many new tokens (median)."""

    weights_mb: float
    kv_bytes_per_token: int
    forward_ms: dict[str, float]
    perplexity: float | None
    tokens_per_second: float
    x_unquantized: Speedup | None
    same_tokens: int
    compared: int
    first_difference: float | None


class PairFigures(TypedDict):
    """A target and a draft: ``x_plain``: over the same target without drafts; ``x_unquantized``:
    over the unquantised target without drafts."""

    target: str
    draft: str
    draft_mb: float | None
    accepted_length: float | None
    tokens_per_second: float
    x_plain: Speedup | None
    x_unquantized: Speedup | None


class MatrixSettings(TypedDict):
    """What the formats ran on, and with what."""

    base_model: str
    draft_model: str | None
    draft_mode: str
    device: str
    dtype: str
    controller: str
    prompts: int
    max_new_tokens: int
    temperature: float
    seed: int
    iterations: int


class MatrixStats(TypedDict):
    """See `quantization.QuantizationMatrix`."""

    environment: Environment
    settings: MatrixSettings
    targets: dict[str, TargetFigures]
    pairs: list[PairFigures]
    prompts: list[str]
    runs: list[BatchRow]
    failures: list[RunRow]
    interrupted: bool


class PeerEngine(TypedDict):
    """An engine: ``weights_mb`` and ``peak_rss_mb`` (of its process) are null where not known."""

    title: str
    versions: dict[str, str]
    format: str
    weights_mb: float | None
    peak_rss_mb: float | None


class PeerFigures(TypedDict):
    """Figures of an engine; ``plain_is_x`` and ``speculative_is_x``: how many times as fast ours
    is. What an engine does not tell is left out or null."""

    tokens_per_second: Summary
    ms_per_token: NotRequired[Summary]
    first_token_ms: NotRequired[Summary]
    joules_per_token: float | None
    accepted_length: float | None
    plain_is_x: Speedup | None
    speculative_is_x: Speedup | None


class PeerRow(TypedDict):
    """A run of a batch; with ``error`` it has no figures."""

    batch_size: int
    prompt_indices: list[int]
    mode: str
    iteration: int
    order: int
    latency_ms: NotRequired[float]
    num_tokens: NotRequired[int]
    tokens_per_second: NotRequired[float]
    ms_per_token: NotRequired[float]
    first_token_ms: NotRequired[float]
    energy_j: NotRequired[float]
    error: NotRequired[str]


class PeersSettings(TypedDict):
    """What was decoded, and how; ``energy_sources`` is empty where energy is not known."""

    base_model: str
    draft_model: str | None
    draft_mode: str
    device: str
    dtype: str
    threads: int
    prompts: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    controller: str
    iterations: int
    energy_sources: list[str]


class PeersStats(TypedDict):
    """See `side_by_side.SideBySide`; ``left_out``: peers that were not measured to the end, and
    why; ``token_ids``: by batch size, of each engine with plain decoding's."""

    environment: Environment
    settings: PeersSettings
    prompts: list[str]
    engines: dict[str, PeerEngine]
    left_out: dict[str, str]
    batches: dict[str, dict[str, PeerFigures]]
    token_ids: dict[str, dict[str, TokenIds]]
    runs: list[PeerRow]
    failures: list[RunRow]
    interrupted: bool
