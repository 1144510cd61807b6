// What the linear kernels share: threads that each read weights in one stream, and memory that stays with a thread.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "divide_up.h"
#include "thread_pool.h"

namespace {

constexpr int64_t kLineBytes = 64;  // of a cache
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kChunkBytes = 48 << 10;   // of weights: what a thread claims at a time
constexpr int64_t kBlockBytes = 512 << 10;  // of packed tokens: half of the second-level cache
constexpr int64_t kAheadBytes = 8 << 10;    // at least so far ahead weights are fetched

// Memory of one thread that stays with it from call to call.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  void* reserve(int64_t num_bytes) {
    if (num_bytes > size_) {
      std::free(memory_);
      size_ = 0;
      const int64_t size = divide_up(num_bytes, kPageBytes) * kPageBytes;
      memory_ = std::aligned_alloc(kPageBytes, size);
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = size;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Chunks that threads claim: each has a range of chunks beside one another, so that it reads memory in one stream, and
// who has none left helps the others.
class Ranges {
 public:
  Ranges(const ThreadPool& pool, int64_t num_chunks)
      : num_ranges_(std::min<int64_t>(pool.num_threads(), num_chunks)), ranges_(new Range[num_ranges_]) {
    for (int64_t i = 0; i < num_ranges_; ++i) {
      ranges_[i].next.store(num_chunks * i / num_ranges_, std::memory_order_relaxed);
      ranges_[i].stop = num_chunks * (i + 1) / num_ranges_;
    }
  }

  int64_t size() const { return num_ranges_; }

  // Calls f(chunk) for each chunk that this thread gets, of its own range first.
  template <class F>
  void claim(int64_t own_range, const F& f) {
    for (int64_t i = 0; i < num_ranges_; ++i) {
      Range& range = ranges_[(own_range + i) % num_ranges_];
      for (int64_t chunk; (chunk = range.next.fetch_add(1, std::memory_order_relaxed)) < range.stop;) f(chunk);
    }
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t stop;
  };

  const int64_t num_ranges_;
  const std::unique_ptr<Range[]> ranges_;
};

// What is fetched while a tile is computed: `num_lines` lines a step from `first` on, and with each the one `again`
// bytes farther if that is not 0.
//
// Into the second-level cache: of fetches into the first, Zen 4 drops those that come while 24 others are under way.
struct Fetch {
  const char* first;
  int num_lines;
  int64_t again;

  void step() {
    for (int line = 0; line < num_lines; ++line, first += kLineBytes) {
      _mm_prefetch(first, _MM_HINT_T1);
      if (again != 0) _mm_prefetch(first + again, _MM_HINT_T1);
    }
  }
};

// Reads a byte of each page, or asks for it, so that the processor has looked up where the page is.
inline void touch_pages(const char* first, const char* stop, bool is_read) {
  for (; first < stop; first += kPageBytes) {
    if (is_read) {
      asm volatile("" : : "r"(*reinterpret_cast<const volatile char*>(first)));
    } else {
      _mm_prefetch(first, _MM_HINT_T0);
    }
  }
}

}  // namespace
