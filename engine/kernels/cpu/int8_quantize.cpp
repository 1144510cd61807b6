// Rounds matrices to int8, each row by a scale of its own: w = scale q, where scale = max |w| / 127.
#include "divide_up.h"
#include "export.h"
#include "int8.h"
#include "thread_pool.h"

namespace {

constexpr int64_t kRowsPerChunk = 16;

template <class F>
void for_each_row(ThreadPool* pool, int64_t num_rows, const F& f) {
  pool->parallel_for(divide_up(num_rows, kRowsPerChunk), [&](int64_t chunk) {
    const int64_t stop = std::min(num_rows, (chunk + 1) * kRowsPerChunk);
    for (int64_t row = chunk * kRowsPerChunk; row < stop; ++row) f(row);
  });
}

// To the nearest, ties to even.
inline void store_bytes(int8_t* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
  _mm_mask_storeu_epi8(p, first(n), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
#else
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  int8_t all[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(all), _mm_packs_epi16(halves, halves));
  std::copy_n(all, std::min<int64_t>(n, kLanes), p);
#endif
}

template <class T>
void quantize_row(int8_t* q, const T* w, float scale, int64_t size) {
  const Vec divisor = broadcast(scale == 0.0f ? 1.0f : scale);  // all of such a row is 0, or too small to tell
  const Vec most = broadcast(127.0f);
  for (int64_t k = 0; k < size; k += kLanes) {
    const Vec values = div(load(w + k, size - k), divisor);
    store_bytes(q + k, max(sub(zero(), most), sub(zero(), max(sub(zero(), most), sub(zero(), values)))), size - k);
  }
}

template <class T>
void scales(ThreadPool* pool, float* scale, const T* w, int64_t num_rows, int64_t size, int64_t stride) {
  for_each_row(pool, num_rows, [&](int64_t row) { scale[row] = largest(w + row * stride, size) / 127.0f; });
}

template <class T>
void quantize(ThreadPool* pool, int8_t* q, const T* w, const float* scale, int64_t num_rows, int64_t size,
              int64_t stride) {
  for_each_row(pool, num_rows,
               [&](int64_t row) { quantize_row(q + row * size, w + row * stride, scale[row], size); });
}

}  // namespace

// scale [num_rows] of w, num_rows rows of `size` numbers that begin `stride` after one another.
EXPORT void ryz_int8_scales_f32(ThreadPool* pool, float* scale, const float* w, int64_t num_rows, int64_t size,
                                int64_t stride) {
  scales(pool, scale, w, num_rows, size, stride);
}

EXPORT void ryz_int8_scales_bf16(ThreadPool* pool, float* scale, const bf16* w, int64_t num_rows, int64_t size,
                                 int64_t stride) {
  scales(pool, scale, w, num_rows, size, stride);
}

// q [num_rows, size] of w, as above.
EXPORT void ryz_int8_rows_f32(ThreadPool* pool, int8_t* q, const float* w, const float* scale, int64_t num_rows,
                              int64_t size, int64_t stride) {
  quantize(pool, q, w, scale, num_rows, size, stride);
}

EXPORT void ryz_int8_rows_bf16(ThreadPool* pool, int8_t* q, const bf16* w, const float* scale, int64_t num_rows,
                               int64_t size, int64_t stride) {
  quantize(pool, q, w, scale, num_rows, size, stride);
}
