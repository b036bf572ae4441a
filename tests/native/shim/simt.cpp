#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

// This file is compiled without instrumentation and tells the sanitizers what it does.
#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define TSAN(call) call
#else
#define TSAN(call)
#endif
#if defined(SIMT_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(void const volatile* address, size_t size);
}
#define ASAN(call) call
#else
#define ASAN(call)
#endif

namespace simt {

Thread* self = nullptr;

namespace {

constexpr unsigned kNoSync = 1;  // TSan: a switch orders nothing
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kIdleRounds = 100000;  // rounds of nothing but polling before we call it a livelock

// ---- contexts -----------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack and swaps stack pointers.
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
extern "C" void simt_switch(void** save, void* load);

struct Context {
  void* sp = nullptr;
  void init(char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>(stack + kStackBytes - 64);  // 16-byte aligned
    *--top = 0;                                                         // as if called
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    sp = top;
  }
  static void swap(Context& from, Context& to) { simt_switch(&from.sp, to.sp); }
};
#else
struct Context {
  ucontext_t uc;
  void init(char* stack, void (*entry)()) {
    getcontext(&uc);
    uc.uc_stack.ss_sp = stack;
    uc.uc_stack.ss_size = kStackBytes;
    uc.uc_link = nullptr;
    makecontext(&uc, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.uc, &to.uc); }
};
#endif

// ---- threads and their meeting points -----------------------------------------------------------

struct Block;

// Lanes of one mask on their way through one exchange. Results of two rounds are kept: a lane may
// still read the last one while others have arrived at the next.
struct Meeting {
  uint32_t arrived = 0;
  unsigned round = 0;
  uint64_t values[2][kWarpSize] = {};
  char sync = 0;
};

struct Warp {
  uint32_t alive = 0;
  std::map<uint32_t, Meeting> meetings;
};

enum class State { kReady, kPolling, kAtBlockBarrier, kAtWarp, kDone };

struct Fiber {
  Thread thread;
  Context context;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  unsigned warp = 0;
  State state = State::kReady;
  Meeting* meeting = nullptr;  // where a lane waits, and for which round to pass
  unsigned round = 0;
  unsigned generation = 0;  // of the block barrier it waits at
};

struct Block {
  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { std::free(shared); }

  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  void* shared = nullptr;
  size_t alive = 0, at_barrier = 0;
  int count = 0;           // true predicates so far
  int last_count[2] = {};  // by generation
  unsigned generation = 0;
  char sync = 0;
};

// Stacks and TSan fibres outlive a launch: both are dear to make.
struct Pool {
  std::vector<char*> stacks;
  std::vector<void*> tsan;
} pool;

struct Launch {
  Context scheduler;
  void* scheduler_tsan = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
  void (*body)(void*) = nullptr;
  void* arg = nullptr;
  bool progress = false;
  const char* error = nullptr;
  std::vector<std::unique_ptr<Block>> ended;  // for TSan a free is a write: all at the end
  char start_sync = 0, end_sync = 0, fence_sync = 0;
};

std::mutex launch_mutex;
Launch run;
Fiber* current = nullptr;
uint64_t order_state = 0x9E3779B97F4A7C15u;

uint64_t next_random() {
  order_state ^= order_state << 13;
  order_state ^= order_state >> 7;
  order_state ^= order_state << 17;
  return order_state;
}

template <typename T>
void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
}

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
  ASAN(__sanitizer_start_switch_fiber(&run.scheduler_fake_stack, fiber.stack, kStackBytes));
  TSAN(__tsan_switch_to_fiber(fiber.tsan, kNoSync));
  Context::swap(run.scheduler, fiber.context);
  ASAN(__sanitizer_finish_switch_fiber(run.scheduler_fake_stack, nullptr, nullptr));
  self = nullptr;
  current = nullptr;
}

void release_barrier_if_full(Block& block) {
  if (block.alive == 0 || block.at_barrier < block.alive) return;
  block.last_count[block.generation & 1] = block.count;
  block.count = 0;
  block.at_barrier = 0;
  ++block.generation;
  for (Fiber& f : block.fibers) {
    if (f.state == State::kAtBlockBarrier) f.state = State::kReady;
  }
  run.progress = true;
}

void entry() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &run.scheduler_stack, &run.scheduler_stack_bytes));
  TSAN(__tsan_acquire(&run.start_sync));
  run.body(run.arg);
  TSAN(__tsan_release(&run.end_sync));
  Fiber& fiber = *current;
  fiber.state = State::kDone;
  Block& block = *fiber.block;
  --block.alive;
  block.warps[fiber.warp].alive &= ~(1u << fiber.thread.lane);
  release_barrier_if_full(block);  // the exited need not come
  run.progress = true;
  to_scheduler(true);
}

char* take_stack() {
  if (!pool.stacks.empty()) {
    char* stack = pool.stacks.back();
    pool.stacks.pop_back();
    return stack;
  }
  void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  mprotect(p, 4096, PROT_NONE);
  return static_cast<char*>(p);
}

void open_block(Block& block, Dim index, Dim grid, Dim dim, size_t shared_bytes) {
  const unsigned threads = dim.x * dim.y * dim.z;
  if (posix_memalign(&block.shared, 1024, std::max<size_t>(shared_bytes, 1)) != 0) {
    throw std::bad_alloc();
  }
  std::memset(block.shared, 0xff, shared_bytes);
  block.fibers.resize(threads);
  block.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  block.alive = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[i];
    f.thread = Thread{Dim{i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)},
                      index,
                      dim,
                      grid,
                      i % kWarpSize,
                      block.shared};
    f.block = &block;
    f.warp = i / kWarpSize;
    block.warps[f.warp].alive |= 1u << f.thread.lane;
    f.stack = take_stack();
    ASAN(__asan_unpoison_memory_region(f.stack + 4096, kStackBytes - 4096));
    f.context.init(f.stack, entry);
