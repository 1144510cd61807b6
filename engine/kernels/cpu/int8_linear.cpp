// y = x w^T + b on int8 weights with a float32 scale for each row: w = scale q, q row-major [out_features, in_features].
//
// With VNNI, activations are rounded to integers too, by a scale for each token: to 16 bits, which is as precise as
// bfloat16 and better, as two terms of 8 bits (x = s (256 x1 + x2)), or to 8 bits, one term, at half the instructions.
// Sums of integers are exact: an output's bits depend on its row of w, its token and the number of terms alone.
// vpdpbusd multiplies unsigned by signed bytes: w + 128 stands for w, and 128 times the sum of x is taken off again.
// All is modulo 2^32: what counts is that the sum of x w fits, as |sum| <= 128 * 127 * in_features does up to 2^17.
//
// Elsewhere weights are converted to float32, and lane l of an accumulator adds up the products k = l, l + kLanes, … in
// this order, whatever the tile.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <utility>

#include "export.h"
#include "int8.h"
#include "simd.h"
#include "thread_pool.h"

#define INLINE __attribute__((always_inline)) inline
#define INLINE_LAMBDA __attribute__((always_inline))

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
INLINE void finish(Y* out, __m128 sums, float token_scale, const float* scale, const T* bias, int64_t row,
                   int64_t n) {
  __m128 values = _mm_mul_ps(_mm_mul_ps(sums, load_four(scale + row, n)), _mm_set1_ps(token_scale));
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
  pool->parallel_for((shape.out_features + chunk_rows - 1) / chunk_rows, [&](int64_t chunk) {
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

#if defined(__AVX512VNNI__)

constexpr int64_t kStep = 64;  // features in a register
constexpr int kAccumulators = 24;
constexpr int kFewSums = 2;  // of each row: so few multiplications that a single stream of weights is faster than kRows
constexpr int64_t kBytesAhead = 4096, kTilesAhead = 2;  // that weights are fetched before their use; measured
constexpr char kSign = static_cast<char>(0x80);

// The tokens of a block in the order in which tiles read them: groups of at most kAccumulators / kRows / terms tokens,
// and of each group, for each step, for each token, for each term, 64 features.
template <int kTerms>
class Activations {
 public:
  static constexpr int kMostTokens = kAccumulators / kRows / kTerms;

  Activations(int64_t num_tokens, int64_t in_features)
      : padded_((in_features + kStep - 1) / kStep * kStep),
        in_features_(in_features),
        num_groups_((num_tokens + kMostTokens - 1) / kMostTokens),
        first_tokens_(new int64_t[num_groups_ + 1]),
        values_(static_cast<int8_t*>(std::aligned_alloc(64, num_tokens * padded_ * kTerms))),
        scales_(new float[num_tokens]),
        offsets_(new int32_t[num_tokens * kTerms]) {
    // Groups are as equal as can be.
    for (int64_t group = 0; group <= num_groups_; ++group) first_tokens_[group] = group * num_tokens / num_groups_;
  }

  int64_t num_groups() const { return num_groups_; }
  int64_t first_token(int64_t group) const { return first_tokens_[group]; }
  const int8_t* group(int64_t group) const { return values_.get() + first_token(group) * padded_ * kTerms; }
  float scale(int64_t token) const { return scales_[token]; }
  const int32_t* offsets(int64_t token) const { return offsets_.get() + token * kTerms; }  // one a term

  template <class T>
  void round_group(int64_t group, const T* x) {
    const int64_t begin = first_token(group), count = first_token(group + 1) - begin;
    for (int64_t i = 0; i < count; ++i) {
      int8_t* place = values_.get() + begin * padded_ * kTerms + i * kTerms * kStep;
      round_token(begin + i, x + (begin + i) * in_features_, place, count * kTerms * kStep);
    }
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  template <class T>
  void round_token(int64_t token, const T* x, int8_t* place, int64_t stride) {
    const float most = largest(x, in_features_);
    constexpr float kMost = kTerms == 2 ? 127 * 256 + 127 : 127;
    const bool is_zero = most < 1e-30f;
    scales_[token] = is_zero ? 0.0f : most / kMost;
    const Vec inverse = broadcast(is_zero ? 0.0f : kMost / most);
    __m512i sums[kTerms] = {};
    for (int64_t k = 0; k < padded_; k += kLanes) {
      const int64_t n = std::max<int64_t>(0, std::min<int64_t>(kLanes, in_features_ - k));
      const Vec values = n == kLanes ? load(x + k) : n == 0 ? zero() : load(x + k, n);
      const __m512i q = _mm512_cvtps_epi32(mul(values, inverse));
      int8_t* at = place + k / kStep * stride + k % kStep;
      __m512i rest = q;
      if (kTerms == 2) {
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        put_bytes(at, high, sums[0]);
        rest = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8));
      }
      put_bytes(at + (kTerms - 1) * kStep, rest, sums[kTerms - 1]);
    }
    for (int i = 0; i < kTerms; ++i) offsets_[token * kTerms + i] = 128 * _mm512_reduce_add_epi32(sums[i]);
  }

  static void put_bytes(int8_t* at, __m512i values, __m512i& sum) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(values));
    sum = _mm512_add_epi32(sum, values);
  }

  const int64_t padded_, in_features_, num_groups_;
  const std::unique_ptr<int64_t[]> first_tokens_;
  const std::unique_ptr<int8_t, Free> values_;
  const std::unique_ptr<float[]> scales_;
  const std::unique_ptr<int32_t[]> offsets_;
};

