// Waiting for a word in memory to change: looking at it for a bounded time, then asleep in the kernel.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace {

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1'000'000'000) + t.tv_nsec;
}

// Sleeps while `word` is `value`, for at most `timeout_ns` (for ever if it is negative). May return early.
// is_shared: whether other processes change the word.
inline void futex_wait(const std::atomic<uint32_t>& word, uint32_t value, bool is_shared, int64_t timeout_ns = -1) {
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  syscall(SYS_futex, &word, is_shared ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, value, timeout_ns < 0 ? nullptr : &timeout,
          nullptr, 0);
}

inline void futex_wake_all(const std::atomic<uint32_t>& word, bool is_shared) {
  syscall(SYS_futex, &word, is_shared ? FUTEX_WAKE : FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Looks at `is_over` until it holds or `spin_ns` have passed; returns whether it holds.
template <class F>
inline bool spin_until(const F& is_over, int64_t spin_ns) {
  const int64_t deadline = now_ns() + spin_ns;
  do {
    for (int i = 0; i < 64; ++i) {
      if (is_over()) return true;
      _mm_pause();
    }
  } while (now_ns() < deadline);
  return is_over();
}

}  // namespace
