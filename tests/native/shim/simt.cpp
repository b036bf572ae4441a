#include "simt.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

#include "context.h"
#include "sanitize.h"

namespace simt {

Thread* self = nullptr;

namespace {

constexpr unsigned kNoSync = 1;       // TSan: a switch orders nothing
constexpr size_t kIdleTurns = 10000;  // each thread's, of nothing but polling, until a livelock
constexpr size_t kCanaryBytes = 64;   // behind shared memory, where no sanitizer watches
constexpr unsigned char kCanary = 0xA5;
// TSan: so many fibres take their turns in a launch before one serves a second block. What a fibre
// knows it keeps, so a race between two blocks that it served would go unseen.
constexpr size_t kManyFibres = 512;

struct Block;

// What runs a thread. It outlives the launch, since it is dear to make.
struct Strand {
  char* stack = nullptr;
  size_t bytes = 0;
  void* tsan = nullptr;
};

enum class State { kReady, kPolling, kAtBlockBarrier, kAtWarp, kDone };

struct Fiber {
  Thread thread;
  Context context;
  Strand strand;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  unsigned warp = 0;
  State state = State::kReady;
  Site site;          // where it waits
  uint32_t mask = 0;  // and for which lanes
};

// Lanes of one mask on their way through one exchange after another. Two rounds are kept: a lane
// may still be leaving one while others come to the next. The same holds for barriers.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  unsigned round = 0;
  Site intrinsic;
  uint64_t values[2][kWarpSize] = {};
  char sync[2] = {};
};

struct Warp {
  uint32_t alive = 0;
  std::list<Meeting> meetings;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
  size_t alive = 0, at_barrier = 0;
  unsigned round = 0;  // of the barrier
  int count[2] = {};   // true predicates, by round
  Site site;           // of the barrier under way
  char sync[2] = {}, fence_sync = 0;
  bool observed = false;  // has read what others may write at any time
};

// Fibres whose turn it is, first come, first served. Each is in it once at most.
class Queue {
 public:
  void reset(size_t capacity) {
    ring_.resize(std::max(capacity, size_t{1}));
    head_ = size_ = 0;
  }
  void push(Fiber* f) {
    const size_t end = head_ + size_++;
    ring_[end < ring_.size() ? end : end - ring_.size()] = f;
  }
  Fiber* pop() {
    Fiber* f = ring_[head_];
    if (++head_ == ring_.size()) head_ = 0;
    --size_;
    return f;
  }
  size_t size() const { return size_; }

 private:
  std::vector<Fiber*> ring_;
  size_t head_ = 0, size_ = 0;
};

struct Launch {
  void (*body)(void*) = nullptr;
  void* arg = nullptr;
  Dim grid, dim;
  size_t shared_bytes = 0;
  unsigned threads = 0;                // in a block
  std::vector<unsigned> warps, lanes;  // order of turns: of warps, of each warp's lanes
  Queue ready;
  bool failed = false;
  Context scheduler;
  void* scheduler_tsan = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
};

std::mutex launch_mutex;
Launch run;
Fiber* current = nullptr;
std::deque<Strand> strands;
size_t strands_made = 0;
char start_sync = 0, end_sync = 0, fence_sync = 0;
char error_text[512] = "";
uint64_t random_state = 0x9E3779B97F4A7C15u;

size_t random_below(size_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % n;
}

template <typename It>
void shuffle(It begin, It end) {
  for (auto n = end - begin; n > 1; --n) std::swap(begin[n - 1], begin[random_below(n)]);
}

template <typename... Args>
void set_error(const char* format, Args... args) {
  run.failed = true;
  std::snprintf(error_text, sizeof error_text, format, args...);
}
void set_error(const char* what) { set_error("%s", what); }

// ---- turns --------------------------------------------------------------------------------------

void to_scheduler(bool leaving) {
  Fiber* fiber = current;
  ASAN(__sanitizer_start_switch_fiber(leaving ? nullptr : &fiber->fake_stack, run.scheduler_stack,
                                      run.scheduler_stack_bytes));
  TSAN(__tsan_switch_to_fiber(run.scheduler_tsan, kNoSync));
  (void)leaving;
  Context::swap(fiber->context, run.scheduler);
  ASAN(__sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr));
}

