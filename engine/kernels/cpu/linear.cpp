// y = x w^T + b on row-major weights [out_features, in_features], as they lie in the file.
//
// Each output is a dot product along K = in_features: lane l of an accumulator adds up the products k = l, l + kLanes, …
// in this order, and the lanes are added in the order of sum_of_lanes. However rows and tokens are grouped, an output's
// bits are the same: they depend on its row of w and its token alone.
#include <algorithm>

#include "export.h"
#include "simd.h"
#include "thread_pool.h"

namespace {

constexpr int64_t kRowsPerChunk = 16;

template <class T>
float dot(const T* w, const T* x, int64_t size) {
  Vec sum = zero();
  for (int64_t k = 0; k < size; k += kLanes) sum = fma(load(w + k, size - k), load(x + k, size - k), sum);
  return sum_of_lanes(sum);
}

inline void put(float* y, float value) { *y = value; }
inline void put(bf16* y, float value) { store(y, broadcast(value), 1); }

template <class T, class Y>
void linear(ThreadPool* pool, Y* y, const T* x, const T* w, const T* bias, int64_t num_tokens, int64_t out_features,
            int64_t in_features) {
  pool->parallel_for((out_features + kRowsPerChunk - 1) / kRowsPerChunk, [=](int64_t chunk) {
    const int64_t stop = std::min(out_features, (chunk + 1) * kRowsPerChunk);
    for (int64_t row = chunk * kRowsPerChunk; row < stop; ++row) {
      for (int64_t token = 0; token < num_tokens; ++token) {
        const float sum = dot(w + row * in_features, x + token * in_features, in_features);
        put(y + token * out_features + row, bias == nullptr ? sum : sum + to_float(bias[row]));
      }
    }
  });
}

}  // namespace

// y [num_tokens, out_features], x [num_tokens, in_features], w [out_features, in_features], bias [out_features] or null.
// _f32 at the end: y is float32.
EXPORT void ryz_linear_f32(ThreadPool* pool, float* y, const float* x, const float* w, const float* bias,
                           int64_t num_tokens, int64_t out_features, int64_t in_features) {
  linear(pool, y, x, w, bias, num_tokens, out_features, in_features);
}

EXPORT void ryz_linear_bf16(ThreadPool* pool, bf16* y, const bf16* x, const bf16* w, const bf16* bias,
                            int64_t num_tokens, int64_t out_features, int64_t in_features) {
  linear(pool, y, x, w, bias, num_tokens, out_features, in_features);
}

EXPORT void ryz_linear_bf16_f32(ThreadPool* pool, float* y, const bf16* x, const bf16* w, const bf16* bias,
                                int64_t num_tokens, int64_t out_features, int64_t in_features) {
  linear(pool, y, x, w, bias, num_tokens, out_features, in_features);
}
