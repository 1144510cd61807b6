// Rotary position embedding (Su et al., 2021, arXiv 2104.09864), in the half-split layout of Hugging Face's Llamas.
#pragma once

#include <cstdint>

#include "simd.h"

namespace {

// y = x rotated: feature i of a head against feature i + head_dim / 2. All [head_dim]; y is not x.
template <class T>
void rotate(T* y, const T* x, const T* cos, const T* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const Vec first = load(x + i, n), second = load(x + half + i, n);
    store(y + i, sub(mul(first, load(cos + i, n)), mul(second, load(sin + i, n))), n);
    store(y + half + i, fma(second, load(cos + half + i, n), mul(first, load(sin + half + i, n))), n);
  }
}

}  // namespace
