#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace inferlab::cpu {
namespace {

constexpr int64_t kSerialBytes = 64 * 1024;

int default_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? static_cast<int>(n) : 1;
}

std::atomic<int> g_threads{0};

// In a child of fork the number of threads its parent used, else 0. OpenMP's and the pool's threads
// are gone there, and OpenMP waits for its own for ever; so the child gets a new pool.
std::atomic<int> g_inherited_threads{0};

struct Job {
  const std::function<void(int64_t)>* body;
  int64_t tasks;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < tasks;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      (*body)(i);
    }
  }
};

// void GOMP_parallel(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags)
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
#if defined(__linux__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

// Looked up until found: torch may be imported after us.
GompParallel openmp() {
  if (g_inherited_threads.load(std::memory_order_relaxed) > 0) return nullptr;
  static std::atomic<GompParallel> found{nullptr};
  GompParallel fn = found.load(std::memory_order_relaxed);
  if (fn == nullptr) {
    fn = find_openmp();
    found.store(fn, std::memory_order_relaxed);
  }
  return fn;
}

// int omp_get_max_threads(void): what OMP_NUM_THREADS and torch.set_num_threads ask for. A team of
// another size than torch's would have OpenMP end and start threads at every call of either.
int openmp_threads() {
  using MaxThreads = int (*)();
  static std::atomic<MaxThreads> found{nullptr};
  MaxThreads fn = found.load(std::memory_order_relaxed);
#if defined(__linux__)
  if (fn == nullptr && openmp() != nullptr) {
    fn = reinterpret_cast<MaxThreads>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    found.store(fn, std::memory_order_relaxed);
  }
#endif
  return fn != nullptr ? fn() : 0;
}

// Workers of an own pool: they sleep between jobs.
class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& t : workers_) t.join();
  }

  void run(const std::shared_ptr<Job>& job, int threads) {
    std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        workers_.emplace_back([this] { work(); });
      }
      job_ = job;
      wanted_ = threads - 1;
      running_ = 0;
      ++generation_;
    }
    wake_.notify_all();
    job->run();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    job_.reset();
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stop_ || (generation_ != seen && wanted_ > 0); });
      if (stop_) return;
      seen = generation_;
      --wanted_;
      ++running_;
      std::shared_ptr<Job> job = job_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--running_ == 0) done_.notify_all();
    }
  }

  std::mutex run_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::shared_ptr<Job> job_;
  int wanted_ = 0;
  int running_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
};

// Never destroyed: at exit, and in a child of fork, the workers' threads may be gone already.
std::atomic<Pool*> g_pool{new Pool};

#if defined(__unix__) || defined(__APPLE__)
int g_threads_at_fork = 0;

const int g_fork_handlers = pthread_atfork([] { g_threads_at_fork = num_threads(); }, nullptr,
                                           [] {
                                             g_inherited_threads.store(g_threads_at_fork);
                                             g_pool.store(new Pool);
                                           });
#endif

}  // namespace

void set_num_threads(int n) { g_threads.store(n < 0 ? 0 : n); }

int num_threads() {
  const int n = g_threads.load(std::memory_order_relaxed);
  if (n > 0) return n;
  const int inherited = g_inherited_threads.load(std::memory_order_relaxed);
  if (inherited > 0) return inherited;
  const int team = openmp_threads();
  if (team > 0) return team;
  static const int fallback = default_threads();
  return fallback;
}

const char* threading_backend() { return openmp() != nullptr ? "openmp" : "pool"; }

void parallel_for(int64_t tasks, int64_t bytes, const std::function<void(int64_t)>& body) {
  const int64_t threads = tasks < num_threads() ? tasks : num_threads();
  if (threads <= 1 || bytes < kSerialBytes) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  if (const GompParallel parallel = openmp()) {
    Job job;
    job.body = &body;
    job.tasks = tasks;
    parallel([](void* data) { static_cast<Job*>(data)->run(); }, &job,
             static_cast<unsigned>(threads), 0u);
    return;
  }
  auto job = std::make_shared<Job>();
  job->body = &body;
  job->tasks = tasks;
  g_pool.load()->run(job, static_cast<int>(threads));
}

}  // namespace inferlab::cpu