void resume(Fiber& fiber) {
  current = &fiber;
  self = &fiber.thread;
  fiber.state = State::kReady;
  ASAN(__sanitizer_start_switch_fiber(&run.scheduler_fake_stack, fiber.strand.stack,
                                      fiber.strand.bytes));
  TSAN(__tsan_switch_to_fiber(fiber.strand.tsan, kNoSync));
  Context::swap(run.scheduler, fiber.context);
  ASAN(__sanitizer_finish_switch_fiber(run.scheduler_fake_stack, nullptr, nullptr));
  self = nullptr;
  current = nullptr;
}

// Ends the launch: an exception could not cross over to the scheduler's stack.
template <typename... Args>
[[noreturn]] void fail(const char* format, Args... args) {
  set_error(format, args...);
  for (;;) to_scheduler(false);
}

// The lanes of a warp that are in `state` and, at a warp's meeting, wait for `mask`.
void wake(Block& block, unsigned warp, State state, uint32_t mask) {
  const unsigned end = std::min((warp + 1) * kWarpSize, run.threads);
  for (unsigned i = warp * kWarpSize; i < end; ++i) {
    Fiber& f = block.fibers[run.lanes[i]];
    if (f.state != state || f.mask != mask) continue;
    f.state = State::kReady;
    run.ready.push(&f);
  }
}

void end_barrier(Block& block) {
  block.at_barrier = 0;
  block.count[++block.round & 1] = 0;
  for (const unsigned w : run.warps) wake(block, w, State::kAtBlockBarrier, 0);
}

void entry() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &run.scheduler_stack, &run.scheduler_stack_bytes));
  TSAN(__tsan_acquire(&start_sync));
  run.body(run.arg);
  TSAN(__tsan_release(&end_sync));
  Fiber& fiber = *current;
  Block& block = *fiber.block;
  fiber.state = State::kDone;
  block.warps[fiber.warp].alive &= ~(1u << fiber.thread.lane);
  --block.alive;
  // A barrier waits for the threads that have not exited.
  if (block.alive > 0 && block.at_barrier == block.alive) end_barrier(block);
  to_scheduler(true);
}

// ---- blocks -------------------------------------------------------------------------------------

Strand take_strand() {
#if defined(SIMT_TSAN)
  const bool make = strands.empty() || strands_made < kManyFibres;
#else
  const bool make = strands.empty();
#endif
  if (!make) {
    const Strand strand = strands.front();
    strands.pop_front();
    return strand;
  }
  Strand strand;
  strand.stack = new_stack();
  // Tops at different distances from a page's end, or all would share a few lines of the cache.
  strand.bytes = kStackBytes - strands_made++ % 63 * 256;
  TSAN(strand.tsan = __tsan_create_fiber(0));
  return strand;
}

// Strands go round under TSan (see kManyFibres); elsewhere the last one used is the warmest.
void give_back(const Strand& strand) {
#if defined(SIMT_TSAN)
  strands.push_back(strand);
#else
  strands.push_front(strand);
#endif
}

// A thread that will not end: what it did counts as done, and its half-used strand is made new.
void abandon(Fiber& fiber) {
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(fiber.strand.tsan, kNoSync);
  __tsan_release(&end_sync);
  __tsan_switch_to_fiber(run.scheduler_tsan, kNoSync);
  __tsan_destroy_fiber(fiber.strand.tsan);
  fiber.strand.tsan = __tsan_create_fiber(0);
#endif
  ASAN(__asan_unpoison_memory_region(fiber.strand.stack, fiber.strand.bytes));
  fiber.state = State::kDone;
}

std::unique_ptr<Block> open_block(Dim index) {
  auto block = std::make_unique<Block>();
#if defined(SIMT_ASAN)
  const size_t bytes = std::max<size_t>(run.shared_bytes, 1);
#else
  const size_t bytes = run.shared_bytes + kCanaryBytes;
#endif
  void* shared = nullptr;
  if (posix_memalign(&shared, 1024, bytes) != 0) throw std::bad_alloc();
  block->shared.reset(static_cast<unsigned char*>(shared));
  std::memset(shared, kCanary, bytes);
  std::memset(shared, 0xff, run.shared_bytes);
  block->alive = run.threads;
  block->warps.resize(run.warps.size());
  block->fibers.resize(run.threads);
  Dim thread{0, 0, 0};
  for (unsigned i = 0; i < run.threads; ++i) {
    Fiber& f = block->fibers[i];
    f.thread = Thread{thread, index, run.dim, run.grid, i % kWarpSize, shared};
    if (++thread.x == run.dim.x) {
      thread.x = 0;
      if (++thread.y == run.dim.y) {
        thread.y = 0;
        ++thread.z;
      }
    }
    f.block = block.get();
    f.warp = i / kWarpSize;
    block->warps[f.warp].alive |= 1u << f.thread.lane;
    f.strand = take_strand();
    f.context.init(f.strand.stack, f.strand.bytes, entry);
  }
  for (const unsigned w : run.warps) wake(*block, w, State::kReady, 0);
  return block;
}

