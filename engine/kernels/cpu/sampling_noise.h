// The noise of a token, as engine/sampling/philox.py defines it, and a bound of it that is cheap.
//
// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) gives four words a counter, and
// so the noise of four neighbouring tokens. With a word x, u = (x + 1/2) / 2^32 and v = 1 - u:
//
//     -log(u) >= v        so that        gumbel = -log(-log(u)) <= -log(v) <= log(2) (127 - bits(v) / 2^23)
//
// where bits(v) are those of v as a float, whose exponent and fraction bound its binary logarithm from below. The bound is
// less than 0.1 above large noise, so few tokens of a vocabulary need logarithms.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t kTokensPerCounter = 4;
constexpr int64_t kBlock = 2 * kLanes;  // tokens whose words are made together: those of as many counters as 64-bit lanes
constexpr float kLargestNoise = 22.9f;  // 33 log(2) is 22.8739
constexpr float kBoundSlack = 1e-3f;    // above all roundings in the bound

struct NoiseSource {
  uint64_t seed;
  uint32_t choice;
  uint32_t position;
};

#if defined(__AVX512F__)
using Wide = __m512i;  // 64-bit lanes
inline Wide wide(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline Wide counting_from(uint64_t x) { return _mm512_add_epi64(wide(x), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)); }
inline Wide multiply_low(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }  // of the lanes' lower halves, to 64 bits
inline Wide high(Wide a) { return _mm512_srli_epi64(a, 32); }
inline Wide exclusive_or(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Lane l of the result holds the lower half of a's below that of b's.
inline Wide pair(Wide a, Wide b) { return _mm512_mask_mov_epi32(a, 0xAAAA, _mm512_slli_epi64(b, 32)); }
inline void store_interleaved(uint32_t* words, Wide a, Wide b) {  // a0 b0 a1 b1 …
  const __m512i first_half = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second_half = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(words, _mm512_permutex2var_epi64(a, first_half, b));
  _mm512_storeu_si512(words + kLanes, _mm512_permutex2var_epi64(a, second_half, b));
}
// Bounds the noise of kLanes words from above.
inline Vec noise_bound(const uint32_t* words) {
  const __m512i x = _mm512_loadu_si512(words);
  const __m512i v = _mm512_srli_epi32(_mm512_xor_si512(x, _mm512_set1_epi32(-1)), 1);  // 2^31 v, rounded down
  const __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(v));
  return fma(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32((127 + 31) << 23), bits)),
             broadcast(0x1.62e43p-24f), broadcast(kBoundSlack));
}
// Bit l: whether a's lane l is at least b's.
inline uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t is_nan(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline Vec select_at_least(Vec a, Vec b, Vec otherwise) {  // a where it is at least b
  return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), a);
}
inline void store_as_int(int32_t* p, Vec v) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(v)); }
inline void store_truncated(int32_t* p, Vec v) { _mm512_storeu_si512(p, _mm512_cvttps_epi32(v)); }
#else
using Wide = __m256i;
inline Wide wide(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline Wide counting_from(uint64_t x) { return _mm256_add_epi64(wide(x), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline Wide multiply_low(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
inline Wide high(Wide a) { return _mm256_srli_epi64(a, 32); }
inline Wide exclusive_or(Wide a, Wide b, Wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Wide pair(Wide a, Wide b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA); }
inline void store_interleaved(uint32_t* words, Wide a, Wide b) {
  const __m256i even = _mm256_unpacklo_epi64(a, b);  // a0 b0 a2 b2
  const __m256i odd = _mm256_unpackhi_epi64(a, b);   // a1 b1 a3 b3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + kLanes), _mm256_permute2x128_si256(even, odd, 0x31));
}
inline Vec noise_bound(const uint32_t* words) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i v = _mm256_srli_epi32(_mm256_xor_si256(x, _mm256_set1_epi32(-1)), 1);
  const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(v));
  return fma(_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32((127 + 31) << 23), bits)),
             broadcast(0x1.62e43p-24f), broadcast(kBoundSlack));
}
inline uint32_t at_least(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
inline uint32_t is_nan(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
inline Vec select_at_least(Vec a, Vec b, Vec otherwise) {
  return _mm256_blendv_ps(otherwise, a, _mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
inline void store_as_int(int32_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(v));
}
inline void store_truncated(int32_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvttps_epi32(v));
}
#endif

// The keys of the ten rounds, from the seed, and the words of the counter that a row's tokens share.
struct Noise {
  explicit Noise(const NoiseSource& source) : position(source.position), choice(source.choice) {
    uint32_t key0 = static_cast<uint32_t>(source.seed), key1 = static_cast<uint32_t>(source.seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      keys0[round] = key0;
      keys1[round] = key1;
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
  }

  static constexpr int kRounds = 10;
  uint64_t keys0[kRounds], keys1[kRounds];
  uint64_t position, choice;
};

// The words of the kBlock tokens from `token` on, a multiple of kBlock.
inline void noise_words(uint32_t* words, const Noise& noise, int64_t token) {
  const Wide multiplier0 = wide(0xD2511F53), multiplier1 = wide(0xCD9E8D57);
  // A lane's upper half may hold anything: products are of lower halves.
  Wide x0 = wide(noise.position), x1 = wide(noise.choice), x2 = counting_from(token / kTokensPerCounter), x3 = wide(0);
#pragma GCC unroll 10
  for (int round = 0; round < Noise::kRounds; ++round) {
    const Wide product0 = multiply_low(x0, multiplier0), product1 = multiply_low(x2, multiplier1);
    x0 = exclusive_or(high(product1), x1, wide(noise.keys0[round]));
    x1 = product1;
    x2 = exclusive_or(high(product0), x3, wide(noise.keys1[round]));
    x3 = product0;
  }
  store_interleaved(words, pair(x0, x1), pair(x2, x3));
}

// To the last bit what engine/sampling/philox.py gives, unless two libraries' logarithms round a float differently.
inline float to_gumbel(uint32_t word) {
  const double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
  return static_cast<float>(-std::log(-std::log(uniform)));
}

inline float token_noise(const Noise& noise, int64_t token) {
  uint32_t words[kBlock];
  noise_words(words, noise, token / kBlock * kBlock);
  return to_gumbel(words[token % kBlock]);
}

}  // namespace
