// The threads of one rank. They claim chunks of a loop one by one, and a loop is over when its chunks are: a thread that is
// held up does not hold up the others, unless it has begun a chunk. They wait for the next loop by spinning for a moment,
// then in a futex.
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
  void call_chunks();
  int64_t claim_chunk();
  uint32_t wait_for_loop(uint32_t seen);
  void wait_for_chunks();

  // Each on a cache line of its own: all threads write them.
  // In the lower half how many chunks nobody has claimed, in the upper the loop's number: who comes late cannot take one
  // loop's chunk for another's.
  alignas(64) std::atomic<uint64_t> unclaimed_{0};
  alignas(64) std::atomic<uint32_t> loop_{0};            // counts loops; a futex
  alignas(64) std::atomic<uint32_t> num_unfinished_{0};  // chunks that have not returned; a futex
  alignas(64) std::atomic<int32_t> num_asleep_{0};
  alignas(64) std::atomic<bool> is_caller_asleep_{false};
  // Of the present loop; to be read only between a chunk's claim and its end, since the next loop begins after all ends.
  int64_t num_chunks_ = 0;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  std::atomic<bool> is_ending_{false};
  const int64_t spin_ns_;
  const std::vector<int> cpus_;
  std::vector<std::thread> workers_;
};
