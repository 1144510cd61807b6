// What int8 kernels share.
#pragma once

#include <algorithm>

#include "simd.h"

namespace {

// Returns the largest magnitude of the first `size` of x.
template <class T>
float largest(const T* x, int64_t size) {
  Vec most = zero();
  for (int64_t k = 0; k < size; k += kLanes) {
    const Vec values = load(x + k, size - k);
    most = max(most, max(values, sub(zero(), values)));
  }
  return max_of_lanes(most);
}

}  // namespace
