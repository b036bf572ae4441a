"""What the kernels promise: a requirement each, and which measured rows it is about.

A requirement is judged by its worst row. The CUDA ones are about an H200-class GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from table import Row, case, number

LARGE_VOCAB = 151_936


@dataclass(frozen=True)
class Requirement:
    """`value` of every row that `about` picks must be at least (or at most) `limit`."""

    text: str
    device: str
    about: Callable[[Row], bool]
    value: Callable[[Row], float | None]
    limit: float
    unit: str = ""
    at_most: bool = False

    def rows(self, rows: Sequence[Row]) -> list[tuple[float, Row]]:
        """Measured values and their rows, the worst first."""
        found = [
            (value, row)
            for row in rows
            if row["device"] == self.device and self.about(row)
            if (value := self.value(row)) is not None
        ]
        return sorted(found, key=lambda pair: pair[0], reverse=self.at_most)

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def cells(self, rows: Sequence[Row]) -> list[str]:
        """Requirement, limit, worst measured value, verdict and the row it is from."""
        sign = "at most" if self.at_most else "at least"
        limit = f"{sign} {self.limit:g}{self.unit}"
        found = self.rows(rows)
        if not found:
            return [self.text, limit, "not measured", "", ""]
        value, row = found[0]
        verdict = "holds" if self.holds(value) else "does not hold"
        return [self.text, limit, f"{number(value)}{self.unit}", verdict, case(row)]


def verify_row(setting: str) -> Callable[[Row], bool]:
    want = {"B": 1, "N": 64, "V": LARGE_VOCAB, "dtype": "bf16"}
    return lambda row: (
        row["op"] == "verify_tree_match"
        and row["variant"] == setting
        and all(row["shape"].get(k) == v for k, v in want.items())
    )


def any_verify_row(row: Row) -> bool:
    return any(verify_row(s)(row) for s in ("greedy", "plain", "top-p", "top-k+top-p"))


def long_attention(row: Row) -> bool:
    s = row["shape"]
    return (
        row["op"] == "paged_tree_attention"
        and row["variant"] == "decode"
        and s["L"] >= 4096
        and s["B"] * s["Hkv"] >= 256
        and s["N"] <= 16
    )


def memory_bound_attention(row: Row) -> bool:
    """Long, and with few query rows for each key: with many, arithmetic is the limit on a CPU."""
    s = row["shape"]
    if row["op"] != "paged_tree_attention" or row["bound"] is None or s["B"] * s["L"] < 32768:
        return False
    return s["N"] * s["Hq"] // s["Hkv"] <= 4


def large_kv(row: Row) -> bool:
    return row["op"].startswith("kv_") and row["bound"] == "copy" and row["bytes"] >= 32e6


def filtered_sample(row: Row) -> bool:
    return (
        row["op"] == "sample"
        and row["variant"] == "top-k+top-p"
        and row["shape"]["V"] == LARGE_VOCAB
    )


def compaction(row: Row) -> bool:
    s = row["shape"]
    return row["op"] == "kv_compact" and s["layers"] == 32 and s["B"] == 32 and s["S"] <= 4


def of_bandwidth(row: Row) -> float | None:
    value = row["fraction_of_bandwidth"]
    return None if value is None else 100 * value


def of_plain(row: Row) -> float | None:
    value = row["fraction_of_plain"]
    return None if value is None else 100 * value


def of_read(row: Row) -> float | None:
    measured = row["bandwidth_gb_per_s"].get("read")
    return None if measured is None else 100 * row["gb_per_s"] / measured


def over_plain(row: Row) -> float | None:
    value = row["fraction_of_plain"]
    return None if value is None else 1 / value


def times_as_fast_as(rival: str) -> Callable[[Row], float | None]:
    return lambda row: row["times_as_fast_as"].get(rival)


def time_us(row: Row) -> float:
    return row["time_us"]


def over_call_bound(row: Row) -> float:
    return row["time_us"] / (3 + 0.5 * row["shape"]["tensors"])


REQUIREMENTS = (
    Requirement(
        "attention, B * L >= 32768, up to 4 query rows per KV head: of a plain read of its bytes",
        "cpu", memory_bound_attention, of_plain, 75, " %",
    ),
    Requirement(
        "KV ops that move 32 MB or more: of the read bandwidth",
        "cpu", large_kv, of_read, 75, " %",
    ),
    Requirement(
        "verify_tree_match, B = 1, N = 64, V = 152k, bf16: greedy, over a plain read of the rows "
        "that it visits",
        "cpu", verify_row("greedy"), over_plain, 1.3, " x", at_most=True,
    ),
    Requirement(
        "the same with any sampling parameters",
        "cpu", any_verify_row, over_plain, 1.3, " x", at_most=True,
    ),
    Requirement(
        "sample with top-k and top-p, V = 152k: times as fast as torch",
        "cpu", filtered_sample, times_as_fast_as("torch"), 5, " x",
    ),
    Requirement(
        "overhead of a call, over 3 us + 0.5 us per tensor",
        "cpu", lambda row: row["op"] == "overhead", over_call_bound, 1, " x", at_most=True,
    ),
    Requirement(
        "attention, L >= 4096, B * Hkv >= 256, N <= 16: of the copy bandwidth",
        "cuda", long_attention, of_bandwidth, 80, " %",
    ),
    Requirement(
        "the same: times as fast as FlashInfer",
        "cuda", long_attention, times_as_fast_as("FlashInfer"), 1, " x",
    ),
    Requirement(
        "greedy verify, B = 1, N = 64, V = 152k, bf16",
        "cuda", verify_row("greedy"), time_us, 10, " us", at_most=True,
    ),
    Requirement(
        "Gumbel verify with top-p, B = 1, N = 64, V = 152k, bf16",
        "cuda", verify_row("top-p"), time_us, 25, " us", at_most=True,
    ),
    Requirement(
        "compaction of 32 layers, B = 32, up to 4 nodes kept",
        "cuda", compaction, time_us, 10, " us", at_most=True,
    ),
)  # fmt: skip
