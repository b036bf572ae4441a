"""Deliberately broken kernels: one change to csrc/cuda each, and the test that must notice it.

python tests/native/mutants.py     prints who catches what
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# What failed tests say: a comparison that does not hold, or a launch that the shim ended.
WRONG_RESULT = r"AssertionError|^E +assert |not close"
RACE = "WARNING: ThreadSanitizer: data race"
OUT_OF_BOUNDS = "ERROR: AddressSanitizer: heap-buffer-overflow"


@dataclass(frozen=True)
class Mutant:
    """Attributes:
    op, flaw: its name; the flaw in a word or two.
    file: of csrc/cuda.
    old, new: the change; `old` stands there exactly once.
    why: what is wrong with it.
    test: the device test that must fail, as pytest names it below tests/kernels/device.
    variant: how it is compiled for that (shim_build.VARIANTS).
    unit: the source that is compiled with the change, if `file` is not it; default: the op's.
    shows: what the failing test's output must hold.
    """

    op: str
    flaw: str
    file: str
    old: str
    new: str
    why: str
    test: str
    variant: str = "plain"
    shows: str = WRONG_RESULT
    unit: str | None = None

    @property
    def source(self) -> str:
        return self.unit or (self.file if self.file.endswith(".cu") else f"{self.op}.cu")

    @property
    def name(self) -> str:
        test = self.test.split("::")[1].split("[")[0]
        return f"{self.op}-{self.flaw}-by-{test}".replace(" ", "-")

    def patch(self, cuda_dir: Path, target: Path) -> None:
        """Makes `target` a copy of `cuda_dir` with the flaw."""
        shutil.copytree(cuda_dir, target)
        path = target / self.file
        source = path.read_text()
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.file} has {count} times, not once: {self.old}")
        path.write_text(source.replace(self.old, self.new))

    def caught_by(self, status: int, output: str) -> bool:
        """Whether pytest's exit status and words say that the test failed for the right reason."""
        if re.search(r"^ERROR |\d+ errors?\b|no tests ran", output, re.MULTILINE):
            return False
        if re.search(self.shows, output, re.MULTILINE) is None:
            return False
        if self.variant == "plain":
            return status == 1
        # The report ends the process, and names the broken source or the folder it lies in.
        return status != 0 and (self.file in output or self.name in output)


KV = [
    Mutant(
        op="kv_compact",
        flaw="downwards",
        file="kv_compact.cu",
        old="for (int j = 0; j < steps; j += kAhead) {",
        new="for (int j = (steps - 1) / kAhead * kAhead; j >= 0; j -= kAhead) {",
        why="accepted nodes increase, so only upwards is every row read before it is overwritten",
        test="test_device_kv.py::test_compact",
    ),
    Mutant(
        op="kv_compact",
        flaw="barrier removed",
        file="kv_compact.cu",
        old="      __syncthreads();  // before the moves are replaced\n",
        new="",
        why="the next moves overwrite those that slower warps still read",
        test="test_device_kv.py::test_compact_of_a_path_longer_than_a_block_of_threads",
        variant="tsan",
        shows=RACE,
    ),
    Mutant(
        op="kv_pages",
        unit="kv_compact.cu",
        flaw="page skipped at an edge",
        file="pages.cuh",
        old="const int64_t index = slot >> page_shift;",
        new="const int64_t index = (slot + 1) >> page_shift;",
        why="the last slot of a page is looked up in the page behind it",
        test="test_device_kv.py::test_compact_moves_across_a_page_edge",
    ),
    Mutant(
        op="kv_compact",
        flaw="divergent barrier",
        file="kv_compact.cu",
        old="""      if (any && mine) move_column(cache, row_words, moves, steps);
      __syncthreads();""",
        new="""      if (!mine) continue;
      if (any) move_column(cache, row_words, moves, steps);
      __syncthreads();""",
        why="threads without a column of their own go on to the next barrier",
        test="test_device_kv.py::test_compact_of_a_path_longer_than_a_block_of_threads",
        shows="kv_compact failed on the device: divergent barrier: .*kv_compact.cu",
    ),
    Mutant(
        op="kv_pages",
        unit="kv_compact.cu",
        flaw="table's end not checked",
        file="pages.cuh",
        old="if (slot < 0 || index >= max_pages) return -1;",
        new="if (slot < 0) return -1;",
        why="a length or a node may lead behind the table",
        test="test_device_kv.py::test_compact_skips_rows_that_do_not_exist",
        variant="asan",
        shows=OUT_OF_BOUNDS,
    ),
    Mutant(
        op="kv_append",
        flaw="page offset off by one",
        file="kv_append.cu",
        old="slots.row_of(p.seq_lens[b] + p.node_offset + n)",
        new="slots.row_of(p.seq_lens[b] + p.node_offset + n + 1)",
        why="node n belongs in slot seq_len + n",
        test="test_device_kv.py::test_append",
    ),
    Mutant(
        op="kv_append",
        flaw="32-bit overflow",
        file="kv_append.cu",
        old="const int64_t to = row * words + w;",
        new="const int to = static_cast<int>(row) * words + w;",
        why="a cache may have more than 2^31 words",
        test="test_device_offsets.py::test_append_and_gather",
        variant="asan",
        shows="signed integer overflow",
    ),
    Mutant(
        op="kv_gather",
        flaw="32-bit offsets",
        file="kv_gather.cu",
        old="pages[row[i] * words + w]",
        new="pages[static_cast<uint32_t>(row[i] * words + w)]",
        why="a cache may have more than 2^32 words; no sanitizer minds unsigned numbers",
        test="test_device_offsets.py::test_append_and_gather",
    ),
    Mutant(
        op="kv_gather",
        flaw="length off by one",
        file="kv_gather.cu",
        old="slot < length ? slots.row_of(slot) : -1",
        new="slot <= length ? slots.row_of(slot) : -1",
        why="what lies behind a sequence is zeros in the result",
        test="test_device_kv.py::test_gather",
    ),
]

