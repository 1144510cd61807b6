// Products with int8 weights by vpdpbusd, of activations that are rounded to integers too, by a scale for each token: to
// 16 bits, which is as precise as bfloat16 and better, as two terms of 8 bits (x = s (256 x1 + x2)), or to 8 bits, one
// term, at half the instructions. A term of a token is a column.
//
// Sums of integers are exact: an output's bits depend on its row of w, its token and the number of terms alone.
// vpdpbusd multiplies unsigned by signed bytes: x + 128 stands for x, and 128 times the sum of the row of w is taken off
// again, which a column of ones, the first, brings. All is modulo 2^32: what counts is that the sum of x w fits, as
// |sum| <= 128 * 127 * in_features does up to 2^17.
//
// Weights are read once for a block of tokens, in the order of memory, as linear.cpp reads them.
#pragma once

#include <algorithm>
#include <utility>

#include "int8.h"
#include "simd.h"
#include "thread_pool.h"
#include "weight_stream.h"

#define INLINE __attribute__((always_inline)) inline
#define INLINE_LAMBDA __attribute__((always_inline))
#define NOT_INLINE __attribute__((noinline))  // where a tile is inlined, GCC keeps the sums in memory

namespace {

constexpr int64_t kStep = 64;  // features in a register
constexpr int kRows = 8, kColumns = 3;  // of the largest tile: 24 of 32 registers are accumulators
constexpr int kFewColumns = 5;  // so few are computed one row at a time: there is next to nothing to compute
constexpr int64_t kManyPasses = 6;  // over the same rows: reading them from memory is not what takes time any more
constexpr int64_t kRoundFeatures = 4096;  // at least so many a thread rounds at a time

template <int... kIndices, class F>
INLINE void repeat(std::integer_sequence<int, kIndices...>, const F& f) {
  (f(std::integral_constant<int, kIndices>()), ...);
}
// Calls f(0) ... f(kCount - 1), written out: only then does the compiler keep arrays in registers.
template <int kCount, class F>
INLINE void repeat(const F& f) {
  repeat(std::make_integer_sequence<int, kCount>(), f);
}

// sum += x w, of four unsigned and four signed bytes a lane. Written so because GCC copies sums about that it could
// keep in place, and runs out of registers.
INLINE void add_products(__m512i& sum, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
}

INLINE __m512i load_weights(const int8_t* w) { return _mm512_loadu_si512(w); }
INLINE __m512i load_weights(const int8_t* w, int64_t n) {
  return _mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, w);
}

// Adds neighbours of a, and of b, and puts the sums beside one another.
INLINE __m512i add_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
INLINE __m512i add_pairs_of_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// sums[r] = the sum of the lanes of v[r], of kRows.
INLINE void add_lanes(int32_t* sums, const __m512i* v) {
  const __m512i low = add_pairs_of_pairs(add_pairs(v[0], v[1]), add_pairs(v[2], v[3]));
  const __m512i high = add_pairs_of_pairs(add_pairs(v[4], v[5]), add_pairs(v[6], v[7]));
  const __m512i halves = _mm512_add_epi32(_mm512_shuffle_i64x2(low, high, 0x44), _mm512_shuffle_i64x2(low, high, 0xEE));
  const __m512i all = _mm512_add_epi32(halves, _mm512_shuffle_i64x2(halves, halves, 0xB1));  // low, low, high, high
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), _mm512_castsi512_si128(all));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + 4), _mm512_extracti32x4_epi32(all, 2));
}

