// Attention of a few query rows to one block of keys: scores, softmax, weighted sum of values.
//
// Each row has its own sums, added up in the order of the keys, so that its bits do not depend on the rows beside it. The
// softmax is the online one (Milakov and Gimelshein, 2018, arXiv 1805.02867): what was summed before decays whenever a
// larger score is found.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_cache.h"
#include "attention_pack.h"
#include "simd_exp.h"

namespace {

constexpr int64_t kBlockKeys = 64;  // beginning at a multiple; results depend on it
constexpr int kBlockTiles = kBlockKeys / kTileKeys;
constexpr int kMaxRows = 4;  // computed together, each line of keys and values read once for all

#if defined(__AVX512F__)
constexpr int kTilesAtOnce = 4, kValueLinesAtOnce = 4;  // what 32 registers hold the sums of
#else
constexpr int kTilesAtOnce = 1, kValueLinesAtOnce = 2;  // 16 registers
#endif

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One block of keys and values; where it ends early, any readable tile stands for those behind its end.
template <class T>
struct Tiles {
  const T* keys[kBlockTiles];
  const T* values[kBlockTiles];
};

// A block, and the one that is asked for while it is computed with.
template <class T>
struct KeyBlock {
  Tiles<T> here, next;
};

// Into the second cache: for the first, what is asked for waits in a queue that what is computed with needs too.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// What rows have summed up so far: sums are of exp(score - max).
struct Sums {
  float* max;  // [num_rows]
  float* weight;  // [num_rows]
  float* value;  // [num_rows, stride]
  int64_t stride;  // head_dim, in whole vectors

  static int64_t size(int64_t num_rows, int64_t stride) { return num_rows * (2 + stride); }

  Sums(float* memory, int64_t num_rows, int64_t stride)
      : max(memory), weight(memory + num_rows), value(memory + 2 * num_rows), stride(stride) {}

  Sums from(int64_t row) const {
    Sums rest = *this;
    rest.max += row, rest.weight += row, rest.value += row * stride;
    return rest;
  }