TREE = [
    Mutant(
        op="build_tree",
        flaw="ancestor bit dropped",
        file="build_tree.cu",
        old="for (; node >= w * 64; node = parents[node])",
        new="for (; node > w * 64; node = parents[node])",
        why="nodes 0, 64, ... are ancestors like others",
        test="test_device_tree.py::test_matches_the_reference",
    ),
    Mutant(
        op="build_tree",
        flaw="padding node visible",
        file="build_tree.cu",
        old="int64_t node = inside ? n : -1;",
        new="int64_t node = inside || parents[n] == -2 ? n : -1;",
        why="padding sees nothing and nothing sees it, not even itself",
        test="test_device_tree.py::test_matches_the_reference",
    ),
]

LAYER = [
    Mutant(
        op="rms_norm",
        flaw="barrier removed",
        file="rms_norm.cu",
        old="    __syncthreads();\n    sum = 0.0f;",
        new="    sum = 0.0f;",
        why="the sums of slower warps are not there yet",
        test="test_device_layer.py::test_rms_norm",
        variant="tsan",
        shows=RACE,
    ),
]

ATTENTION = [
    Mutant(
        op="linear",
        flaw="sums read at once",
        file="linear.cu",
        old="""  __syncthreads();
  // A warp adds up""",
        new="""  // A warp adds up""",
        why="a warp adds up what all warps have written",
        test="test_device_layer.py::test_linear",
        variant="tsan",
        shows=RACE,
    ),
    Mutant(
        op="linear",
        flaw="copies not awaited",
        file="linear.cu",
        old="loader.copies.template wait<kStages - 2>();",
        new="loader.copies.template wait<kStages - 1>();",
        why="the stage that is read must have arrived",
        test="test_device_layer.py::test_linear",
    ),
    Mutant(
        op="linear",
        flaw="product not rounded",
        file="linear.cu",
        old="sum = round_to<T>(sum) + load_float(static_cast<const T*>(p.residual)[at]);",
        new="sum = sum + load_float(static_cast<const T*>(p.residual)[at]);",
        why="the layer rounds the product before it adds the residual",
        test="test_device_layer.py::test_linear_rounds_the_product_before_it_adds_the_residual",
    ),
    Mutant(
        op="attention",
        unit="paged_tree_attention.cu",
        flaw="split merged without rescaling",
        file="attention_rows.cuh",
        old="const MergeScales scales{exp2f(state.maximum - base), exp2f(more.maximum - base)};",
        new="const MergeScales scales{1.0f, exp2f(more.maximum - base)};",
        why="what was gathered under a smaller maximum must shrink when the maximum grows",
        test="test_device_attention.py::test_lengths_about_the_edges_of_splits",
    ),
    Mutant(
        op="attention",
        flaw="spans cut by the launch",
        file="paged_tree_attention.cu",
        old="const int parts_per_span = kSpan / p.part;",
        new="const int parts_per_span = 1;",
        why="a row's sums must be grouped alike however many blocks its batch fills",
        test="test_device_attention.py::test_splits_merge_alike_in_blocks_and_in_workspace",
    ),
    Mutant(
        op="attention",
        unit="paged_tree_attention.cu",
        flaw="window off by one",
        file="attention_rows.cuh",
        old="clamp_int(position + 1 - p.a.window, 0, p.slots)",
        new="clamp_int(position - p.a.window, 0, p.slots)",
        why="a window of w slots counts the query's own",
        test="test_device_attention.py::test_matches_the_reference",
    ),
    Mutant(
        op="attention",
        flaw="soft-cap ignored",
        file="paged_tree_attention.cu",
        old="p.cap = a.softcap * kLog2E;",
        new="p.cap = 0.0f;",
        why="scores are capped before the softmax",
        test="test_device_attention.py::test_matches_the_reference",
    ),
    Mutant(
        op="attention",
        unit="paged_tree_attention.cu",
        flaw="ancestor bits dropped",
        file="attention_rows.cuh",
        old="if (shift != 0) path |= word_or_zero(row.ancestors, words, word + 1) << (64 - shift);",
        new="",
        why="64 slots of a tail straddle two words of ancestors",
        test="test_device_attention.py::test_long_and_large",
    ),
    Mutant(
        op="attention",
        unit="paged_tree_attention.cu",
        flaw="padding node sees the prefix",
        file="attention_rows.cuh",
        old="if (path == 0) return;  // a padding node",
        new="",
        why="a node without bits is padding and gives zeros",
        test="test_device_attention.py::"
        "test_sequences_without_nodes_and_nodes_without_bits_give_zeros",
    ),
    Mutant(
        op="attention",
        unit="paged_tree_attention.cu",
        flaw="barrier removed",
        file="attention_block.cuh",
        old="    copies.template wait<kStages - 2>();\n    __syncthreads();\n",
        new="    copies.template wait<kStages - 2>();\n",
        why="a thread's wait says nothing of the tile that other threads copy",
        test="test_device_attention.py::test_page_sizes",
        variant="tsan",
        shows=RACE,
    ),
    Mutant(
        op="attention",
        unit="paged_tree_attention.cu",
        flaw="32-bit offsets",
        file="attention_block.cuh",
        old="int64_t{row} * p.row_bytes;",
        new="static_cast<uint32_t>(row) * static_cast<uint32_t>(p.row_bytes);",
        why="a cache may have more than 2^32 elements",
        test="test_device_offsets.py::test_attention",
    ),
]

