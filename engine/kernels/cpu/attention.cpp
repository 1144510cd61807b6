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
#include "divide_up.h"
#include "export.h"
#include "rotary.h"
#include "thread_pool.h"

namespace {

constexpr int64_t kSegmentKeys = 512;  // a multiple of kBlockKeys; results depend on it
constexpr int64_t kUnitRows = 32;  // their sums and one block of keys and values lie in the first caches
constexpr int64_t kPiecesPerThread = 2;  // of a step's work, at least
constexpr int64_t kChunksPerThread = 8;  // of pieces, at most: what comes after the other is asked for ahead of time
constexpr int64_t kChunkWork = 4096;  // products of a row and a key, below which a thread is not worth waking
constexpr int64_t kWriteChunk = 8192;  // elements of keys, likewise

// A run of one sequence's query tokens, and the segments of keys that it attends to in this piece.
struct Piece {
  int64_t seq;
  int64_t token, num_tokens;  // of the step
  int64_t position;  // of the first token in its sequence
  int64_t first_segment, last_segment;
  int64_t sums;  // where those of its unit lie among all sums that are added up later; -1 if the piece is its whole unit

  int64_t num_segments() const { return divide_up(num_keys(), kSegmentKeys); }
  int64_t num_keys() const { return position + num_tokens; }
  int64_t work() const { return num_tokens * num_keys(); }
};

struct Item {
  const Piece* piece;
  int64_t head;  // a KV head
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
        stride_(divide_up(step.head_dim, kLanes) * kLanes),
        scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(step.head_dim)))) {}

  void run() {
    write_cache();
    plan();
    const int64_t num_items = static_cast<int64_t>(pieces_.size()) * step_.num_kv_heads;
    if (num_items == 0) return;
    sums_.reset(new float[num_sums_ * step_.num_kv_heads]);
    const int64_t for_little_work = kChunkWork * num_items / std::max<int64_t>(1, total_work_);
    const int64_t for_many_items = num_items / (pool_->num_threads() * kChunksPerThread);
    for_chunks(num_items, std::max<int64_t>({1, for_little_work, for_many_items}), [this](int64_t item, int64_t stop) {
      compute(item_at(item), item + 1 < stop ? item_at(item + 1) : item_at(item));
    });
    if (split_.empty()) return;
    pool_->parallel_for(static_cast<int64_t>(split_.size()) * step_.num_kv_heads, [this](int64_t item) {
      add_up(split_[item / step_.num_kv_heads], item % step_.num_kv_heads);
    });
  }

 private:
  template <class F>
  void for_chunks(int64_t num_items, int64_t per_chunk, const F& f) {
    pool_->parallel_for(divide_up(num_items, per_chunk), [&](int64_t chunk) {
      const int64_t stop = std::min(num_items, (chunk + 1) * per_chunk);
      for (int64_t item = chunk * per_chunk; item < stop; ++item) f(item, stop);
    });
  }

  // What a thread does in one go. The last tokens of a prompt have most to do, and come first.
  Item item_at(int64_t index) const {
    return {&pieces_[pieces_.size() - 1 - index / step_.num_kv_heads], index % step_.num_kv_heads};
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
    for_chunks(step_.num_tokens(), divide_up(kWriteChunk, per_token), [this](int64_t token, int64_t) {
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
      const int64_t per_piece = work > most_work ? divide_up(segments * std::max<int64_t>(1, most_work), work) : segments;
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

  // next: what this thread does then.
  void compute(const Item& item, const Item& next) const {
    const Piece& piece = *item.piece;
    const int64_t num_rows = piece.num_tokens * share_, size = Sums::size(num_rows, stride_);
    const bool is_whole = piece.sums < 0;
    const std::unique_ptr<float[]> memory(is_whole ? new float[2 * size] : nullptr);
    const int64_t num_gathered = cache_.has_whole_tiles() ? 0 : 2 * kBlockKeys * step_.head_dim;
    const Walk walk{item, next, rotated_queries(piece, item.head), std::unique_ptr<T[]>(new T[num_gathered])};
    const Sums total(memory.get(), num_rows, stride_), of_segment(memory.get() + size, num_rows, stride_);
    if (is_whole) total.clear(num_rows);
    for (int64_t segment = piece.first_segment; segment < piece.last_segment; ++segment) {
      if (is_whole) {
        attend_segment(of_segment, walk, segment);
        merge_segment(total, of_segment, piece, segment);
      } else {
        attend_segment(sums_of(piece, item.head, segment), walk, segment);
      }
    }
    if (is_whole) write_out(total, piece, item.head);
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

  // The way of one item over its keys.
  struct Walk {
    Item item, next;
    std::unique_ptr<Operand[]> queries;
    std::unique_ptr<T[]> gathered;  // one block, where pages have no whole tiles
  };

  void attend_segment(const Sums& sums, const Walk& walk, int64_t segment) const {
    const Piece& piece = *walk.item.piece;
    sums.clear(piece.num_tokens * share_);
    const int64_t stop = std::min(piece.num_keys(), (segment + 1) * kSegmentKeys);
    for (int64_t key = segment * kSegmentKeys; key < stop; key += kBlockKeys) {
      attend_to(sums, piece, cache_.has_whole_tiles() ? blocks_at(walk, key) : gathered_block(walk, key), key,
                walk.queries.get());
    }
  }

  KeyBlock<T> blocks_at(const Walk& walk, int64_t key) const {
    const Piece& piece = *walk.item.piece;
    const int64_t ahead = key + kBlockKeys, stop = std::min(piece.num_keys(), piece.last_segment * kSegmentKeys);
    const Item& item = ahead < stop ? walk.item : walk.next;
    return {tiles_at(walk.item, key), tiles_at(item, ahead < stop ? ahead : item.piece->first_segment * kSegmentKeys)};
  }

  Tiles<T> tiles_at(const Item& item, int64_t key) const {
    Tiles<T> tiles;
    for (int tile = 0; tile < kBlockTiles; ++tile) {
      const int64_t at = key + tile * kTileKeys;
      const int64_t offset = cache_.tile_at(item.piece->seq, at < item.piece->num_keys() ? at : key, item.head);
      tiles.keys[tile] = cache_.keys() + offset;
      tiles.values[tile] = cache_.values() + offset;
    }
    return tiles;
  }

  KeyBlock<T> gathered_block(const Walk& walk, int64_t key) const {
    const Piece& piece = *walk.item.piece;
    T* const keys = walk.gathered.get();
    T* const values = keys + kBlockKeys * step_.head_dim;
    cache_.gather(keys, values, piece.seq, key, walk.item.head, std::min(kBlockKeys, piece.num_keys() - key));
    Tiles<T> tiles;
    for (int tile = 0; tile < kBlockTiles; ++tile) {
      tiles.keys[tile] = keys + tile * kTileKeys * step_.head_dim;
      tiles.values[tile] = values + tile * kTileKeys * step_.head_dim;
    }
    return {tiles, tiles};
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
