// Causal attention over paged keys and values: decode and chunked prefill in one, grouped queries included.
//
// A step is cut into units: a run of one sequence's query tokens, for one KV head, with all query heads that share it. A
// unit walks over its keys in blocks of kBlockKeys and sums each kSegmentKeys of them by themselves, then adds these sums
// in order. Where there are too few units to keep all threads busy, a unit's segments are spread over several pieces and
// added up afterwards, in the same order. So a row's bits depend on its sequence's tokens alone: not on the step's other
// tokens, nor on where pages lie, nor on how work is spread.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "attention_block.h"
#include "attention_cache.h"
#include "export.h"
#include "rotary.h"
#include "thread_pool.h"

namespace {

constexpr int64_t kSegmentKeys = 512;  // a multiple of kBlockKeys; results depend on it
constexpr int64_t kUnitRows = 32;  // their sums and one block of keys and values lie in the first caches
constexpr int64_t kPiecesPerThread = 2;  // of a step's work, at least
constexpr int64_t kChunkWork = 4096;  // products of a row and a key, below which a thread is not worth waking
constexpr int64_t kWriteChunk = 8192;  // elements of keys, likewise

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A run of one sequence's query tokens, and the segments of keys that it attends to in this piece.
struct Piece {
  int64_t seq;
  int64_t token, num_tokens;  // of the step
  int64_t position;  // of the first token in its sequence
  int64_t first_segment, last_segment;
  int64_t sums;  // where those of its unit lie among all sums that are added up later; -1 if the piece is its whole unit

  int64_t num_segments() const { return divided_up(position + num_tokens, kSegmentKeys); }
  int64_t work() const { return num_tokens * (position + num_tokens); }
};

template <class T>
class PagedAttention {
  using Operand = typename Packed<T>::Operand;

