// silu(g) * u = g / (1 + exp(-g)) * u, the activation of SwiGLU (Shazeer, 2020, arXiv 2002.05202).
#include "elementwise.h"
#include "export.h"
#include "simd.h"
#include "simd_exp.h"
#include "thread_pool.h"

namespace {

template <class T>
void silu_mul(ThreadPool* pool, T* y, const T* gate_up, int64_t num_tokens, int64_t size) {
  for_tokens(pool, num_tokens, size, [=](int64_t token) {
    const T* gate = gate_up + token * 2 * size;
    const T* up = gate + size;
    for (int64_t i = 0; i < size; i += kLanes) {
      const Vec g = load(gate + i, size - i);
      const Vec silu = div(g, add(broadcast(1.0f), exp(sub(zero(), g))));
      store(y + token * size + i, mul(rounded(gate, silu), load(up + i, size - i)), size - i);
    }
  });
}

}  // namespace

// y [num_tokens, size] = silu(g) * u, where gate_up [num_tokens, 2 size] has g and then u in each row.
EXPORT void ryz_silu_mul_f32(ThreadPool* pool, float* y, const float* gate_up, int64_t num_tokens, int64_t size) {
  silu_mul(pool, y, gate_up, num_tokens, size);
}

EXPORT void ryz_silu_mul_bf16(ThreadPool* pool, bf16* y, const bf16* gate_up, int64_t num_tokens, int64_t size) {
  silu_mul(pool, y, gate_up, num_tokens, size);
}