// Returns the sums of the lanes of four registers, in order.
inline __m128i sums_of_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
}

// sum += a b, of four unsigned and four signed bytes a lane. Written so because GCC copies sums about that it could keep
// in place, and runs out of registers.
INLINE void add_products(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// Calls f(0) ... f(kCount - 1), written out: only then does the compiler keep arrays in registers.
template <int... kIndices, class F>
INLINE void repeat(std::integer_sequence<int, kIndices...>, const F& f) {
  (f(std::integral_constant<int, kIndices>()), ...);
}
template <int kCount, class F>
INLINE void repeat(const F& f) {
  repeat(std::make_integer_sequence<int, kCount>(), f);
}

// Adds up a step of kRows rows by kTokens tokens.
template <int kTokens, int kTerms, class Load>
INLINE void add_step(__m512i (&sums)[kTokens * kTerms][kRows], const int8_t* values, const Load& load_row) {
  const __m512i sign = _mm512_set1_epi8(kSign);
  __m512i weights[kRows];
  repeat<kRows>([&](auto r) INLINE_LAMBDA { weights[r] = _mm512_xor_si512(load_row(r), sign); });  // q + 128
  repeat<kTokens * kTerms>([&](auto t) INLINE_LAMBDA {
    const __m512i value = _mm512_load_si512(values + t * kStep);
    repeat<kRows>([&](auto r) INLINE_LAMBDA { add_products(sums[t][r], weights[r], value); });
  });
}

// kRows rows by kTokens tokens. Where it is inlined, GCC keeps the sums in memory.
template <int kTokens, int kTerms, class T, class Y>
__attribute__((noinline)) void tile(Y* out, const int8_t* const* rows, const Activations<kTerms>& x, int64_t group, const float* scale,
          const T* bias, const Shape& shape, int64_t row, int64_t n) {
  __m512i sums[kTokens * kTerms][kRows];
  repeat<kTokens * kTerms>([&](auto t) INLINE_LAMBDA {
    repeat<kRows>([&](auto r) INLINE_LAMBDA { sums[t][r] = _mm512_setzero_si512(); });
  });
  const int8_t* values = x.group(group);
  const int8_t* w[kRows];
  repeat<kRows>([&](auto r) INLINE_LAMBDA { w[r] = rows[r]; });
  const int64_t whole = shape.in_features / kStep * kStep;
  const __m512i sign = _mm512_set1_epi8(kSign);
  if constexpr (kTokens * kTerms <= kFewSums) {  // memory is what takes time: read it in one stream
    repeat<kRows>([&](auto r) INLINE_LAMBDA {
      const int8_t* of_row = values;
      for (int64_t k = 0; k < whole; k += kStep, of_row += kTokens * kTerms * kStep) {
        _mm_prefetch(w[r] + k + kBytesAhead, _MM_HINT_T0);
        const __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(w[r] + k), sign);
        repeat<kTokens * kTerms>([&](auto t) INLINE_LAMBDA {
          add_products(sums[t][r], weights, _mm512_load_si512(of_row + t * kStep));
        });
      }
    });
    values += kTokens * kTerms * whole;
  } else {
    const int8_t* ahead = w[0] + kTilesAhead * kRows * shape.in_features;
    if (group == 0) {
      for (int64_t k = 0; k < whole; k += kStep, values += kTokens * kTerms * kStep) {
        repeat<kRows>([&](auto r) INLINE_LAMBDA { _mm_prefetch(ahead + kRows * k + r * kStep, _MM_HINT_T1); });
        add_step<kTokens, kTerms>(sums, values, [&](auto r) INLINE_LAMBDA { return _mm512_loadu_si512(w[r] + k); });
      }
    } else {
      for (int64_t k = 0; k < whole; k += kStep, values += kTokens * kTerms * kStep)
        add_step<kTokens, kTerms>(sums, values, [&](auto r) INLINE_LAMBDA { return _mm512_loadu_si512(w[r] + k); });
    }
  }
  if (whole < shape.in_features) {
    const __mmask64 mask = (__mmask64{1} << (shape.in_features - whole)) - 1;
    add_step<kTokens, kTerms>(
        sums, values, [&](auto r) INLINE_LAMBDA { return _mm512_maskz_loadu_epi8(mask, w[r] + whole); });
  }
  repeat<kTokens>([&](auto t) INLINE_LAMBDA {
    const int64_t token = x.first_token(group) + t;
    __m128 total = _mm_setzero_ps();
    repeat<kTerms>([&](auto i) INLINE_LAMBDA {
      const auto& of_term = sums[t * kTerms + i];
      const __m128i sum = sums_of_lanes(of_term[0], of_term[1], of_term[2], of_term[3]);
      const __m128 term = _mm_cvtepi32_ps(_mm_sub_epi32(sum, _mm_set1_epi32(x.offsets(token)[i])));
      total = _mm_add_ps(_mm_mul_ps(total, _mm_set1_ps(256.0f)), term);
    });
    finish(out + token * kMostChunkRows, total, x.scale(token), scale, bias, row, n);
  });
}

