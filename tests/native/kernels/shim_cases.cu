// Small kernels, right ones and broken twins, that say whether the shim tells them apart
// (tests/native/test_shim.py). `program CASE` runs one: it prints "ok", "wrong: ...", or "failed: "
// and the launch's error; a sanitizer's report ends it.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "inferlab/cuda_device.h"
#include "launch.cuh"

namespace inferlab::cuda {
namespace {

using Result = std::string;
constexpr unsigned kFull = 0xffffffffu;

template <typename P>
bool ran(void (*kernel)(P), dim3 grid, dim3 block, size_t shared, const P& p,
         Blocks blocks = Blocks::kIndependent) {
  return launch(kernel, grid, block, shared, nullptr, p, blocks) == Status::kOk;
}

#define REQUIRE(condition) \
  if (!(condition)) return "wrong: " #condition

// ---- block barriers -----------------------------------------------------------------------------

constexpr int kThreads = 200;

struct Sums {
  int values[kThreads];
};

struct SumParams {
  const int* in;
  int* out;
};

enum class Barriers { kAll, kNoneAfterWrite, kNoneAfterRead };

// out[block] = the sum of the block's 200 inputs, in two passes over the same shared memory.
template <Barriers kBarriers>
__global__ void sum_kernel(SumParams p) {
  Sums& s = shared_memory<Sums>();
  const unsigned t = threadIdx.x;
  int total = 0;
  for (int pass = 0; pass < 2; ++pass) {
    s.values[t] = p.in[blockIdx.x * kThreads + t] + pass;
    if (kBarriers != Barriers::kNoneAfterWrite) __syncthreads();
    if (t == 0) {
      for (int i = 0; i < kThreads; ++i) total += s.values[i];
    }
    if (kBarriers != Barriers::kNoneAfterRead) __syncthreads();
  }
  if (t == 0) p.out[blockIdx.x] = total;
}

template <Barriers kBarriers>
Result sums() {
  constexpr int kBlocks = 40;
  std::vector<int> in(kBlocks * kThreads), out(kBlocks, -1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * i % 1000);
  const SumParams p{in.data(), out.data()};
  if (!ran(sum_kernel<kBarriers>, kBlocks, kThreads, sizeof(Sums), p)) return "failed";
  for (int b = 0; b < kBlocks; ++b) {
    int expected = kThreads;
    for (int i = 0; i < kThreads; ++i) expected += 2 * in[b * kThreads + i];
    REQUIRE(out[b] == expected);
  }
  return "ok";
}

__global__ void predicates_kernel(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  const int some = __syncthreads_count(t % 3 == 0);
  const int any = __syncthreads_or(t == 77), none = __syncthreads_or(t == 1000);
  const int all = __syncthreads_and(t < 100), most = __syncthreads_and(t < 99);
  out[t] = some * 16 + any * 8 + none * 4 + all * 2 + most;
}

Result predicates() {
  std::vector<int> out(100);
  if (!ran(predicates_kernel, 1, 100, 0, out.data())) return "failed";
  for (const int v : out) REQUIRE(v == 34 * 16 + 8 + 2);
  return "ok";
}

// The threads from 70 on leave early; the others' barriers do not wait for them.
__global__ void early_exit_kernel(int* out) {
  Sums& s = shared_memory<Sums>();
  const unsigned t = threadIdx.x;
  if (t >= 70) return;
  for (int i = 0; i < 3; ++i) {
    s.values[t] = static_cast<int>(t) + i;
    __syncthreads();
    out[t] = s.values[(t + 1) % 70];
    __syncthreads();
  }
}

Result early_exit() {
  std::vector<int> out(70);
  if (!ran(early_exit_kernel, 1, kThreads, sizeof(Sums), out.data())) return "failed";
  for (int i = 0; i < 70; ++i) REQUIRE(out[i] == (i + 1) % 70 + 2);
  return "ok";
}

__global__ void divergent_kernel(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}

// Thread 0 waits for a block that waits for it.
__global__ void deadlock_kernel(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x == 0) {
    __syncthreads();
  } else if (threadIdx.x < 32) {
    __syncwarp();
  }
}

// ---- warps --------------------------------------------------------------------------------------

__global__ void shuffles_kernel(int* wrong) {
  const int lane = static_cast<int>(threadIdx.x % 32), v = 100 + static_cast<int>(threadIdx.x);
  const int base = v - lane;
  int bad = 0;
  bad += __shfl_sync(kFull, v, 5) != base + 5;
  bad += __shfl_sync(kFull, v, 35) != base + 3;
  bad += __shfl_sync(kFull, v, 2, 8) != base + lane / 8 * 8 + 2;
  bad += __shfl_xor_sync(kFull, v, 9) != base + (lane ^ 9);
  bad += __shfl_xor_sync(kFull, v, 8, 8) != (lane & 8 ? base + (lane ^ 8) : v);
  bad += __shfl_down_sync(kFull, v, 3) != (lane < 29 ? v + 3 : v);
  bad += __shfl_up_sync(kFull, v, 3) != (lane >= 3 ? v - 3 : v);
  bad += __shfl_up_sync(kFull, v, 1, 16) != (lane % 16 >= 1 ? v - 1 : v);
  bad += __shfl_sync(kFull, 0.5 * v, 1) != 0.5 * (base + 1);
  // Both halves at once, each on its own, and one lane alone.
  if (lane < 16) {
    for (int i = 1; i < 16; ++i) bad += __shfl_xor_sync(0xffffu, v, i) != base + (lane ^ i);
  } else if (lane < 31) {
    bad +=
        __shfl_down_sync(0x7fff0000u, v, 1) != (lane < 30 ? v + 1 : -1);  // of lane 31: undefined
  } else {
    bad += __shfl_sync(0x80000000u, v, 31) != v;
  }
  __syncwarp();
  atomicAdd(wrong, bad);
}

__global__ void votes_kernel(int* wrong) {
  const unsigned lane = threadIdx.x % 32;
  int bad = 0;
  bad += __ballot_sync(kFull, lane % 2) != 0xaaaaaaaau;
  bad += __any_sync(kFull, lane == 31) != 1;
  bad += __any_sync(kFull, 0) != 0;
  bad += __all_sync(kFull, 1) != 1;
  bad += __all_sync(kFull, lane != 4) != 0;
  bad += __match_any_sync(kFull, lane / 4) != 0xfu << lane / 4 * 4;
  bad += __reduce_add_sync(kFull, lane) != 496;
  bad += __reduce_max_sync(kFull, lane ^ 5u) != 31;
  bad += __reduce_min_sync(kFull, lane + 7) != 7;
  bad += __reduce_or_sync(kFull, 1u << lane) != kFull;
  if (lane >= 8 && lane < 12) {
    bad += __ballot_sync(0xf00u, lane != 9) != 0xd00u;
    bad += __reduce_add_sync(0xf00u, lane) != 38;
    bad += __all_sync(0xf00u, lane >= 8) != 1;
  }
  atomicAdd(wrong, bad);
}

Result counts_none(void (*kernel)(int*)) {
  for (int i = 0; i < 5; ++i) {
    int wrong = 0;
    if (!ran(kernel, 3, 64, 0, &wrong)) return "failed";
    REQUIRE(wrong == 0);
  }
  return "ok";
}

enum class Order { kSyncWarp, kShuffle, kNone };

// Lanes hand values on through shared memory; a shuffle brings them together but orders nothing.
template <Order kOrder>
__global__ void hand_on_kernel(int* out) {
  Sums& s = shared_memory<Sums>();
  const unsigned t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    s.values[t] = static_cast<int>(t) + i;
    if (kOrder == Order::kSyncWarp) __syncwarp();
    if (kOrder == Order::kShuffle) __shfl_sync(kFull, 0, 0);
    out[t] = s.values[t ^ 1];
    if (kOrder == Order::kSyncWarp) __syncwarp();
    if (kOrder == Order::kShuffle) __shfl_sync(kFull, 0, 0);
  }
}

