// Threads for the CPU ops. Where an OpenMP runtime is already loaded (torch's), its team is used,
// so that its spinning workers and ours do not fight for the same cores; otherwise, and in a child
// of fork, where OpenMP's threads are gone, an own pool.
#pragma once

#include <cstdint>
#include <functional>

namespace inferlab::cpu {

// Threads a parallel_for uses at most. 0 restores the default: the team size that the loaded OpenMP
// runtime is set to (OMP_NUM_THREADS, torch.set_num_threads), else the cores this process may use.
void set_num_threads(int n);
int num_threads();

// "openmp" or "pool".
const char* threading_backend();

// Calls body(task) for each task in [0, tasks), spread over the threads; returns when all are done.
// Tasks are handed out one by one, so uneven ones balance. The body must not throw.
// `bytes` is the work's rough size: below about 64 KB it stays on the calling thread.
void parallel_for(int64_t tasks, int64_t bytes, const std::function<void(int64_t)>& body);

}  // namespace inferlab::cpu