// sums[c * kRows + r] = the product of column c and row r of w, of kRows rows.
//
// x: the columns' parts of a step beside one another.
template <int C>
NOT_INLINE void tile(int32_t* sums, const int8_t* w, int64_t in_features, const uint8_t* x, Fetch fetch) {
  __m512i sum[C][kRows];
  repeat<C>([&](auto c) INLINE_LAMBDA {
    repeat<kRows>([&](auto r) INLINE_LAMBDA { sum[c][r] = _mm512_setzero_si512(); });
  });
  const auto step = [&](int64_t k, auto... count) INLINE_LAMBDA {
    __m512i values[C];
    repeat<C>([&](auto c) INLINE_LAMBDA { values[c] = _mm512_load_si512(x + c * kStep); });
    repeat<kRows>([&](auto r) INLINE_LAMBDA {
      const __m512i weights = load_weights(w + r * in_features + k, count...);
      repeat<C>([&](auto c) INLINE_LAMBDA { add_products(sum[c][r], values[c], weights); });
    });
    x += C * kStep;
  };
  int64_t k = 0;
  for (; k + kStep <= in_features; k += kStep) {
    fetch.step();
    step(k);
  }
  if (k < in_features) step(k, in_features - k);
  repeat<C>([&](auto c) INLINE_LAMBDA { add_lanes(sums + c * kRows, sum[c]); });
}

// The same of num_rows rows, one after the other.
template <int C>
NOT_INLINE void tile_by_rows(int32_t* sums, const int8_t* w, int64_t num_rows, int64_t in_features, const uint8_t* x) {
  __m512i all[C][kRows] = {};
  for (int64_t row = 0; row < num_rows; ++row, w += in_features) {
    __m512i sum[C] = {};
    const auto* const ahead = reinterpret_cast<const char*>(w) + kAheadBytes + in_features;
    touch_pages(ahead, ahead + in_features, false);
    const uint8_t* values = x;
    const auto step = [&](__m512i weights) INLINE_LAMBDA {
      repeat<C>([&](auto c) INLINE_LAMBDA { add_products(sum[c], _mm512_load_si512(values + c * kStep), weights); });
      values += C * kStep;
    };
    int64_t k = 0;
    for (; k + kStep <= in_features; k += kStep) {
      _mm_prefetch(w + k + kAheadBytes, _MM_HINT_T1);
      step(load_weights(w + k));
    }
    if (k < in_features) step(load_weights(w + k, in_features - k));
    repeat<C>([&](auto c) INLINE_LAMBDA { all[c][row] = sum[c]; });
  }
  repeat<C>([&](auto c) INLINE_LAMBDA { add_lanes(sums + c * kRows, all[c]); });
}

thread_local Scratch columns_scratch;  // of who calls
thread_local Scratch sums_scratch;     // of each who computes

template <int kTerms, class T, class Y>
class Int8Linear {
 public:
  Int8Linear(Y* y, const T* x, const int8_t* w, const float* scale, const T* bias, int64_t num_tokens,
             int64_t out_features, int64_t in_features)
      : y_(y), x_(x), w_(w), scale_(scale), bias_(bias), num_tokens_(num_tokens), out_features_(out_features),
        in_features_(in_features), num_steps_(divide_up(in_features, kStep)), num_columns_(num_tokens * kTerms + 1),
        most_columns_(num_columns_ <= kFewColumns ? num_columns_ : kColumns) {
    const int64_t scales_bytes = divide_up(num_tokens * sizeof(float), kStep) * kStep;
    auto* const memory = static_cast<char*>(columns_scratch.reserve(scales_bytes + num_columns_ * num_steps_ * kStep));
    token_scales_ = reinterpret_cast<float*>(memory);
    columns_ = reinterpret_cast<uint8_t*>(memory + scales_bytes);
  }