template <Order kOrder>
Result hand_on() {
  std::vector<int> out(64);
  if (!ran(hand_on_kernel<kOrder>, 1, 64, sizeof(Sums), out.data())) return "failed";
  for (int i = 0; i < 64; ++i) REQUIRE(out[i] == (i ^ 1) + 1);
  return "ok";
}

__global__ void divergent_warp_kernel(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(kFull, 1, 0);
  } else {
    out[threadIdx.x] = __ballot_sync(kFull, 1) != 0;
  }
}

__global__ void not_in_mask_kernel(int* out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0); }

__global__ void exited_lane_kernel(int* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_sync(kFull, 1, 0);
}

// ---- atomics, fences, blocks --------------------------------------------------------------------

struct Cells {
  int sum, high, low, swapped, lock, locked_sum;
  unsigned bits;
  float total;
  unsigned long long wide;
};

__global__ void atomics_kernel(Cells* c) {
  const int id = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&c->sum, id);
  atomicAdd(&c->total, 0.5f);
  atomicAdd(&c->wide, 1ull << 33);
  atomicMax(&c->high, id);
  atomicMin(&c->low, -id);
  atomicOr(&c->bits, 1u << id % 32);
  atomicExch(&c->swapped, id);
  while (atomicCAS(&c->lock, 0, 1) != 0) __nanosleep(20);
  __threadfence();
  c->locked_sum += id;
  __threadfence();
  atomicExch(&c->lock, 0);
}