  void clear(int64_t num_rows) const {
    std::fill_n(max, num_rows, -kInfinity);
    std::fill_n(weight, num_rows, 0.0f);
    std::fill_n(value, num_rows * stride, 0.0f);
  }
};

// What scores are taken relative to: their largest, or 0 where there is nothing larger than -inf.
inline float shift_of(float max) { return max == -kInfinity ? 0.0f : max; }

template <class T, int R, bool kPrefetch>
void compute_scores(float (*scores)[kBlockKeys], const typename Packed<T>::Operand* queries, const KeyBlock<T>& block,
                    int64_t num_keys, int64_t head_dim) {
  using P = Packed<T>;
  constexpr int kPerTile = kTileKeys / kLanes, kLines = kTilesAtOnce * kPerTile;
  for (int tile = 0; tile * kTileKeys < num_keys; tile += kTilesAtOnce) {
    Vec sums[R][kLines];
    for (auto& row : sums)
      for (Vec& sum : row) sum = zero();
    for (int64_t i = 0; i < head_dim; i += kPack<T>) {
      typename P::Line keys[kLines];
      for (int line = 0; line < kLines; ++line) {
        const T* const at = block.here.keys[tile + line / kPerTile] + i * kTileKeys;
        keys[line] = P::load(at + line % kPerTile * kLanes * kPack<T>);
      }
      if (kPrefetch) {
        for (int t = 0; t < kTilesAtOnce; ++t) prefetch(block.next.keys[tile + t] + i * kTileKeys);
      }
      for (int row = 0; row < R; ++row) {
        const typename P::Line query = P::repeat(queries + row * head_dim + i);
        for (int line = 0; line < kLines; ++line) sums[row][line] = P::dot(keys[line], query, sums[row][line]);
      }
    }
    for (int row = 0; row < R; ++row)
      for (int line = 0; line < kLines; ++line) store(scores[row] + tile * kTileKeys + line * kLanes, sums[row][line]);
  }
}

// Turns scores into weights, and writes what earlier sums decay to.
template <class T, int R>
void compute_weights(typename Packed<T>::Operand (*weights)[kBlockKeys], float* decays, float (*scores)[kBlockKeys],
                     int64_t num_keys, float scale, const Sums& sums) {
  float changes[kLanes] = {};
  for (int row = 0; row < R; ++row) {
    Vec largest = broadcast(sums.max[row]);
    for (int64_t i = 0; i < num_keys; i += kLanes) {
      const Vec some = first_or(load(scores[row] + i), num_keys - i, broadcast(-kInfinity));
      store(scores[row] + i, some);
      largest = max(largest, some);
    }
    const float max = max_of_lanes(largest), shift = shift_of(max);
    changes[row] = (sums.max[row] - shift) * scale;
    sums.max[row] = max;
    Vec total = zero();
    for (int64_t i = 0; i < num_keys; i += kLanes) {
      const Vec some = exp(mul(sub(load(scores[row] + i), broadcast(shift)), broadcast(scale)));
      store(weights[row] + i, some);
      total = add(total, some);
    }
    scores[row][0] = sum_of_lanes(total);
  }
  float decay[kLanes];
  store(decay, exp(load(changes)));
  for (int row = 0; row < R; ++row) {
    decays[row] = decay[row];
    sums.weight[row] = std::fma(sums.weight[row], decay[row], scores[row][0]);
  }
}

// Adds the weighted values of kLines * kLanes features, of which `width` are there, to what decays meanwhile.
template <class T, int R, int kLines, bool kIsWhole, bool kPrefetch>
void add_value_lines(float* values, int64_t stride, const float* decays,
                     const typename Packed<T>::Operand (*weights)[kBlockKeys], const KeyBlock<T>& block, int64_t num_keys,
                     int64_t head_dim, int64_t feature) {
  using P = Packed<T>;
  constexpr int kStep = kLanes * kPack<T>;
  const int64_t width = head_dim - feature;
  Vec sums[R][kLines];
  for (int row = 0; row < R; ++row)
    for (int line = 0; line < kLines; ++line)
      sums[row][line] = mul(load(values + row * stride + line * kLanes), broadcast(decays[row]));
  const auto add_pack = [&](int tile, int64_t key, bool is_half) {
    const int64_t offset = key * head_dim + feature * kPack<T>;
    typename P::Line lines[kLines];
    for (int line = 0; line < kLines; ++line) {
      const T* const at = block.here.values[tile] + offset + line * kStep;
      lines[line] = kIsWhole ? P::load(at) : P::load(at, width - line * kLanes);
      if (is_half) lines[line] = P::without_second(lines[line]);
      if (kPrefetch) prefetch(block.next.values[tile] + offset + line * kStep);
    }
    for (int row = 0; row < R; ++row) {
      const typename P::Line weight = P::repeat(weights[row] + tile * kTileKeys + key);
      for (int line = 0; line < kLines; ++line) sums[row][line] = P::dot(lines[line], weight, sums[row][line]);
    }
  };
  for (int tile = 0; tile * kTileKeys < num_keys; ++tile) {
    const int64_t count = std::min(kTileKeys, num_keys - tile * kTileKeys), whole = count / kPack<T> * kPack<T>;
    for (int64_t key = 0; key < whole; key += kPack<T>) add_pack(tile, key, false);
    if (whole < count) add_pack(tile, whole, true);  // the second token of this pack is not this row's to see
  }
  for (int row = 0; row < R; ++row)
    for (int line = 0; line < kLines; ++line) store(values + row * stride + line * kLanes, sums[row][line]);
}

template <class T, int R, bool kPrefetch>
void add_values(const Sums& sums, const float* decays, const typename Packed<T>::Operand (*weights)[kBlockKeys],
                const KeyBlock<T>& block, int64_t num_keys, int64_t head_dim) {
  int64_t i = 0;
  for (; i + kValueLinesAtOnce * kLanes <= head_dim; i += kValueLinesAtOnce * kLanes) {
    add_value_lines<T, R, kValueLinesAtOnce, true, kPrefetch>(sums.value + i, sums.stride, decays, weights, block,
                                                             num_keys, head_dim, i);
  }
  for (; i < head_dim; i += kLanes) {
    add_value_lines<T, R, 1, false, kPrefetch>(sums.value + i, sums.stride, decays, weights, block, num_keys, head_dim,
                                               i);
  }
}

// Lets R rows attend to the first num_keys > 0 of a block. queries: [R, head_dim].
template <class T, int R, bool kPrefetch>
void attend_block(const Sums& sums, const typename Packed<T>::Operand* queries, const KeyBlock<T>& block,
                  int64_t num_keys, int64_t head_dim, float scale) {
  alignas(64) float scores[R][kBlockKeys];
  alignas(64) typename Packed<T>::Operand weights[R][kBlockKeys];
  float decays[R];
  compute_scores<T, R, kPrefetch>(scores, queries, block, num_keys, head_dim);
  compute_weights<T, R>(weights, decays, scores, num_keys, scale, sums);
  add_values<T, R, kPrefetch>(sums, decays, weights, block, num_keys, head_dim);
}

// The same for any number of rows. The first of them ask for the next block.
template <class T>
void attend_block(const Sums& sums, int64_t num_rows, const typename Packed<T>::Operand* queries,
                  const KeyBlock<T>& block, int64_t num_keys, int64_t head_dim, float scale, bool prefetch) {
  const auto attend = [&](auto rows, int64_t row) {
    constexpr int kRows = decltype(rows)::value;
    if (prefetch && row == 0) {
      attend_block<T, kRows, true>(sums.from(row), queries + row * head_dim, block, num_keys, head_dim, scale);
    } else {
      attend_block<T, kRows, false>(sums.from(row), queries + row * head_dim, block, num_keys, head_dim, scale);
    }
  };
  for (int64_t row = 0; row < num_rows; row += kMaxRows) {
    switch (std::min<int64_t>(num_rows - row, kMaxRows)) {
      case 1: attend(std::integral_constant<int, 1>(), row); break;
      case 2: attend(std::integral_constant<int, 2>(), row); break;
      case 3: attend(std::integral_constant<int, 3>(), row); break;
      default: attend(std::integral_constant<int, 4>(), row);
    }
  }
}

// Adds the sums of later keys to those of earlier ones, row by row. sum_i = sum_i * decay_i after both got one max.
inline void merge(const Sums& sums, const Sums& later, int64_t num_rows, float scale) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const float max = std::max(sums.max[row], later.max[row]), shift = shift_of(max);
    float decay[kLanes] = {(sums.max[row] - shift) * scale, (later.max[row] - shift) * scale};
    store(decay, exp(load(decay)));
    sums.max[row] = max;
    sums.weight[row] = std::fma(later.weight[row], decay[1], sums.weight[row] * decay[0]);
    float* const value = sums.value + row * sums.stride;
    const float* const added = later.value + row * sums.stride;
    for (int64_t i = 0; i < sums.stride; i += kLanes) {
      store(value + i, fma(load(added + i), broadcast(decay[1]), mul(load(value + i), broadcast(decay[0]))));
    }
  }
}

}  // namespace