void close_block(std::unique_ptr<Block> block) {
  for (Fiber& f : block->fibers) {
    if (f.state != State::kDone) abandon(f);
    give_back(f.strand);
  }
#if !defined(SIMT_ASAN)
  const unsigned char* canary = block->shared.get() + run.shared_bytes;
  for (size_t i = 0; i < kCanaryBytes && !run.failed; ++i) {
    if (canary[i] != kCanary) set_error("a block wrote past the end of its shared memory");
  }
#endif
  const Uninstrumented scope;
  block.reset();
}

// ---- the scheduler ------------------------------------------------------------------------------

const char* name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash != nullptr ? slash + 1 : path;
}

void describe(const Fiber& f, char* text, size_t size) {
  const Dim b = f.thread.block, t = f.thread.thread;
  const int n =
      std::snprintf(text, size, "thread (%u, %u, %u) of block (%u, %u, %u) waits at %s:%d", t.x,
                    t.y, t.z, b.x, b.y, b.z, name(f.site.file), f.site.line);
  if (f.state == State::kAtWarp) std::snprintf(text + n, size - n, " for lanes %#x", f.mask);
}

void report_deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  const Fiber* first = nullptr;
  const Fiber* other = nullptr;  // that waits elsewhere
  for (const auto& block : blocks) {
    for (const Fiber& f : block->fibers) {
      if (f.state == State::kDone) continue;
      if (first == nullptr) first = &f;
      if (f.site.line != first->site.line || f.mask != first->mask) other = &f;
    }
  }
  char a[200], b[200] = "";
  describe(*first, a, sizeof a);
  if (other != nullptr) describe(*other, b, sizeof b);
  set_error("deadlock: %s%s%s", a, other != nullptr ? ", " : "", b);
}

void run_blocks(const std::vector<std::unique_ptr<Block>>& blocks) {
  size_t idle = 0;
  while (run.ready.size() > 0) {
    Fiber& f = *run.ready.pop();
    resume(f);
    if (run.failed) return;
    if (f.state != State::kPolling) {
      idle = 0;
      continue;
    }
    run.ready.push(&f);
    if (++idle > kIdleTurns * run.ready.size()) {
      char text[200];
      describe(f, text, sizeof text);
      return set_error("livelock: threads poll memory that never changes; %s", text);
    }
  }
  for (const auto& block : blocks) {
    if (block->alive > 0) return report_deadlock(blocks);
  }
}

bool check_launch(Dim grid, Dim block, size_t shared_bytes, bool together) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64) {
    set_error("illegal launch: blocks of %zu threads", threads);
  } else if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    set_error("illegal launch: a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  } else if (shared_bytes > kMaxSharedBytes) {
    set_error("illegal launch: %zu bytes of shared memory; the device has %zu", shared_bytes,
              kMaxSharedBytes);
  } else if (together && blocks > kMultiprocessors) {
    set_error("illegal launch: %zu blocks together; the device runs %u at once", blocks,
              kMultiprocessors);
  }
  return !run.failed;
}

Dim index_of(size_t i, Dim grid) {
  return Dim{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
             static_cast<unsigned>(i / grid.x / grid.y)};
}

}  // namespace

bool launch(Dim grid, Dim block, size_t shared_bytes, bool together, void (*body)(void*),
            void* arg) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  run.failed = false;
  if (!check_launch(grid, block, shared_bytes, together)) return false;
  run.body = body;
  run.arg = arg;
  run.grid = grid;
  run.dim = block;
  run.shared_bytes = shared_bytes;
  run.threads = block.x * block.y * block.z;
  run.warps.resize((run.threads + kWarpSize - 1) / kWarpSize);
  run.lanes.resize(run.threads);
  std::iota(run.warps.begin(), run.warps.end(), 0);
  std::iota(run.lanes.begin(), run.lanes.end(), 0);
  shuffle(run.warps.begin(), run.warps.end());
  for (unsigned i = 0; i < run.threads; i += kWarpSize) {
    shuffle(run.lanes.begin() + i, run.lanes.begin() + std::min(i + kWarpSize, run.threads));
  }
  std::vector<unsigned> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  shuffle(order.begin(), order.end());
  const size_t at_once = together ? order.size() : 1;
  run.ready.reset(at_once * run.threads);
  TSAN(run.scheduler_tsan = __tsan_get_current_fiber());
  for (size_t i = 0; i < order.size() && !run.failed; i += at_once) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (size_t j = i; j < i + at_once; ++j) blocks.push_back(open_block(index_of(order[j], grid)));
    TSAN(__tsan_release(&start_sync));
    run_blocks(blocks);
    while (!blocks.empty()) {
      close_block(std::move(blocks.back()));
      blocks.pop_back();
    }
  }
  TSAN(__tsan_acquire(&end_sync));
  return !run.failed;
}

