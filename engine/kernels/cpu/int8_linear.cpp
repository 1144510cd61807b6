// y = x w^T + b on int8 weights with a float32 scale for each row: w = scale q, q row-major [out_features, in_features].
#include "export.h"
#include "simd.h"
#include "thread_pool.h"

#if defined(__AVX512VNNI__)
#include "int8_vnni.h"
#else
#include "int8_convert.h"
#endif

namespace {

template <class T, class Y>
void linear(ThreadPool* pool, Y* y, const T* x, const int8_t* w, const float* scale, const T* bias, int64_t num_tokens,
            int64_t out_features, int64_t in_features, [[maybe_unused]] int64_t num_terms) {
#if defined(__AVX512VNNI__)
  const auto multiply = num_terms == 2 ? linear_int8<2, T, Y> : linear_int8<1, T, Y>;
  multiply(pool, y, x, w, scale, bias, num_tokens, out_features, in_features);
#else
  linear_int8(pool, y, x, w, scale, bias, num_tokens, out_features, in_features);
#endif
}

}  // namespace

// y [num_tokens, out_features], x [num_tokens, in_features], w [out_features, in_features], scale [out_features],
// bias [out_features] or null. num_terms: of 8 bits, that activations are rounded to where they are: 1 or 2.
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
