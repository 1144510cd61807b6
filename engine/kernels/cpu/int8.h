// What int8 kernels share.
#pragma once

#include <algorithm>

#include "simd.h"

namespace {

// Returns the largest magnitude of the first `size` of x; NaN where one is no finite number. A maximum alone would pass
// over a NaN, and what is rounded by its scale would look like a number.
template <class T>
float largest(const T* x, int64_t size) {
  Vec most = zero(), nothing = zero();
  for (int64_t k = 0; k < size; k += kLanes) {
    const Vec values = load(x + k, size - k);
    most = max(most, max(values, sub(zero(), values)));
    nothing = fma(values, zero(), nothing);
  }
  return max_of_lanes(most) + sum_of_lanes(nothing);
}

}  // namespace