Result atomics() {
  Cells c{};
  if (!ran(atomics_kernel, 5, 40, 0, &c)) return "failed";
  REQUIRE(c.sum == 199 * 100);
  REQUIRE(c.locked_sum == 199 * 100);
  REQUIRE(c.total == 100.0f);
  REQUIRE(c.wide == 200ull << 33);
  REQUIRE(c.high == 199);
  REQUIRE(c.low == -199);
  REQUIRE(c.bits == kFull);
  REQUIRE(c.swapped >= 0 && c.swapped < 200);
  return "ok";
}

struct LastBlockParams {
  int* parts;  // [blocks, threads]
  unsigned* done;
  int* out;
};

enum class Fence { kDevice, kBlock, kNone, kWriterOnly, kReaderOnly };

template <Fence kFence>
__device__ void fence_of(bool writer) {
  if (kFence == Fence::kDevice) __threadfence();
  if (kFence == Fence::kBlock) __threadfence_block();
  if (kFence == Fence::kWriterOnly && writer) __threadfence();
  if (kFence == Fence::kReaderOnly && !writer) __threadfence();
}

// The block that finishes last adds up what all of them wrote.
template <Fence kFence>
__global__ void last_block_kernel(LastBlockParams p) {
  const unsigned t = threadIdx.x;
  p.parts[blockIdx.x * blockDim.x + t] = static_cast<int>(blockIdx.x + t);
  fence_of<kFence>(true);
  int last = 0;
  __syncthreads();
  if (t == 0) last = atomicAdd(p.done, 1u) == gridDim.x - 1;
  if (!__syncthreads_or(last)) return;
  fence_of<kFence>(false);
  int total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += p.parts[b * blockDim.x + t];
  p.out[t] = total;
}

template <Fence kFence>
Result last_block() {
  constexpr int kBlocks = 9, kWide = 64;
  std::vector<int> parts(kBlocks * kWide), out(kWide);
  unsigned done = 0;
  const LastBlockParams p{parts.data(), &done, out.data()};
  if (!ran(last_block_kernel<kFence>, kBlocks, kWide, 0, p)) return "failed";
  for (int t = 0; t < kWide; ++t) REQUIRE(out[t] == kBlocks * t + 36);
  return "ok";
}

struct RelayParams {
  int* data;
  int* flag;
};

// Block b waits for block b - 1, reads what it left and leaves more.
template <Fence kFence>
__global__ void relay_kernel(RelayParams p) {
  if (threadIdx.x != 0) return;
  const int b = static_cast<int>(blockIdx.x);
  while (*static_cast<volatile int*>(p.flag) < b) __nanosleep(50);
  fence_of<kFence>(false);
  *p.data += b + 1;
  fence_of<kFence>(true);
  *static_cast<volatile int*>(p.flag) = b + 1;
}

template <Fence kFence>
Result relay(Blocks blocks) {
  constexpr int kBlocks = static_cast<int>(simt::kMultiprocessors);
  int data = 0, flag = 0;
  const RelayParams p{&data, &flag};
  if (!ran(relay_kernel<kFence>, kBlocks, 32, 0, p, blocks)) return "failed";
  REQUIRE(data == kBlocks * (kBlocks + 1) / 2);
  REQUIRE(flag == kBlocks);
  return "ok";
}