 public:
  PagedAttention(ThreadPool* pool, T* out, const T* heads, const T* cos, const T* sin, T* keys, T* values,
                 const AttentionStep& step)
      : pool_(pool),
        out_(out),
        heads_(heads),
        cos_(cos),
        sin_(sin),
        step_(step),
        cache_(keys, values, step),
        share_(step.num_heads / step.num_kv_heads),
        stride_(divided_up(step.head_dim, kLanes) * kLanes),
        scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(step.head_dim)))) {}

  void run() {
    write_cache();
    plan();
    const int64_t num_items = static_cast<int64_t>(pieces_.size()) * step_.num_kv_heads;
    if (num_items == 0) return;
    sums_.reset(new float[num_sums_ * step_.num_kv_heads]);
    const int64_t per_chunk = std::max<int64_t>(1, kChunkWork * num_items / std::max<int64_t>(1, total_work_));
    for_chunks(num_items, per_chunk, [this](int64_t item) {
      // The last tokens of a prompt have most to do, and come first.
      compute(pieces_[pieces_.size() - 1 - item / step_.num_kv_heads], item % step_.num_kv_heads);
    });
    if (split_.empty()) return;
    pool_->parallel_for(static_cast<int64_t>(split_.size()) * step_.num_kv_heads, [this](int64_t item) {
      add_up(split_[item / step_.num_kv_heads], item % step_.num_kv_heads);
    });
  }

 private:
  template <class F>
  void for_chunks(int64_t num_items, int64_t per_chunk, const F& f) {
    pool_->parallel_for(divided_up(num_items, per_chunk), [&](int64_t chunk) {
      const int64_t stop = std::min(num_items, (chunk + 1) * per_chunk);
      for (int64_t item = chunk * per_chunk; item < stop; ++item) f(item);
    });
  }

  const T* head_of(int64_t token, int64_t head) const {
    return heads_ + (token * step_.heads_per_token() + head) * step_.head_dim;
  }

  int64_t position_of(int64_t seq, int64_t token) const {
    return step_.seq_lens[seq] - step_.cu_seqlens_q[seq + 1] + token;
  }

  void rotate_head(T* y, int64_t token, int64_t head) const {
    const int64_t at = token * step_.head_dim;
    rotate(y, head_of(token, head), cos_ + at, sin_ + at, step_.head_dim);
  }

  // All tokens' keys and values are written before any query attends: sequences may share pages.
  void write_cache() {
    const int64_t per_token = step_.num_kv_heads * step_.head_dim;
    for_chunks(step_.num_tokens(), divided_up(kWriteChunk, per_token), [this](int64_t token) {
      const int64_t* const ends = step_.cu_seqlens_q + 1;
      const int64_t seq = std::upper_bound(ends, ends + step_.num_seqs, token) - ends;
      const std::unique_ptr<T[]> key(new T[step_.head_dim]);
      for (int64_t head = 0; head < step_.num_kv_heads; ++head) {
        rotate_head(key.get(), token, step_.num_heads + head);
        const T* const value = head_of(token, step_.num_heads + step_.num_kv_heads + head);
        cache_.write(seq, position_of(seq, token), head, key.get(), value);
      }
    });
  }

  void plan() {
    const int64_t most_tokens = std::max<int64_t>(1, kUnitRows / share_);
    for (int64_t seq = 0; seq < step_.num_seqs; ++seq) {
      const int64_t stop = step_.cu_seqlens_q[seq + 1];
      for (int64_t token = step_.cu_seqlens_q[seq]; token < stop; token += most_tokens) {
        const int64_t num_tokens = std::min(most_tokens, stop - token);
        Piece unit{seq, token, num_tokens, position_of(seq, token), 0, 0, -1};
        unit.last_segment = unit.num_segments();
        pieces_.push_back(unit);
        total_work_ += unit.work() * share_ * step_.num_kv_heads;
      }
    }
    if (pool_->num_threads() > 1) split_large_units();
  }

  // Cuts units that are so large that threads would wait for one.
  void split_large_units() {
    const int64_t most_work = total_work_ / (pool_->num_threads() * kPiecesPerThread);
    std::vector<Piece> pieces;
    for (const Piece& unit : pieces_) {
      const int64_t work = unit.work() * share_, segments = unit.num_segments();
      const int64_t per_piece = work > most_work ? divided_up(segments * std::max<int64_t>(1, most_work), work) : segments;
      if (per_piece >= segments) {
        pieces.push_back(unit);
        continue;
      }
      Piece piece = unit;
      piece.sums = num_sums_;
      num_sums_ += segments * Sums::size(unit.num_tokens * share_, stride_);
      split_.push_back(piece);
      for (int64_t segment = 0; segment < segments; segment += per_piece) {
        piece.first_segment = segment;
        piece.last_segment = std::min(segments, segment + per_piece);
        pieces.push_back(piece);
      }
    }
    pieces_ = std::move(pieces);
  }

  // The sums of one segment of a unit that was cut.
  Sums sums_of(const Piece& piece, int64_t head, int64_t segment) const {
    const int64_t num_rows = piece.num_tokens * share_, size = Sums::size(num_rows, stride_);
    const int64_t of_unit = piece.num_segments() * size;
    return Sums(sums_.get() + piece.sums * step_.num_kv_heads + head * of_unit + segment * size, num_rows, stride_);
  }

  void compute(const Piece& piece, int64_t head) const {
    const int64_t num_rows = piece.num_tokens * share_, size = Sums::size(num_rows, stride_);
    const std::unique_ptr<Operand[]> queries = rotated_queries(piece, head);
    const std::unique_ptr<T[]> gathered(cache_.has_whole_tiles() ? nullptr : new T[2 * kBlockKeys * step_.head_dim]);
    if (piece.sums >= 0) {
      for (int64_t segment = piece.first_segment; segment < piece.last_segment; ++segment) {
        attend_segment(sums_of(piece, head, segment), piece, head, segment, queries.get(), gathered.get());
      }
      return;
    }
    const std::unique_ptr<float[]> memory(new float[2 * size]);
    const Sums total(memory.get(), num_rows, stride_), of_segment(memory.get() + size, num_rows, stride_);
    total.clear(num_rows);
    for (int64_t segment = piece.first_segment; segment < piece.last_segment; ++segment) {
      attend_segment(of_segment, piece, head, segment, queries.get(), gathered.get());
      merge_segment(total, of_segment, piece, segment);
    }
    write_out(total, piece, head);
  }

  void add_up(const Piece& unit, int64_t head) const {
    const int64_t num_rows = unit.num_tokens * share_;
    const std::unique_ptr<float[]> memory(new float[Sums::size(num_rows, stride_)]);
    const Sums total(memory.get(), num_rows, stride_);
    total.clear(num_rows);
    for (int64_t segment = 0; segment < unit.num_segments(); ++segment) {
      merge_segment(total, sums_of(unit, head, segment), unit, segment);
    }
    write_out(total, unit, head);
  }

  // The first of a piece's tokens that sees a key at `position` at all.
  static int64_t first_token_seeing(const Piece& piece, int64_t position) {
    return std::clamp<int64_t>(position - piece.position, 0, piece.num_tokens);
  }

  void merge_segment(const Sums& total, const Sums& of_segment, const Piece& piece, int64_t segment) const {
    const int64_t row = first_token_seeing(piece, segment * kSegmentKeys) * share_;
    merge(total.from(row), of_segment.from(row), piece.num_tokens * share_ - row, scale_);
  }

  // Returns [num_tokens, share, head_dim].
  std::unique_ptr<Operand[]> rotated_queries(const Piece& piece, int64_t head) const {
    const int64_t size = step_.head_dim;
    std::unique_ptr<Operand[]> queries(new Operand[piece.num_tokens * share_ * size]);
    const std::unique_ptr<T[]> query(new T[size]);
    Operand* y = queries.get();
    for (int64_t token = 0; token < piece.num_tokens; ++token) {
      for (int64_t i = 0; i < share_; ++i, y += size) {
        rotate_head(query.get(), piece.token + token, head * share_ + i);
        for (int64_t k = 0; k < size; k += kLanes) store(y + k, load(query.get() + k, size - k), size - k);
      }
    }
    return queries;
  }

  void attend_segment(const Sums& sums, const Piece& piece, int64_t head, int64_t segment, const Operand* queries,
                      T* gathered) const {
    sums.clear(piece.num_tokens * share_);
    const int64_t num_keys = piece.position + piece.num_tokens;
    const int64_t stop = std::min(num_keys, (segment + 1) * kSegmentKeys);
    for (int64_t key = segment * kSegmentKeys; key < stop; key += kBlockKeys) {
      attend_to(sums, piece, key_block(piece.seq, key, num_keys, head, gathered), key, queries);
    }
  }

  // Lets all tokens attend to what they see of the block that begins at `key`.
  void attend_to(const Sums& sums, const Piece& piece, const KeyBlock<T>& block, int64_t key,
                 const Operand* queries) const {
    // Those that see a part come one by one; those that see all of it together.
    const int64_t all = first_token_seeing(piece, key + kBlockKeys - 1);
    for (int64_t token = first_token_seeing(piece, key); token < all; ++token) {
      attend_rows(sums, token * share_, share_, block, piece.position + token - key + 1, queries);
    }
    attend_rows(sums, all * share_, (piece.num_tokens - all) * share_, block, kBlockKeys, queries);
  }

  void attend_rows(const Sums& sums, int64_t row, int64_t num_rows, const KeyBlock<T>& block, int64_t num_keys,
                   const Operand* queries) const {
    attend_block<T>(sums.from(row), num_rows, queries + row * step_.head_dim, block, num_keys, step_.head_dim, scale_,
                    cache_.has_whole_tiles());
  }

  KeyBlock<T> key_block(int64_t seq, int64_t key, int64_t num_keys, int64_t head, T* gathered) const {
    KeyBlock<T> block;
    if (!cache_.has_whole_tiles()) {
      T* const values = gathered + kBlockKeys * step_.head_dim;
      cache_.gather(gathered, values, seq, key, head, std::min(kBlockKeys, num_keys - key));
      for (int tile = 0; tile < kBlockTiles; ++tile) {
        block.keys[tile] = block.next_keys[tile] = gathered + tile * kTileKeys * step_.head_dim;
        block.values[tile] = block.next_values[tile] = values + tile * kTileKeys * step_.head_dim;
      }
      return block;
    }
    for (int tile = 0; tile < kBlockTiles; ++tile) {
      const int64_t at = key + tile * kTileKeys, next = at + kBlockKeys;
      const int64_t here = at < num_keys ? at : key, ahead = next < num_keys ? next : here;
      block.keys[tile] = cache_.keys_at(seq, here, head);
      block.values[tile] = cache_.values_at(seq, here, head);
      block.next_keys[tile] = cache_.keys_at(seq, ahead, head);
      block.next_values[tile] = cache_.values_at(seq, ahead, head);
    }
    return block;
  }

  void write_out(const Sums& total, const Piece& piece, int64_t head) const {
    for (int64_t row = 0; row < piece.num_tokens * share_; ++row) {
      const int64_t token = piece.token + row / share_;
      T* const y = out_ + (token * step_.num_heads + head * share_ + row % share_) * step_.head_dim;
      const float* const value = total.value + row * stride_;
      const Vec weight = broadcast(total.weight[row]);
      for (int64_t i = 0; i < step_.head_dim; i += kLanes) store(y + i, div(load(value + i), weight), step_.head_dim - i);
    }
  }

  ThreadPool* const pool_;
  T* const out_;
  const T* const heads_;
  const T* const cos_;
  const T* const sin_;
  const AttentionStep& step_;
  const Cache<T> cache_;
  const int64_t share_;  // query heads that one KV head serves
  const int64_t stride_;
  const float scale_;
  int64_t total_work_ = 0;
  std::vector<Piece> pieces_;
  std::vector<Piece> split_;  // units that were cut into pieces
  int64_t num_sums_ = 0;  // floats a KV head
  std::unique_ptr<float[]> sums_;
};

}  // namespace

// out [num_tokens, num_heads, head_dim] = attention of one layer. heads: [num_tokens, num_heads + 2 num_kv_heads,
// head_dim], each token's queries, keys and values, not yet rotated; cos, sin: [num_tokens, head_dim]; keys, values: the
// layer's cache, see attention_cache.h.
EXPORT void ryz_paged_attention_f32(ThreadPool* pool, float* out, const float* heads, const float* cos, const float* sin,
                                    float* keys, float* values, const AttentionStep* step) {
  PagedAttention<float>(pool, out, heads, cos, sin, keys, values, *step).run();
}

EXPORT void ryz_paged_attention_bf16(ThreadPool* pool, bf16* out, const bf16* heads, const bf16* cos, const bf16* sin,
                                     bf16* keys, bf16* values, const AttentionStep* step) {
  PagedAttention<bf16>(pool, out, heads, cos, sin, keys, values, *step).run();
}
