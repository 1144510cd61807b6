// The threads of one rank. They claim chunks of a loop one by one, so that a thread that is held up does not hold up the
// others, and wait for the next loop by spinning for a moment, then in a futex.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

class ThreadPool {
 public:
  // num_threads counts the caller of parallel_for, which works too. cpus: one for each thread, or null to leave them
  // where they are; the caller sees to its own, which what it starts later inherits. spin_ns: how long a thread without
  // work looks for some before it sleeps.
  ThreadPool(int num_threads, const int* cpus, int64_t spin_ns);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(chunk) once for each chunk in [0, num_chunks), in any order and on any thread; returns when all have returned.
  // For one thread at a time.
  template <class F>
  void parallel_for(int64_t num_chunks, const F& f) {
    if (workers_.empty() || num_chunks <= 1) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) f(chunk);
      return;
    }
    run(num_chunks, [](const void* context, int64_t chunk) { (*static_cast<const F*>(context))(chunk); }, &f);
  }

 private:
  using Call = void (*)(const void* context, int64_t chunk);

  void run(int64_t num_chunks, Call call, const void* context);
  void work(int index);
  void end();
  void claim_chunks();
  uint32_t wait_for_loop(uint32_t seen);
  void wait_for_workers();

  // Each on a cache line of its own: all threads write them.
  alignas(64) std::atomic<int64_t> next_chunk_{0};
  alignas(64) std::atomic<uint32_t> loop_{0};  // counts loops; a futex
  alignas(64) std::atomic<uint32_t> num_busy_{0};  // workers that have not left the loop; a futex
  alignas(64) std::atomic<int32_t> num_asleep_{0};
  alignas(64) std::atomic<bool> is_caller_asleep_{false};
  int64_t num_chunks_ = 0;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  bool is_ending_ = false;
  const int64_t spin_ns_;
  const std::vector<int> cpus_;
  std::vector<std::thread> workers_;
};
