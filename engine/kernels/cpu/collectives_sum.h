// Sums over ranks, element by element: rank 0's first, then 1's, 2's and so on, in float32 at least, and rounded once.
#pragma once

#include "simd.h"

namespace {

struct f16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
inline Vec load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(f16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(f16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

inline Vec load(const f16* p, int64_t n) {
  if (n >= kLanes) return load(p);
  f16 some[kLanes] = {};
  std::memcpy(some, p, n * sizeof(f16));
  return load(some);
}
inline void store(f16* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  f16 all[kLanes];
  store(all, v);
  std::memcpy(p, all, n * sizeof(f16));
}

// out = sources[0] + sources[1] + ..., each [n]; out may be one of them.
template <class T>
void sum_ranks(T* out, const T* const* sources, int num_sources, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec sum = load(sources[0] + i, n - i);
    for (int rank = 1; rank < num_sources; ++rank) sum = add(sum, load(sources[rank] + i, n - i));
    store(out + i, sum, n - i);
  }
}

template <class T>
void sum_ranks_exactly(T* out, const T* const* sources, int num_sources, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T sum = sources[0][i];
    for (int rank = 1; rank < num_sources; ++rank) sum += sources[rank][i];
    out[i] = sum;
  }
}

inline void sum_ranks(double* out, const double* const* sources, int num_sources, int64_t n) {
  sum_ranks_exactly(out, sources, num_sources, n);
}

// Unsigned, as whole numbers wrap around in torch.
inline void sum_ranks(uint64_t* out, const uint64_t* const* sources, int num_sources, int64_t n) {
  sum_ranks_exactly(out, sources, num_sources, n);
}

}  // namespace