  void run(ThreadPool* pool) {
    put_ones();
    const int64_t most_tokens = std::max<int64_t>(1, kRoundFeatures / std::max<int64_t>(1, in_features_));
    pool->parallel_for(divide_up(num_tokens_, most_tokens), [&](int64_t chunk) {
      const int64_t stop = std::min(num_tokens_, (chunk + 1) * most_tokens);
      for (int64_t token = chunk * most_tokens; token < stop; ++token) round_token(token);
    });
    chunk_rows_ = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, in_features_) / kRows) * kRows;
    Ranges ranges(*pool, divide_up(out_features_, chunk_rows_));
    pool->parallel_for(ranges.size(), [&](int64_t range) { work(ranges, range); });
  }

 private:
  // Where a column begins, of those that lie beside one another, and how far apart its steps are.
  struct Place {
    uint8_t* at;
    int64_t stride;
  };

  Place place(int64_t column) const {
    const int64_t first = column / most_columns_ * most_columns_;
    const int64_t stride = std::min(most_columns_, num_columns_ - first) * kStep;
    return {columns_ + first * num_steps_ * kStep + (column - first) * kStep, stride};
  }

  void put_ones() {
    Place ones = place(0);
    for (int64_t step = 0; step < num_steps_; ++step, ones.at += ones.stride)
      _mm512_store_si512(ones.at, _mm512_set1_epi8(1));
  }

  void round_token(int64_t token) {
    const T* const x = x_ + token * in_features_;
    const float most = largest(x, in_features_);
    constexpr float kMost = kTerms == 2 ? 127 * 256 + 127 : 127;
    const bool is_zero = most < 1e-30f;
    token_scales_[token] = is_zero ? 0.0f : most / kMost;
    const Vec inverse = broadcast(is_zero ? 0.0f : kMost / most);
    const __m512i middle = _mm512_set1_epi32(128);
    Place first = place(1 + token * kTerms), last = place(token * kTerms + kTerms);
    const auto step = [&](const auto& load_lanes) INLINE_LAMBDA {
      for (int64_t i = 0; i < kStep; i += kLanes) {
        const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(mul(load_lanes(i), inverse)), middle);
        if (kTerms == 2) put_bytes(first.at + i, _mm512_add_epi32(_mm512_srai_epi32(q, 8), middle));
        put_bytes(last.at + i, q);
      }
      first.at += first.stride;
      last.at += last.stride;
    };
    int64_t k = 0;
    for (; k + kStep <= in_features_; k += kStep) step([&](int64_t i) INLINE_LAMBDA { return load(x + k + i); });
    if (k < in_features_)
      step([&](int64_t i) { return load(x + k + i, std::max<int64_t>(0, in_features_ - k - i)); });
  }

  // The lowest of each lane.
  static void put_bytes(uint8_t* at, __m512i values) {
    _mm_store_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(values));
  }

  void work(Ranges& ranges, int64_t own_range) const {
    auto* const sums = static_cast<int32_t*>(sums_scratch.reserve(num_columns_ * kRows * sizeof(int32_t)));
    ranges.claim(own_range, [&](int64_t chunk) {
      const int64_t stop = std::min(out_features_, (chunk + 1) * chunk_rows_);
      for (int64_t row = chunk * chunk_rows_; row < stop; row += kRows) {
        const int64_t num_rows = std::min<int64_t>(kRows, stop - row);
        if (num_columns_ <= kFewColumns || num_rows < kRows) {
          multiply_by_rows(sums, row, num_rows);
        } else {
          multiply(sums, row);
        }
        finish(sums, row, num_rows);
      }
    });
  }

  void multiply_by_rows(int32_t* sums, int64_t row, int64_t num_rows) const {
    const int8_t* const w = w_ + row * in_features_;
    for (int64_t column = 0; column < num_columns_; column += most_columns_) {
      const uint8_t* const x = columns_ + column * num_steps_ * kStep;
      int32_t* const out = sums + column * kRows;
      switch (std::min(most_columns_, num_columns_ - column)) {
        case 1: tile_by_rows<1>(out, w, num_rows, in_features_, x); break;
        case 2: tile_by_rows<2>(out, w, num_rows, in_features_, x); break;
        case 3: tile_by_rows<3>(out, w, num_rows, in_features_, x); break;
        case 4: tile_by_rows<4>(out, w, num_rows, in_features_, x); break;
        default: tile_by_rows<kFewColumns>(out, w, num_rows, in_features_, x);
      }
    }
  }

  // Passes over kRows rows once for each few columns, and meanwhile fetches what follows, as linear.cpp does.
  void multiply(int32_t* sums, int64_t row) const {
    const int8_t* const w = w_ + row * in_features_;
    const auto* const end = reinterpret_cast<const char*>(w_ + out_features_ * in_features_);
    const int64_t num_passes = divide_up(num_columns_, kColumns);
    const bool has_many = num_passes >= kManyPasses;
    const int64_t num_bytes = std::max<int64_t>(1, kRows * in_features_);
    const char* fetch = reinterpret_cast<const char*>(w) + divide_up(kAheadBytes, num_bytes) * num_bytes;
    int64_t lines_left = kRows;
    for (int64_t pass = 0; pass < num_passes; ++pass) {
      const int64_t lines = std::min(lines_left, divide_up(kRows, num_passes));
      const int64_t bytes = lines * num_steps_ * kLineBytes;
      touch_pages(fetch + num_bytes, std::min(fetch + num_bytes + bytes, end), has_many);
      const Fetch fetched{fetch, static_cast<int>(lines), has_many ? num_bytes : 0};
      const int64_t column = pass * kColumns;
      const uint8_t* const x = columns_ + column * num_steps_ * kStep;
      int32_t* const out = sums + column * kRows;
      switch (std::min<int64_t>(kColumns, num_columns_ - column)) {
        case 1: tile<1>(out, w, in_features_, x, fetched); break;
        case 2: tile<2>(out, w, in_features_, x, fetched); break;
        default: tile<kColumns>(out, w, in_features_, x, fetched);
      }
      lines_left -= lines;
      fetch += bytes;
    }
  }

  // Scales and bias, and into y.
  void finish(const int32_t* sums, int64_t row, int64_t num_rows) const {
    const __m256i offset = _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums)), 7);
    const __m256 scale = _mm512_castps512_ps256(load(scale_ + row, num_rows));
    const __m256 bias = _mm512_castps512_ps256(bias_ == nullptr ? zero() : load(bias_ + row, num_rows));
    Y* y = y_ + row;
    const int32_t* of_column = sums + kRows;
    for (int64_t token = 0; token < num_tokens_; ++token, y += out_features_) {
      __m256 total = _mm256_setzero_ps();
      for (int i = 0; i < kTerms; ++i, of_column += kRows) {
        const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(of_column));
        const __m256 term = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, offset));
        total = i == 0 ? term : _mm256_add_ps(_mm256_mul_ps(total, _mm256_set1_ps(256.0f)), term);
      }
      __m256 values = _mm256_mul_ps(_mm256_mul_ps(total, scale), _mm256_set1_ps(token_scales_[token]));
      if (bias_ != nullptr) values = _mm256_add_ps(values, bias);
      store(y, _mm512_castps256_ps512(values), num_rows);
    }
  }

  Y* const y_;
  const T* const x_;
  const int8_t* const w_;
  const float* const scale_;
  const T* const bias_;
  const int64_t num_tokens_, out_features_, in_features_, num_steps_, num_columns_, most_columns_;
  int64_t chunk_rows_ = 0;
  float* token_scales_;  // [num_tokens]
  uint8_t* columns_;     // groups of most_columns_ columns; of a group, for each step, for each column, kStep features
};

template <int kTerms, class T, class Y>
void linear_int8(ThreadPool* pool, Y* y, const T* x, const int8_t* w, const float* scale, const T* bias,
                 int64_t num_tokens, int64_t out_features, int64_t in_features) {
  const int64_t token_bytes = std::max<int64_t>(1, divide_up(in_features, kStep) * kStep * kTerms);
  const int64_t num_blocks = divide_up(num_tokens, std::max<int64_t>(1, kBlockBytes / token_bytes));
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = num_tokens * block / num_blocks, stop = num_tokens * (block + 1) / num_blocks;
    Int8Linear<kTerms, T, Y>(y + begin * out_features, x + begin * in_features, w, scale, bias, stop - begin,
                             out_features, in_features)
        .run(pool);
  }
}

}  // namespace