// A kernel reads, in other threads, what the launch before it wrote.
__global__ void reverse_kernel(RelayParams p) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  p.flag[gridDim.x * blockDim.x - 1 - i] = p.data[i];
}

Result launches_are_ordered() {
  std::vector<int> a(5 * 64), b(a.size());
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<int>(i);
  for (int round = 0; round < 6; ++round) {
    if (!ran(reverse_kernel, 5, 64, 0, RelayParams{a.data(), b.data()})) return "failed";
    std::swap(a, b);
  }
  for (size_t i = 0; i < a.size(); ++i) REQUIRE(a[i] == static_cast<int>(i));
  return "ok";
}

struct OrderParams {
  int *next, *order;
};

__global__ void order_kernel(OrderParams p) {
  const int id = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  p.order[atomicAdd(p.next, 1)] = id;
}

// The orders of blocks, of warps and of lanes all change.
Result orders_change() {
  std::set<int> blocks, warps, lanes;
  for (int i = 0; i < 20; ++i) {
    int next = 0;
    std::vector<int> order(4 * 96);
    if (!ran(order_kernel, 4, 96, 0, OrderParams{&next, order.data()})) return "failed";
    blocks.insert(order[0] / 96);
    warps.insert(order[0] % 96 / 32);
    lanes.insert(order[0] % 32);
  }
  REQUIRE(blocks.size() == 4);
  REQUIRE(warps.size() == 3);
  REQUIRE(lanes.size() > 8);
  return "ok";
}

struct GridParams {
  unsigned* seen;
};

__global__ void grid_kernel(GridParams p) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  p.seen[block * threads + thread] += 1;
}

Result whole_grid(dim3 grid, dim3 block) {
  std::vector<unsigned> seen(size_t{grid.x} * grid.y * grid.z * block.x * block.y * block.z);
  if (!ran(grid_kernel, grid, block, 0, GridParams{seen.data()})) return "failed";
  for (const unsigned n : seen) REQUIRE(n == 1);
  return "ok";
}

// ---- memory -------------------------------------------------------------------------------------

template <int kOver>
__global__ void overrun_kernel(int* out) {
  Sums& s = shared_memory<Sums>();
  volatile int* values = s.values;
  values[threadIdx.x + kOver] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + kOver];
}

template <int kOver>
__global__ void global_overrun_kernel(int* out) {
  out[threadIdx.x + kOver] = 1;
}

__global__ void poison_kernel(int* out) {
  out[threadIdx.x] = shared_memory<Sums>().values[threadIdx.x];
}

Result poison() {
  std::vector<int> out(kThreads);
  for (int i = 0; i < 2; ++i) {  // the second launch gets what the first one used
    if (!ran(poison_kernel, 1, kThreads, sizeof(Sums), out.data())) return "failed";
    for (const int v : out) REQUIRE(v == -1);
    if (sums<Barriers::kAll>() != "ok") return "wrong: sums";
  }
  return "ok";
}

template <int kOffset>
__global__ void aligned_kernel(int* out) {
  const uint4 v = *reinterpret_cast<const uint4*>(out + kOffset);
  if (threadIdx.x == 0) out[0] = static_cast<int>(v.x);
}

template <int kStep>
__global__ void overflow_kernel(int* out) {
  const int stride = 1 << 30;
  out[threadIdx.x] = (static_cast<int>(threadIdx.x) * kStep + 1) * stride;
}

__device__ int deep(volatile int* p, int n) {
  volatile int here[1000];
  here[n % 1000] = *p;
  return n == 0 ? here[0] : deep(here + n % 1000, n - 1) + here[n % 1000];
}

template <int kDepth>
__global__ void stack_kernel(int* out) {
  *out = deep(out, kDepth);
}

// ---- the cases ----------------------------------------------------------------------------------

// The kernel on memory of its own; then, whatever came of it, the shim must still work.
Result run_on_ints(void (*kernel)(int*), unsigned threads = 32, size_t shared = 0) {
  std::vector<int> out(threads);
  const bool fine = ran(kernel, 1, threads, shared, out.data());
  const std::string error = fine ? "" : last_error();
  for (int& v : out) v = 0;
  const Result after = sums<Barriers::kAll>();
  if (after != "ok") return "wrong: afterwards " + after;
  return fine ? "ok" : "failed: " + error;
}

