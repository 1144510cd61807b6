// y = x w^T + b on row-major weights [out_features, in_features], as they lie in the file.
//
// Weights are read once for a block of tokens, in the order of memory: a tile of outputs (linear_tile.h) takes a few
// rows at a time, passes over them once for each few tokens, and meanwhile the rows that come next are fetched. Tokens
// are copied beforehand into the order in which tiles read them, a block at a time that stays in the second-level
// cache; each thread does that for itself, which is cheaper than waiting for one another.
#include "linear_tile.h"

#include <algorithm>

#include "export.h"
#include "thread_pool.h"
#include "weight_stream.h"

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kTokens = 4;  // of the largest tile: 24 of 32 registers are accumulators
#else
constexpr int kRows = 3, kTokens = 4;  // 12 of 16
#endif
constexpr int64_t kAloneBytes = 64 << 10;   // below it, of all tokens' work: the calling thread computes alone

thread_local Scratch scratch;

template <class T, class Y>
class Linear {
  using A = Arithmetic<T>;
  using Packed = typename A::Tokens;

 public:
  Linear(Y* y, const T* x, const T* w, const T* bias, int64_t num_tokens, int64_t out_features, int64_t in_features)
      : y_(y), x_(x), w_(w), bias_(bias), num_tokens_(num_tokens), out_features_(out_features),
        in_features_(in_features), num_steps_(divide_up(in_features, A::kStep)) {
    const int64_t token_bytes = std::max<int64_t>(1, num_steps_ * sizeof(Packed));
    block_tokens_ = std::max<int64_t>(1, kBlockBytes / token_bytes / kTokens) * kTokens;
    const int64_t row_bytes = std::max<int64_t>(1, in_features * sizeof(T));
    chunk_rows_ = std::max<int64_t>(1, kChunkBytes / row_bytes / kRows) * kRows;
    if (num_tokens * out_features * row_bytes <= kAloneBytes) chunk_rows_ = out_features;
    num_row_chunks_ = chunk_rows_ == 0 ? 0 : divide_up(out_features, chunk_rows_);
    num_chunks_ = num_row_chunks_ * divide_up(num_tokens, block_tokens_);
  }

  void run(ThreadPool* pool) {
    Ranges ranges(*pool, num_chunks_);
    pool->parallel_for(ranges.size(), [&](int64_t range) { work(ranges, range); });
  }

 private:
  void work(Ranges& ranges, int64_t own_range) {
    const Packed* packed = nullptr;
    int64_t packed_block = -1;
    ranges.claim(own_range, [&](int64_t chunk) {
      const int64_t block = chunk / num_row_chunks_;
      const int64_t first_token = block * block_tokens_;
      const int64_t num_tokens = std::min(block_tokens_, num_tokens_ - first_token);
      if (block != packed_block) packed = pack(first_token, num_tokens);
      packed_block = block;
      compute(packed, chunk % num_row_chunks_, first_token, num_tokens);
    });
  }

  // Copies a block of tokens into the order in which tiles read them.
  const Packed* pack(int64_t first_token, int64_t num_tokens) const {
    auto* const packed = static_cast<Packed*>(scratch.reserve(num_tokens * num_steps_ * sizeof(Packed)));
    Packed* out = packed;
    for (int64_t token = 0; token < num_tokens; token += kTokens) {
      const int64_t width = std::min<int64_t>(kTokens, num_tokens - token);
      const T* const x = x_ + (first_token + token) * in_features_;
      for (int64_t k = 0; k < in_features_; k += A::kStep) {
        for (int64_t t = 0; t < width; ++t) *out++ = A::load_tokens(x + t * in_features_ + k, in_features_ - k);
      }
    }
    return packed;
  }

  void compute(const Packed* packed, int64_t chunk, int64_t first_token, int64_t num_tokens) {
    // One row at a time is the fastest where there is next to nothing to compute.
    const int64_t most_rows = num_tokens <= 2 ? 1 : kRows;
    const int64_t stop = std::min(out_features_, (chunk + 1) * chunk_rows_);
    int64_t row = chunk * chunk_rows_;
    if (most_rows == kRows) {
      for (; row + kRows <= stop; row += kRows) compute_rows<kRows>(packed, row, first_token, num_tokens);
    }
    for (; row < stop; ++row) compute_rows<1>(packed, row, first_token, num_tokens);
  }

