#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <exception>

#include "export.h"
#include "futex.h"

namespace {

void stay_on(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, const int* cpus, int64_t spin_ns)
    : spin_ns_(spin_ns), cpus_(cpus == nullptr ? std::vector<int>() : std::vector<int>(cpus, cpus + num_threads)) {
  try {
    for (int index = 1; index < num_threads; ++index) workers_.emplace_back([this, index] { work(index); });
  } catch (...) {
    end();  // those that were started
    throw;
  }
}

ThreadPool::~ThreadPool() { end(); }

void ThreadPool::end() {
  is_ending_.store(true, std::memory_order_relaxed);
  loop_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(loop_, false);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t num_chunks, Call call, const void* context) {
  num_chunks_ = num_chunks;
  call_ = call;
  context_ = context;
  num_unfinished_.store(static_cast<uint32_t>(num_chunks), std::memory_order_relaxed);
  const uint64_t loop = loop_.load(std::memory_order_relaxed) + 1;
  unclaimed_.store(loop << 32 | static_cast<uint64_t>(num_chunks), std::memory_order_release);  // publishes the above
  loop_.fetch_add(1, std::memory_order_seq_cst);
  if (num_asleep_.load(std::memory_order_seq_cst) > 0) futex_wake_all(loop_, false);
  call_chunks();
  wait_for_chunks();
}

void ThreadPool::work(int index) {
  if (!cpus_.empty()) stay_on(cpus_[index]);
  for (uint32_t seen = 0;;) {
    seen = wait_for_loop(seen);
    if (is_ending_.load(std::memory_order_relaxed)) return;
    call_chunks();
  }
}

void ThreadPool::call_chunks() {
  uint32_t num_finished = 0;
  for (int64_t chunk; (chunk = claim_chunk()) >= 0; ++num_finished) call_(context_, chunk);
  if (num_finished == 0) return;
  const bool is_last = num_unfinished_.fetch_sub(num_finished, std::memory_order_seq_cst) == num_finished;
  if (is_last && is_caller_asleep_.load(std::memory_order_seq_cst)) futex_wake_all(num_unfinished_, false);
}

// Returns a chunk that is this thread's from now on, or -1 where none is left.
int64_t ThreadPool::claim_chunk() {
  uint64_t unclaimed = unclaimed_.load(std::memory_order_relaxed);
  while (static_cast<uint32_t>(unclaimed) != 0) {
    if (unclaimed_.compare_exchange_weak(unclaimed, unclaimed - 1, std::memory_order_acquire)) {
      return num_chunks_ - static_cast<uint32_t>(unclaimed);
    }
  }
  return -1;
}

// Returns the number of the loop that has begun since `seen`.
uint32_t ThreadPool::wait_for_loop(uint32_t seen) {
  const auto has_begun = [&] { return loop_.load(std::memory_order_acquire) != seen; };
  if (!spin_until(has_begun, spin_ns_)) {
    num_asleep_.fetch_add(1, std::memory_order_seq_cst);
    while (loop_.load(std::memory_order_seq_cst) == seen) futex_wait(loop_, seen, false);
    num_asleep_.fetch_sub(1, std::memory_order_relaxed);
  }
  return loop_.load(std::memory_order_acquire);
}

void ThreadPool::wait_for_chunks() {
  const auto are_done = [&] { return num_unfinished_.load(std::memory_order_acquire) == 0; };
  if (spin_until(are_done, spin_ns_)) return;
  is_caller_asleep_.store(true, std::memory_order_seq_cst);  // seen by whoever finishes after the look below
  while (const uint32_t left = num_unfinished_.load(std::memory_order_seq_cst)) futex_wait(num_unfinished_, left, false);
  is_caller_asleep_.store(false, std::memory_order_relaxed);
}

// Returns a pool, or null where the threads cannot be had.
EXPORT void* ryz_pool_create(int num_threads, const int* cpus, int64_t spin_ns) {
  try {
    return new ThreadPool(num_threads, cpus, spin_ns);
  } catch (const std::exception&) {
    return nullptr;
  }
}

EXPORT void ryz_pool_destroy(void* pool) { delete static_cast<ThreadPool*>(pool); }