const char* last_error() { return error_text; }

// ---- what kernels call --------------------------------------------------------------------------

int block_barrier(int predicate, Site site) {
  Fiber& fiber = *current;
  Block& block = *fiber.block;
  const unsigned round = block.round & 1;
  if (block.at_barrier == 0) block.site = site;
  if (block.site.line != site.line) {
    fail("divergent barrier: one block's threads wait at %s:%d and at %s:%d", name(block.site.file),
         block.site.line, name(site.file), site.line);
  }
  block.count[round] += predicate != 0;
  TSAN(__tsan_release(&block.sync[round]));
  if (++block.at_barrier == block.alive) {
    end_barrier(block);
  } else {
    fiber.state = State::kAtBlockBarrier;
    fiber.site = site;
    fiber.mask = 0;
    to_scheduler(false);
  }
  TSAN(__tsan_acquire(&block.sync[round]));
  return block.count[round];
}

namespace {

Meeting& meeting_of(Warp& warp, uint32_t mask) {
  for (Meeting& m : warp.meetings) {
    if (m.mask == mask) return m;
  }
  const Uninstrumented scope;
  warp.meetings.emplace_back();
  warp.meetings.back().mask = mask;
  return warp.meetings.back();
}

// Returns the values that the lanes brought.
const uint64_t* meet(uint32_t mask, uint64_t value, Site intrinsic, bool ordered) {
  Fiber& fiber = *current;
  Warp& warp = fiber.block->warps[fiber.warp];
  const unsigned lane = fiber.thread.lane;
  if ((mask >> lane & 1u) == 0) fail("lane %u is not in its own mask, %#x", lane, mask);
  if ((mask & ~warp.alive) != 0) {
    fail("lanes %#x of mask %#x have exited or never were", mask & ~warp.alive, mask);
  }
  Meeting& m = meeting_of(warp, mask);
  const unsigned round = m.round & 1;
  if (m.arrived == 0) m.intrinsic = intrinsic;
  if (m.intrinsic.line != intrinsic.line) {
    fail("divergent warp: lanes of mask %#x meet in different operations, %s:%d and %s:%d", mask,
         name(m.intrinsic.file), m.intrinsic.line, name(intrinsic.file), intrinsic.line);
  }
  m.values[round][lane] = value;
  m.arrived |= 1u << lane;
  if (ordered) TSAN(__tsan_release(&m.sync[round]));
  if (m.arrived == mask) {
    m.arrived = 0;
    ++m.round;
    wake(*fiber.block, fiber.warp, State::kAtWarp, mask);
  } else {
    fiber.state = State::kAtWarp;
    fiber.site = intrinsic;
    fiber.mask = mask;
    to_scheduler(false);
  }
  if (ordered) TSAN(__tsan_acquire(&m.sync[round]));
  return m.values[round];
}

}  // namespace

void warp_barrier(uint32_t mask, Site intrinsic) { meet(mask, 0, intrinsic, true); }

const uint64_t* warp_exchange(uint32_t mask, uint64_t value, Site intrinsic) {
  return meet(mask, value, intrinsic, false);
}

void yield(Site site) {
  current->state = State::kPolling;
  current->site = site;
  to_scheduler(false);
}

void observe() {
  if (current != nullptr) current->block->observed = true;
}

// A fence orders what comes after it behind what others did before theirs only if an atomic read in
// between has told that they did.
void fence() {
  if (current->block->observed) TSAN(__tsan_acquire(&fence_sync));
  TSAN(__tsan_release(&fence_sync));
}

void fence_block() {
  TSAN(__tsan_acquire(&current->block->fence_sync));
  TSAN(__tsan_release(&current->block->fence_sync));
}

}  // namespace simt
