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
  is_ending_ = true;
  loop_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(loop_, false);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t num_chunks, Call call, const void* context) {
  num_chunks_ = num_chunks;
  call_ = call;
  context_ = context;
  next_chunk_.store(0, std::memory_order_relaxed);
  num_busy_.store(static_cast<uint32_t>(workers_.size()), std::memory_order_relaxed);
  loop_.fetch_add(1, std::memory_order_seq_cst);  // publishes all of the above
  if (num_asleep_.load(std::memory_order_seq_cst) > 0) futex_wake_all(loop_, false);
  claim_chunks();
  wait_for_workers();
}

void ThreadPool::work(int index) {
  if (!cpus_.empty()) stay_on(cpus_[index]);
  uint32_t seen = 0;
  for (;;) {
    seen = wait_for_loop(seen);
    if (is_ending_) return;
    claim_chunks();
    const bool is_last = num_busy_.fetch_sub(1, std::memory_order_seq_cst) == 1;
    if (is_last && is_caller_asleep_.load(std::memory_order_seq_cst)) futex_wake_all(num_busy_, false);
  }
}

void ThreadPool::claim_chunks() {
  for (;;) {
    const int64_t chunk = next_chunk_.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= num_chunks_) return;
    call_(context_, chunk);
  }
}

uint32_t ThreadPool::wait_for_loop(uint32_t seen) {
  const auto has_begun = [&] { return loop_.load(std::memory_order_acquire) != seen; };
  if (!spin_until(has_begun, spin_ns_)) {
    num_asleep_.fetch_add(1, std::memory_order_seq_cst);
    while (loop_.load(std::memory_order_seq_cst) == seen) futex_wait(loop_, seen, false);
    num_asleep_.fetch_sub(1, std::memory_order_relaxed);
  }
  return seen + 1;
}

void ThreadPool::wait_for_workers() {
  const auto are_done = [&] { return num_busy_.load(std::memory_order_acquire) == 0; };
  if (spin_until(are_done, spin_ns_)) return;
  is_caller_asleep_.store(true, std::memory_order_seq_cst);  // seen by whoever leaves after the look below
  while (const uint32_t busy = num_busy_.load(std::memory_order_seq_cst)) futex_wait(num_busy_, busy, false);
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