#if defined(SIMT_TSAN)
    if (pool.tsan.empty()) pool.tsan.push_back(__tsan_create_fiber(0));
    f.tsan = pool.tsan.back();
    pool.tsan.pop_back();
#endif
  }
}

void close_block(std::unique_ptr<Block> block) {
  // In reverse, so that thread i gets the same fibre in the next block: blocks stay unordered for
  // TSan but for each thread's own accesses.
  for (size_t i = block->fibers.size(); i-- > 0;) {
    pool.stacks.push_back(block->fibers[i].stack);
    if (block->fibers[i].tsan != nullptr) pool.tsan.push_back(block->fibers[i].tsan);
  }
#if defined(SIMT_TSAN)
  run.ended.push_back(std::move(block));
#endif
}

const char* run_blocks(std::vector<std::unique_ptr<Block>>& blocks) {
  std::vector<Fiber*> turns;
  for (auto& block : blocks) {
    for (Fiber& f : block->fibers) turns.push_back(&f);
  }
  shuffle(turns);
  int idle = 0;
  for (;;) {
    run.progress = false;
    bool any = false, ran = false;
    for (Fiber* f : turns) {
      if (f->state == State::kDone) continue;
      any = true;
      if (f->state != State::kReady && f->state != State::kPolling) continue;
      if (f->state == State::kReady) run.progress = true;
      ran = true;
      f->state = State::kReady;
      resume(*f);
      if (run.error != nullptr) return run.error;
    }
    if (!any) return nullptr;
    if (!ran) return "deadlock: threads wait at barriers that others never reach";
    idle = run.progress ? 0 : idle + 1;
    if (idle > kIdleRounds) return "livelock: threads poll memory that never changes";
  }
}

}  // namespace

void launch(Dim grid, Dim block, size_t shared_bytes, bool together, void (*body)(void*),
            void* arg) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  run = Launch{};
  run.body = body;
  run.arg = arg;
  next_random();
  TSAN(run.scheduler_tsan = __tsan_get_current_fiber());
  std::vector<Dim> indices;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) indices.push_back(Dim{x, y, z});
    }
  }
  shuffle(indices);
  const char* error = nullptr;
  for (size_t i = 0; i < indices.size() && error == nullptr;) {
    std::vector<std::unique_ptr<Block>> alive;
    for (const size_t end = together ? indices.size() : i + 1; i < end; ++i) {
      alive.push_back(std::make_unique<Block>());
      open_block(*alive.back(), indices[i], grid, block, shared_bytes);
    }
    TSAN(__tsan_release(&run.start_sync));
    error = run_blocks(alive);
    for (auto& b : alive) close_block(std::move(b));
  }
  TSAN(__tsan_acquire(&run.end_sync));
  run.ended.clear();
  if (error != nullptr) throw LaunchError{error};
}

int block_barrier(int predicate) {
  Fiber& fiber = *current;
  Block& block = *fiber.block;
  block.count += predicate != 0;
  ++block.at_barrier;
  fiber.generation = block.generation;
  fiber.state = State::kAtBlockBarrier;
  TSAN(__tsan_release(&block.sync));
  release_barrier_if_full(block);
  to_scheduler(false);
  TSAN(__tsan_acquire(&block.sync));
  return block.last_count[fiber.generation & 1];
}

namespace {

// Ends the launch: an exception could not cross over to the scheduler's stack.
[[noreturn]] void fail(const char* what) {
  run.error = what;
  for (;;) to_scheduler(false);
}

Meeting& meet(uint32_t mask, uint64_t value, bool ordered) {
  Fiber& fiber = *current;
  Warp& warp = fiber.block->warps[fiber.warp];
  const uint32_t me = 1u << fiber.thread.lane;
  if ((mask & me) == 0) fail("a lane is not in the mask of its own warp operation");
  if ((mask & ~warp.alive) != 0) fail("a warp operation waits for lanes that exited");
  Meeting& m = warp.meetings[mask];
  m.values[m.round & 1][fiber.thread.lane] = value;
  m.arrived |= me;
  fiber.meeting = &m;
  fiber.round = m.round;
  if (ordered) TSAN(__tsan_release(&m.sync));
  if (m.arrived == mask) {
    m.arrived = 0;
    ++m.round;
    std::vector<Fiber>& all = fiber.block->fibers;
    const size_t first = size_t{fiber.warp} * kWarpSize;
    for (size_t i = first; i < std::min(all.size(), first + kWarpSize); ++i) {
      if (all[i].state == State::kAtWarp && all[i].meeting == &m) all[i].state = State::kReady;
    }
    run.progress = true;
  } else {
    fiber.state = State::kAtWarp;
    to_scheduler(false);
  }
  if (ordered) TSAN(__tsan_acquire(&m.sync));
  (void)ordered;
  return m;
}

}  // namespace

void warp_barrier(uint32_t mask) { meet(mask, 0, true); }

void warp_exchange(uint32_t mask, uint64_t value, uint64_t out[kWarpSize]) {
  const Meeting& m = meet(mask, value, false);
  std::memcpy(out, m.values[current->round & 1], sizeof(m.values[0]));
}

void yield() {
  current->state = State::kPolling;
  to_scheduler(false);
}

void fence() {
  TSAN(__tsan_acquire(&run.fence_sync));
  TSAN(__tsan_release(&run.fence_sync));
}

}  // namespace simt
