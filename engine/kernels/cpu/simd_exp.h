// exp of a vector, to within an ulp, whatever the instruction set.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX512F__)
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec times_power_of_2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
#else
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }

// x 2^n for whole n of at most 254 either way: in two steps, as 2^n alone may be no float. At most the second rounds.
inline Vec times_power_of_2(Vec x, Vec n) {
  const auto power = [](__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
  };
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return mul(mul(x, power(half)), power(_mm256_sub_epi32(whole, half)));
}
#endif

// exp(x) = 2^n exp(r), with |r| <= ln(2) / 2, of which exp is a polynomial (fitted for the least relative error).
// exp(-inf) is 0, exp(inf) is inf, and a NaN stays one: max and min return their second operand where one is a NaN.
inline Vec exp(Vec x) {
  x = min(broadcast(90.0f), max(broadcast(-105.0f), x));  // beyond, the result is inf and 0 anyway
  const Vec n = round_to_even(mul(x, broadcast(0x1.715476p+0f)));
  Vec r = fma(n, broadcast(-0x1.62e4p-1f), x);  // ln(2) in two parts; n times the first is exact
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  Vec p = broadcast(0x1.6a2352p-10f);
  p = fma(p, r, broadcast(0x1.123a6cp-7f));
  p = fma(p, r, broadcast(0x1.5558f4p-5f));
  p = fma(p, r, broadcast(0x1.55549p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return times_power_of_2(p, n);
}

}  // namespace