template <int kTerms, class T, class Y>
void tile_of(int64_t count, Y* out, const int8_t* const* rows, const Activations<kTerms>& x, int64_t group,
             const float* scale, const T* bias, const Shape& shape, int64_t row, int64_t n) {
  switch (count) {
    case 1: return tile<1, kTerms>(out, rows, x, group, scale, bias, shape, row, n);
    case 2: return tile<2, kTerms>(out, rows, x, group, scale, bias, shape, row, n);
    case 3: return tile<3, kTerms>(out, rows, x, group, scale, bias, shape, row, n);
    default: break;
  }
  if constexpr (kTerms == 1) {
    switch (count) {
      case 4: return tile<4, kTerms>(out, rows, x, group, scale, bias, shape, row, n);
      case 5: return tile<5, kTerms>(out, rows, x, group, scale, bias, shape, row, n);
      default: return tile<6, kTerms>(out, rows, x, group, scale, bias, shape, row, n);
    }
  }
}

template <int kTerms, class T, class Y>
void linear_block(ThreadPool* pool, Y* y, const T* x, const int8_t* w, const float* scale, const T* bias,
                  const Shape& shape) {
  Activations<kTerms> activations(shape.num_tokens, shape.in_features);
  pool->parallel_for(activations.num_groups(), [&](int64_t group) { activations.round_group(group, x); });
  for_each_tile_row(pool, y, w, shape, [&](Y* out, const int8_t* const* rows, int64_t row, int64_t n) {
    for (int64_t group = 0; group < activations.num_groups(); ++group) {
      const int64_t count = activations.first_token(group + 1) - activations.first_token(group);
      tile_of<kTerms>(count, out, rows, activations, group, scale, bias, shape, row, n);
    }
  });
}
#else

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
    finish(out + t * kMostChunkRows, _mm_loadu_ps(values), 1.0f, scale, bias, row, n);
  }
}

template <int, class T, class Y>
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
#endif

template <class T, class Y>
void linear(ThreadPool* pool, Y* y, const T* x, const int8_t* w, const float* scale, const T* bias, int64_t num_tokens,
            int64_t out_features, int64_t in_features, int64_t num_terms) {
  for (int64_t token = 0; token < num_tokens; token += kBlockTokens) {
    const Shape shape{std::min(kBlockTokens, num_tokens - token), out_features, in_features};
    Y* block_y = y + token * out_features;
    const T* block_x = x + token * in_features;
    if (num_terms == 2) {
      linear_block<2>(pool, block_y, block_x, w, scale, bias, shape);
    } else {
      linear_block<1>(pool, block_y, block_x, w, scale, bias, shape);
    }
  }
}

}  // namespace

// y [num_tokens, out_features], x [num_tokens, in_features], w [out_features, in_features], scale [out_features],
// bias [out_features] or null. num_terms: of 8 bits, that activations are rounded to: 1 or 2.
EXPORT void ryz_linear_int8_bf16(ThreadPool* pool, bf16* y, const bf16* x, const int8_t* w, const float* scale,
                                 const bf16* bias, int64_t num_tokens, int64_t out_features, int64_t in_features,
                                 int64_t num_terms) {
  linear(pool, y, x, w, scale, bias, num_tokens, out_features, in_features, num_terms);
}

EXPORT void ryz_linear_int8_bf16_f32(ThreadPool* pool, float* y, const bf16* x, const int8_t* w, const float* scale,
                                     const bf16* bias, int64_t num_tokens, int64_t out_features, int64_t in_features,
                                     int64_t num_terms) {
  linear(pool, y, x, w, scale, bias, num_tokens, out_features, in_features, num_terms);
}

EXPORT void ryz_linear_int8_f32(ThreadPool* pool, float* y, const float* x, const int8_t* w, const float* scale,
                                const float* bias, int64_t num_tokens, int64_t out_features, int64_t in_features,
                                int64_t num_terms) {
  linear(pool, y, x, w, scale, bias, num_tokens, out_features, in_features, num_terms);
}