SAMPLE = [
    Mutant(
        op="sample",
        flaw="tie to the higher id",
        file="row_draw.cuh",
        old="if (x[i] > score_) {",
        new="if (x[i] >= score_) {",
        why="of equal logits the lowest id is chosen",
        test="test_device_sample.py::test_negative_zero_ties_with_zero",
    ),
    Mutant(
        op="sample",
        flaw="NaN row sampled",
        file="row_draw.cuh",
        old="return seen.bad != 0 ? -1 : token_of(seen.best);",
        new="return token_of(seen.best);",
        why="a row with NaN is reported as -1",
        test="test_device_sample.py::test_broken_rows_are_reported",
    ),
    Mutant(
        op="sample",
        flaw="top-k off by one",
        file="row_filters.cuh",
        old="const uint32_t nth = s.k - s.count_above - 1;",
        new="const uint32_t nth = s.k - s.count_above;",
        why="one token too many is kept",
        test="test_device_sample.py::test_top_k_1_is_argmax_on_ties",
    ),
    Mutant(
        op="sample",
        flaw="noise keyed by batch index",
        file="row.cuh",
        old="seed = static_cast<uint64_t>(s.seed[b]);",
        new="seed = static_cast<uint64_t>(s.seed[b]) + static_cast<uint64_t>(b);",
        why="the noise is a request's own, wherever in a batch it stands",
        test="test_device_sample.py::test_matches_the_cpu_and_the_reference",
    ),
    Mutant(
        op="sample",
        flaw="writer's fence removed",
        file="row_group.cuh",
        old="    __threadfence();\n    atomicAdd(&shared.boards->arrived, 1u);",
        new="    atomicAdd(&shared.boards->arrived, 1u);",
        why="who sees that a block has arrived need not see what it wrote before",
        test="test_device_sample.py::test_every_path[cuda-shim-1-top_k and top_p-normal]",
        variant="tsan",
        shows=RACE,
    ),
    Mutant(
        op="sample",
        flaw="reader's fence removed",
        file="row_group.cuh",
        old="< awaited) __nanosleep(32);\n    __threadfence();\n",
        new="< awaited) __nanosleep(32);\n",
        why="what is read after the wait may be older than the wait's end",
        test="test_device_sample.py::test_every_path[cuda-shim-1-top_k and top_p-normal]",
        variant="tsan",
        shows=RACE,
    ),
    Mutant(
        op="verify_match",
        flaw="counters accumulate",
        file="row_launch.cuh",
        old="if (params.work.zero_bytes > 0) {",
        new="if (params.work.zero_bytes < 0) {",
        why="a graph's replay finds in the workspace what the last one left",
        test="test_device_verify.py::test_one_workspace_for_all_calls",
        shows=f"{WRONG_RESULT}|livelock",
    ),
    Mutant(
        op="verify_match",
        flaw="32-bit offsets",
        file="row_penalties.cuh",
        old="b * logits.batch_stride + node * logits.node_stride,",
        new="static_cast<uint32_t>(b * logits.batch_stride + node * logits.node_stride),",
        why="B * N * V may pass 2^32",
        test="test_device_verify.py::test_rows_past_two_to_the_32_elements",
    ),
]

