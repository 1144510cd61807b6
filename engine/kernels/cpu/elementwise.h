// What the kernels that go over tokens one by one share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "divide_up.h"
#include "simd.h"
#include "thread_pool.h"

namespace {

constexpr int64_t kChunkElements = 8192;  // 1 to 4 us of work; threads that share less of it gain nothing

// Calls f(token) for each of num_tokens of `size` elements.
template <class F>
void for_tokens(ThreadPool* pool, int64_t num_tokens, int64_t size, const F& f) {
  const int64_t per_chunk = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, size));
  pool->parallel_for(divide_up(num_tokens, per_chunk), [&](int64_t chunk) {
    const int64_t stop = std::min(num_tokens, (chunk + 1) * per_chunk);
    for (int64_t token = chunk * per_chunk; token < stop; ++token) f(token);
  });
}

// Rounds to what T holds.
inline Vec rounded(const float*, Vec v) { return v; }
inline Vec rounded(const bf16*, Vec v) { return widen(narrow(v)); }

}  // namespace