  // Passes over R rows once for each few tokens. Meanwhile the rows that follow are fetched, as many lines in each pass
  // as in any other; what follows these, pages and all, is asked for once before, since a fetch of a page that the
  // processor has to look up is dropped when it is busy.
  template <int R>
  void compute_rows(const Packed* packed, int64_t row, int64_t first_token, int64_t num_tokens) {
    const int64_t num_passes = divide_up(num_tokens, kTokens);
    const int64_t num_lines = R * A::kStep * sizeof(T) / kLineBytes;  // of a step of R rows
    const int64_t num_bytes = std::max<int64_t>(1, R * in_features_ * sizeof(T));
    const char* const w = reinterpret_cast<const char*>(w_ + row * in_features_);
    const char* const end = reinterpret_cast<const char*>(w_ + out_features_ * in_features_);
    const char* fetch = w + divide_up(kAheadBytes, num_bytes) * num_bytes;
    int64_t lines_left = num_lines;
    for (int64_t pass = 0; pass < num_passes; ++pass) {
      const int64_t lines = std::min(lines_left, divide_up(num_lines, num_passes));
      const int64_t bytes = lines * num_steps_ * kLineBytes;
      touch_pages(fetch + num_bytes, std::min(fetch + num_bytes + bytes, end), num_passes > 1);
      const Fetch fetched{fetch, static_cast<int>(lines), num_passes > 1 ? num_bytes : 0};
      const Packed* const x = packed + pass * kTokens * num_steps_;
      const int64_t token = first_token + pass * kTokens;
      switch (std::min<int64_t>(kTokens, num_tokens - pass * kTokens)) {
        case 1: compute_tile<R, 1>(x, row, token, fetched); break;
        case 2: compute_tile<R, 2>(x, row, token, fetched); break;
        case 3: compute_tile<R, 3>(x, row, token, fetched); break;
        default: compute_tile<R, kTokens>(x, row, token, fetched);
      }
      lines_left -= lines;
      fetch += bytes;
    }
  }

  template <int R, int N>
  void compute_tile(const Packed* x, int64_t row, int64_t token, Fetch fetch) {
    float sums[N * R + kLanes];  // a vector can be loaded from each
    tile<T, R, N>(sums, w_ + row * in_features_, in_features_, x, in_features_, fetch);
    for (int t = 0; t < N; ++t) {
      Vec sum = load(sums + t * R, R);
      if (bias_ != nullptr) sum = add(sum, load(bias_ + row, R));
      store(y_ + (token + t) * out_features_ + row, sum, R);
    }
  }

  Y* const y_;
  const T* const x_;
  const T* const w_;
  const T* const bias_;
  const int64_t num_tokens_, out_features_, in_features_, num_steps_;
  int64_t block_tokens_, chunk_rows_, num_row_chunks_, num_chunks_;
};

template <class T, class Y>
void linear(ThreadPool* pool, Y* y, const T* x, const T* w, const T* bias, int64_t num_tokens, int64_t out_features,
            int64_t in_features) {
  Linear<T, Y>(y, x, w, bias, num_tokens, out_features, in_features).run(pool);
}

}  // namespace

// y [num_tokens, out_features], x [num_tokens, in_features], w [out_features, in_features], bias [out_features] or
// null. _f32 at the end: y is float32.
EXPORT void ryz_linear_f32(ThreadPool* pool, float* y, const float* x, const float* w, const float* bias,
                           int64_t num_tokens, int64_t out_features, int64_t in_features) {
  linear(pool, y, x, w, bias, num_tokens, out_features, in_features);
}

EXPORT void ryz_linear_bf16(ThreadPool* pool, bf16* y, const bf16* x, const bf16* w, const bf16* bias,
                            int64_t num_tokens, int64_t out_features, int64_t in_features) {
  linear(pool, y, x, w, bias, num_tokens, out_features, in_features);
}

EXPORT void ryz_linear_bf16_f32(ThreadPool* pool, float* y, const bf16* x, const bf16* w, const bf16* bias,
                                int64_t num_tokens, int64_t out_features, int64_t in_features) {
  linear(pool, y, x, w, bias, num_tokens, out_features, in_features);
}