VERIFY = [
    Mutant(
        op="verify_rejection",
        flaw="residual not updated",
        file="verify_rejection.cu",
        old="if (total > kEmpty) step = Step{p_scale, q_scale, token};",
        new="total = shared_.target.total;",
        why="the next sibling is tried against what the rejection left of p",
        test="test_device_verify_rejection.py::test_the_residual_is_updated_between_siblings",
    ),
    Mutant(
        op="verify_rejection",
        flaw="u = 0 accepted",
        file="verify_rejection.cu",
        old="return p > 0.0 && static_cast<double>(u) * q < p;",
        new="return static_cast<double>(u) * q <= p;",
        why="u <= p / q accepts a token that the target never gives",
        test="test_device_verify_rejection.py::test_zero_probability_is_never_accepted",
    ),
    Mutant(
        op="verify_rejection",
        flaw="duplicate siblings count twice",
        file="verify_rejection.cu",
        old="if (!with_replacement() && tried(token)) continue;",
        new="",
        why="drawn without replacement, a token that was rejected cannot come again",
        test="test_device_verify_rejection.py::test_outcomes_for_given_siblings",
    ),
    Mutant(
        op="verify_rejection",
        flaw="noise of the draft used again",
        file="verify_rejection.cu",
        old="philox4x32_10(position_, first / 4, kPurposeRecovery, 0u,",
        new="philox4x32_10(position_, first / 4, kPurposeDraft, 0u,",
        why="the recovery draw must not depend on what the draft drew",
        test="test_device_verify_rejection.py::test_vllms_bias_is_not_here",
    ),
    Mutant(
        op="verify_lossy",
        flaw="top-k off by one",
        file="verify_lossy.cu",
        old="k.op.top_k < size ? static_cast<uint32_t>(k.op.top_k) : 0u;",
        new="static_cast<uint32_t>(k.op.top_k) + 1u;",
        why="the k + 1st likely token is not among the k most likely",
        test="test_device_verify_lossy.py::test_the_rules_by_hand",
    ),
]

MUTANTS = [*KV, *TREE, *LAYER, *ATTENTION, *SAMPLE, *VERIFY]


if __name__ == "__main__":
    width = max(len(f"{m.op}: {m.flaw}") for m in MUTANTS)
    for m in MUTANTS:
        sys.stdout.write(f"{m.op + ': ' + m.flaw:<{width}}  {m.variant:<5}  {m.test}\n")
