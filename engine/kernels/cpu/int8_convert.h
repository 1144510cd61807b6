// Products with int8 weights that are converted to float32 on the way: lane l of an accumulator adds up the products
// k = l, l + kLanes, … in this order, whatever the tile. For processors without vpdpbusd.
#pragma once

#include <algorithm>

#include "divide_up.h"
#include "simd.h"
#include "thread_pool.h"

namespace {

constexpr int kRows = 4;  // of w in a tile
constexpr int64_t kChunkBytes = 1 << 17, kMostChunkRows = 64;  // of w, for one thread at a time
constexpr int64_t kBlockTokens = 96;  // so many tokens' activations stay in the second-level cache

struct Shape {
  int64_t num_tokens, out_features, in_features;
};

// Writes kRows consecutive outputs of a token, or the first n of them.
inline void put(float* y, __m128 values, int64_t n) {
  if (n == kRows) return _mm_storeu_ps(y, values);
  float all[kRows];
  _mm_storeu_ps(all, values);
  std::copy_n(all, n, y);
}

inline void put(bf16* y, __m128 values, int64_t n) {
#if defined(__AVX512F__)
  const __m256i rounded = narrow(_mm512_castps128_ps512(values));
#else
  const __m128i rounded = narrow(_mm256_castps128_ps256(values));
#endif
  bf16 all[2 * kLanes];
  std::memcpy(all, &rounded, sizeof(rounded));
  std::memcpy(y, all, n * sizeof(bf16));
}

// The first n of four.
inline __m128 load_four(const float* p, int64_t n) {
  if (n == kRows) return _mm_loadu_ps(p);
  float all[kRows] = {};
  std::copy_n(p, n, all);
  return _mm_loadu_ps(all);
}

inline __m128 load_four(const bf16* p, int64_t n) {
  uint64_t bits = 0;
  std::memcpy(&bits, p, n * sizeof(bf16));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi64_si128(static_cast<int64_t>(bits))));
}

// What follows the sums of kRows rows, of which n are there: scales and bias.
template <class T, class Y>
void finish(Y* out, __m128 sums, const float* scale, const T* bias, int64_t row, int64_t n) {
  __m128 values = _mm_mul_ps(sums, load_four(scale + row, n));
  if (bias != nullptr) values = _mm_add_ps(values, load_four(bias + row, n));
  put(out, values, n);
}

// Computes y in chunks of rows. f(out, rows, row, n) computes n <= kRows rows for all tokens, into out, where tokens are
// kMostChunkRows apart; the chunk's last row stands in for those of `rows` that are not there. A chunk of y is put into
// its place at once: tokens lie a power of two apart there, and would push each other out of the cache.
template <class Y, class F>
void for_each_tile_row(ThreadPool* pool, Y* y, const int8_t* w, const Shape& shape, const F& f) {
  const int64_t fitting_rows = std::min(kMostChunkRows, kChunkBytes / std::max<int64_t>(1, shape.in_features));
  const int64_t chunk_rows = std::max<int64_t>(1, fitting_rows / kRows) * kRows;
  pool->parallel_for(divide_up(shape.out_features, chunk_rows), [&](int64_t chunk) {
    const int64_t begin = chunk * chunk_rows, stop = std::min(shape.out_features, begin + chunk_rows);
    Y out[kBlockTokens * kMostChunkRows];
    for (int64_t row = begin; row < stop; row += kRows) {
      const int8_t* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = w + std::min(row + r, stop - 1) * shape.in_features;
      f(out + row - begin, rows, row, std::min<int64_t>(kRows, stop - row));
    }
    for (int64_t token = 0; token < shape.num_tokens; ++token)
      std::memcpy(y + token * shape.out_features + begin, out + token * kMostChunkRows, (stop - begin) * sizeof(Y));
  });
}

constexpr int kMostTokens = kLanes == 16 ? 4 : 2;

inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
}

inline Vec load(const int8_t* p, int64_t n) {
  if (n >= kLanes) return load(p);
  int8_t some[kLanes] = {};
  std::copy_n(p, n, some);
  return load(some);
}

// kRows rows by kTokens tokens.
template <int kTokens, class T, class Y>
void tile(Y* out, const int8_t* const* rows, const T* x, const float* scale, const T* bias, const Shape& shape,
          int64_t row, int64_t n) {
  Vec sums[kRows][kTokens];
  for (auto& of_row : sums)
    for (Vec& sum : of_row) sum = zero();
  const auto step = [&](int64_t k, auto... count) {
    Vec values[kTokens];
    for (int t = 0; t < kTokens; ++t) values[t] = load(x + t * shape.in_features + k, count...);
    for (int r = 0; r < kRows; ++r) {
      const Vec weights = load(rows[r] + k, count...);
      for (int t = 0; t < kTokens; ++t) sums[r][t] = fma(weights, values[t], sums[r][t]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= shape.in_features; k += kLanes) step(k);
  if (k < shape.in_features) step(k, shape.in_features - k);
  for (int t = 0; t < kTokens; ++t) {
    float values[kRows];
    for (int r = 0; r < kRows; ++r) values[r] = sum_of_lanes(sums[r][t]);
    finish(out + t * kMostChunkRows, _mm_loadu_ps(values), scale, bias, row, n);
  }
}

template <class T, class Y>
void linear_block(ThreadPool* pool, Y* y, const T* x, const int8_t* w, const float* scale, const T* bias,
                  const Shape& shape) {
  for_each_tile_row(pool, y, w, shape, [&](Y* out, const int8_t* const* rows, int64_t row, int64_t n) {
    int64_t token = 0;
    for (; token + kMostTokens <= shape.num_tokens; token += kMostTokens)
      tile<kMostTokens>(out + token * kMostChunkRows, rows, x + token * shape.in_features, scale, bias, shape, row,
                        n);
    for (; token < shape.num_tokens; ++token)
      tile<1>(out + token * kMostChunkRows, rows, x + token * shape.in_features, scale, bias, shape, row, n);
  });
}

template <class T, class Y>
void linear_int8(ThreadPool* pool, Y* y, const T* x, const int8_t* w, const float* scale, const T* bias,
                 int64_t num_tokens, int64_t out_features, int64_t in_features) {
  for (int64_t token = 0; token < num_tokens; token += kBlockTokens) {
    const Shape shape{std::min(kBlockTokens, num_tokens - token), out_features, in_features};
    linear_block(pool, y + token * out_features, x + token * in_features, w, scale, bias, shape);
  }
}

}  // namespace
