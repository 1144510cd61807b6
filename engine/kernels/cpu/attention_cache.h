// One layer's keys and values, in pages of block_size tokens. A page has one part a KV head, keys and values apart, each
// of block_size * head_dim elements in the order that they are computed with:
//
//   keys    [block_size / t][head_dim / p][t][p]   t = gcd(block_size, 16) tokens side by side, p features of each
//   values  [block_size / q][head_dim][q]          q = p, or 1 where block_size is odd
//
// where p is how many elements a float's bytes hold: see attention_pack.h.
#pragma once

#include <cstdint>
#include <numeric>

#include "attention_pack.h"

namespace {

constexpr int64_t kTileKeys = 16;  // tokens whose scores are computed side by side

// The sequences of one step; from Python, see engine/attention/cpu_paged.py.
struct AttentionStep {
  int64_t num_seqs;
  const int64_t* cu_seqlens_q;  // [num_seqs + 1]
  const int64_t* seq_lens;  // [num_seqs]
  const int32_t* block_tables;  // all sequences' block ids, one after the other
  const int64_t* table_starts;  // [num_seqs]: where each one's begin
  int64_t num_heads, num_kv_heads, head_dim, block_size;

  int64_t num_tokens() const { return cu_seqlens_q[num_seqs]; }
  int64_t heads_per_token() const { return num_heads + 2 * num_kv_heads; }
};

template <class T>
class Cache {
 public:
  Cache(T* keys, T* values, const AttentionStep& step)
      : keys_(keys),
        values_(values),
        step_(step),
        tile_(std::gcd(step.block_size, kTileKeys)),
        value_pack_(std::gcd(step.block_size, int64_t{kPack<T>})) {}

  // Whether kTileKeys tokens, beginning at a multiple, lie as they are computed with.
  bool has_whole_tiles() const { return tile_ == kTileKeys; }

  const T* keys() const { return keys_; }
  const T* values() const { return values_; }

  // Where among them the tile begins that begins with a sequence's token `position`, a multiple of kTileKeys.
  int64_t tile_at(int64_t seq, int64_t position, int64_t head) const {
    return page_at(seq, position, head) + offset_in_block(position) * step_.head_dim;
  }

  // Keeps a token's key and value of one head, [head_dim] each.
  void write(int64_t seq, int64_t position, int64_t head, const T* key, const T* value) const {
    const int64_t page = page_at(seq, position, head), at = offset_in_block(position), size = step_.head_dim;
    T* const k = keys_ + page + at / tile_ * tile_ * size + at % tile_ * kPack<T>;
    for (int64_t i = 0; i < size; i += kPack<T>) std::memcpy(k + i * tile_, key + i, sizeof(float));
    T* const v = values_ + page + at / value_pack_ * value_pack_ * size + at % value_pack_;
    for (int64_t i = 0; i < size; ++i) v[i * value_pack_] = value[i];
  }

  // Copies `count` tokens, beginning at a multiple of kTileKeys, into whole tiles: for pages that have none.
  void gather(T* keys, T* values, int64_t seq, int64_t position, int64_t head, int64_t count) const {
    const int64_t size = step_.head_dim;
    for (int64_t token = 0; token < count; ++token) {
      const int64_t page = page_at(seq, position + token, head), at = offset_in_block(position + token);
      const T* const k = keys_ + page + at / tile_ * tile_ * size + at % tile_ * kPack<T>;
      T* const to = keys + token / kTileKeys * kTileKeys * size + token % kTileKeys * kPack<T>;
      for (int64_t i = 0; i < size; i += kPack<T>) std::memcpy(to + i * kTileKeys, k + i * tile_, sizeof(float));
      const T* const v = values_ + page + at / value_pack_ * value_pack_ * size + at % value_pack_;
      T* const into = values + token / kPack<T> * kPack<T> * size + token % kPack<T>;
      for (int64_t i = 0; i < size; ++i) into[i * kPack<T>] = v[i * value_pack_];
    }
  }

 private:
  // Divisions in 32 bits: they are several times faster, and there is one for each tile.
  uint32_t offset_in_block(int64_t position) const {
    return static_cast<uint32_t>(position) % static_cast<uint32_t>(step_.block_size);
  }

  int64_t page_at(int64_t seq, int64_t position, int64_t head) const {
    const uint32_t index = static_cast<uint32_t>(position) / static_cast<uint32_t>(step_.block_size);
    const int64_t block = step_.block_tables[step_.table_starts[seq] + index];
    return (block * step_.num_kv_heads + head) * step_.block_size * step_.head_dim;
  }

  T* const keys_;
  T* const values_;
  const AttentionStep& step_;
  const int64_t tile_, value_pack_;
};

}  // namespace
