// Root mean square normalisation, with the addition before it.
#include <cmath>

#include "elementwise.h"
#include "export.h"
#include "simd.h"
#include "thread_pool.h"

namespace {

template <class T>
void add_rms_norm_row(T* y, T* sum, const T* x, const T* residual, const T* weight, int64_t size, float eps) {
  Vec squares = zero();
  for (int64_t i = 0; i < size; i += kLanes) {
    Vec h = load(x + i, size - i);
    if (residual != nullptr) {
      h = rounded(x, add(h, load(residual + i, size - i)));
      store(sum + i, h, size - i);
    }
    squares = fma(h, h, squares);
  }
  const Vec scale = broadcast(1.0f / std::sqrt(sum_of_lanes(squares) / static_cast<float>(size) + eps));
  const T* h = residual == nullptr ? x : sum;
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec normed = rounded(x, mul(load(h + i, size - i), scale));
    store(y + i, mul(normed, load(weight + i, size - i)), size - i);
  }
}

template <class T>
void add_rms_norm(ThreadPool* pool, T* y, T* sum, const T* x, const T* residual, const T* weight, int64_t num_tokens,
                  int64_t size, float eps) {
  for_tokens(pool, num_tokens, size, [=](int64_t token) {
    const int64_t at = token * size;
    add_rms_norm_row(y + at, sum + at, x + at, residual == nullptr ? nullptr : residual + at, weight, size, eps);
  });
}

}  // namespace

// sum = x + residual, y = weight * sum / sqrt(mean(sum^2) + eps); all [num_tokens, size], weight [size]. Without a
// residual (null) x takes sum's place, and sum is not written.
EXPORT void ryz_add_rms_norm_f32(ThreadPool* pool, float* y, float* sum, const float* x, const float* residual,
                                 const float* weight, int64_t num_tokens, int64_t size, float eps) {
  add_rms_norm(pool, y, sum, x, residual, weight, num_tokens, size, eps);
}

EXPORT void ryz_add_rms_norm_bf16(ThreadPool* pool, bf16* y, bf16* sum, const bf16* x, const bf16* residual,
                                  const bf16* weight, int64_t num_tokens, int64_t size, float eps) {
  add_rms_norm(pool, y, sum, x, residual, weight, num_tokens, size, eps);
}
