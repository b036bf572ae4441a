// Threads that go through the same stages together, without a region of OpenMP for each.
//
// A stage is some tasks. Whoever comes takes the next one; a thread goes on when all are done. So a
// thread that comes late finds stages done, and holds up nobody but by the task it has begun.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "parallel.h"

namespace inferlab::cpu {

// What the threads share.
class Stages {
 public:
  // One thread's way through them: all make the same calls in the same order.
  class Walk {
   public:
    explicit Walk(Stages& stages) : stages_(stages) {}

    // Runs body(task) for each task in [0, tasks), shared with the others.
    template <typename F>
    void stage(int64_t tasks, const F& body) {
      if (stages_.threads_ == 1) {
        for (int64_t i = 0; i < tasks; ++i) body(i);
        return;
      }
      Counters& counters = stages_.counters_[next_++];
      for (int64_t i = counters.taken.fetch_add(1, std::memory_order_relaxed); i < tasks;
           i = counters.taken.fetch_add(1, std::memory_order_relaxed)) {
        body(i);
        counters.done.fetch_add(1, std::memory_order_release);
      }
      wait(counters.done, tasks);
    }

   private:
    static void wait(const std::atomic<int64_t>& done, int64_t tasks) {
      // A task takes some microseconds; where it takes longer, its thread may have lost its core.
      constexpr int kSpins = 4096;
      for (int i = 0; done.load(std::memory_order_acquire) < tasks; ++i) {
        if (i >= kSpins) {
          std::this_thread::yield();
          continue;
        }
#if defined(__x86_64__) || defined(_M_X64)
        _mm_pause();
#endif
      }
    }

    Stages& stages_;
    size_t next_ = 0;
  };

  // Calls body(Walk) on up to `threads` threads; no more than `most` stages.
  template <typename F>
  static void run(int threads, size_t most, const F& body) {
    thread_local std::vector<Counters> memory;
    if (threads > 1 && memory.size() < most) memory = std::vector<Counters>(most);
    Stages stages(threads, memory.data());
    if (threads == 1) return body(Walk(stages));
    for (size_t i = 0; i < most; ++i) memory[i].reset();
    parallel_for(threads, INT64_MAX, [&](int64_t) { body(Walk(stages)); });
  }

 private:
  struct Counters {
    alignas(64) std::atomic<int64_t> taken{0};
    std::atomic<int64_t> done{0};

    void reset() {
      taken.store(0, std::memory_order_relaxed);
      done.store(0, std::memory_order_relaxed);
    }
  };

  Stages(int threads, Counters* counters) : threads_(threads), counters_(counters) {}

  int threads_;
  Counters* counters_;
};

}  // namespace inferlab::cpu