const std::map<std::string, std::function<Result()>> kCases = {
    {"sums", sums<Barriers::kAll>},
    {"sums/no barrier after write", sums<Barriers::kNoneAfterWrite>},
    {"sums/no barrier after read", sums<Barriers::kNoneAfterRead>},
    {"predicates", predicates},
    {"early exit", early_exit},
    {"divergent barrier", [] { return run_on_ints(divergent_kernel, 64); }},
    {"deadlock", [] { return run_on_ints(deadlock_kernel, 64); }},
    {"shuffles", [] { return counts_none(shuffles_kernel); }},
    {"votes", [] { return counts_none(votes_kernel); }},
    {"hand on", hand_on<Order::kSyncWarp>},
    {"hand on/by shuffle", hand_on<Order::kShuffle>},
    {"hand on/by nothing", hand_on<Order::kNone>},
    {"divergent warp", [] { return run_on_ints(divergent_warp_kernel); }},
    {"lane not in mask", [] { return run_on_ints(not_in_mask_kernel); }},
    {"lane exited", [] { return run_on_ints(exited_lane_kernel); }},
    {"lane never was", [] { return run_on_ints(exited_lane_kernel, 6); }},
    {"atomics", atomics},
    {"last block", last_block<Fence::kDevice>},
    {"last block/fence of the block", last_block<Fence::kBlock>},
    {"last block/no fence", last_block<Fence::kNone>},
    {"last block/writer's fence", last_block<Fence::kWriterOnly>},
    {"last block/reader's fence", last_block<Fence::kReaderOnly>},
    {"relay", [] { return relay<Fence::kDevice>(Blocks::kTogether); }},
    {"relay/no fence", [] { return relay<Fence::kNone>(Blocks::kTogether); }},
    {"relay/not together", [] { return relay<Fence::kDevice>(Blocks::kIndependent); }},
    {"launches are ordered", launches_are_ordered},
    {"orders change", orders_change},
    {"whole grid", [] { return whole_grid(dim3(5, 3, 2), dim3(4, 5, 3)); }},
    {"many blocks", [] { return whole_grid(dim3(3000), dim3(256)); }},
    {"shared", [] { return run_on_ints(overrun_kernel<0>, kThreads, sizeof(Sums)); }},
    {"shared/overrun", [] { return run_on_ints(overrun_kernel<1>, kThreads, sizeof(Sums)); }},
    {"global", [] { return run_on_ints(global_overrun_kernel<0>); }},
    {"global/overrun", [] { return run_on_ints(global_overrun_kernel<1>); }},
    {"poison", poison},
    {"aligned", [] { return run_on_ints(aligned_kernel<4>); }},
    {"aligned/not", [] { return run_on_ints(aligned_kernel<1>); }},
    {"overflow/not", [] { return run_on_ints(overflow_kernel<0>); }},
    {"overflow", [] { return run_on_ints(overflow_kernel<1>); }},
    {"stack", [] { return run_on_ints(stack_kernel<5>, 1); }},
    {"stack/overflow", [] { return run_on_ints(stack_kernel<100>, 1); }},
    {"launch/threads", [] { return run_on_ints(poison_kernel, 1025, 1025 * sizeof(int)); }},
    {"launch/shared memory", [] { return run_on_ints(poison_kernel, 32, 100 * 1024); }},
    {"launch/together",
     [] {
       int data = 0, flag = 0;
       const RelayParams p{&data, &flag};
       const bool fine = ran(relay_kernel<Fence::kDevice>, 7, 32, 0, p, Blocks::kTogether);
       return fine ? Result("ok") : "failed: " + Result(last_error());
     }},
};

}  // namespace
}  // namespace inferlab::cuda

int main(int argc, char** argv) {
  using inferlab::cuda::kCases;
  for (int i = 1; i < argc; ++i) {
    std::string result = kCases.at(argv[i])();
    if (result == "failed") result += std::string(": ") + inferlab::cuda::last_error();
    std::printf("%s\n", result.c_str());
  }
  return 0;
}
