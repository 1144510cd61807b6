// The next token of each row of logits: engine/sampling/sampler.py has the definition, and gives the same tokens.
//
// A row is read as stripes of vectors. One pass finds the maximum of each lane of each stripe; what follows reads only the
// stripes that can matter. Filters end as one key, that of the last token they keep: a token's key has its distance from
// the largest score above its id, so that keys rise as tokens become less likely, the lower id first among equals. The
// last pass draws from the tokens up to that key.
//
// Sums are of integers, and everything else is a maximum: no result depends on how a row is cut, or on the threads.
#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "divide_up.h"
#include "export.h"
#include "sampling_noise.h"
#include "simd.h"
#include "thread_pool.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kNotFinite = -1, kAllExcluded = -2;  // instead of a token
constexpr int64_t kGroups = 1024;                      // lanes of stripes: how many maxima a row has, at most
constexpr int64_t kFewTokens = 512;                    // kept by most filters
constexpr uint64_t kNoKey = ~UINT64_C(0);               // every key is up to this one
constexpr size_t kFewToSort = 64;
constexpr float kMassless = -30.0f;                    // scores below have no mass: 2^42 exp(-30) < 1
constexpr float kMostMass = -10.0f;                    // of most rows lies above this score
constexpr float kBucketsPerUnit = 64;                  // of the score, in histograms of mass
constexpr int64_t kBuckets = 2048;                     // down to a score of -32

// How a row is sampled, as the caller packs it.
struct Params {
  NoiseSource noise;
  int64_t top_k;      // at least 1; the vocabulary's size keeps all
  double top_p;       // at most 1
  float temperature;  // 0: greedy
  float floor;        // scores below are excluded
};

struct Candidate {
  uint64_t key;
  uint64_t mass;
};

inline uint64_t make_key(float score, int64_t token) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return static_cast<uint64_t>(bits & 0x7FFFFFFF) << 32 | static_cast<uint64_t>(token);  // no score is above 0
}

inline float score_of(uint64_t key) {
  const uint32_t bits = static_cast<uint32_t>(key >> 32) | 0x80000000;
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// exp(score) in units of 2^-42, operation for operation as in sampler.py: 2^n times 8 terms of a series.
inline void masses(uint64_t* mass, Vec score) {
  score = max(score, broadcast(-40.0f));
  const Vec n = round_to_even(mul(score, broadcast(0x1.715476p+0f)));
  const Vec r = sub(sub(score, mul(n, broadcast(0.693359375f))), mul(n, broadcast(-0x1.bd0106p-13f)));
  Vec sum = broadcast(1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = add(mul(sum, r), broadcast(factor));
  }
  int32_t fixed[kLanes], shift[kLanes];
  store_as_int(fixed, mul(sum, broadcast(0x1p24f)));  // exact: sum is above 1/2
  store_as_int(shift, sub(zero(), n));
  for (int lane = 0; lane < kLanes; ++lane) mass[lane] = static_cast<uint64_t>(fixed[lane]) << 18 >> shift[lane];
}

// A row, and what is found out about it. `Part`s are runs of its stripes.
class Row {
 public:
  void begin(const float* logits, int64_t vocab_size, const Params& params, int64_t num_parts) {
    logits_ = logits;
    vocab_size_ = vocab_size;
    params_ = &params;
    const int64_t num_vectors = divide_up(vocab_size, kLanes);
    const int64_t most_stripes = kGroups / kLanes;
    stripe_size_ = divide_up(num_vectors, most_stripes) * kLanes;
    stripe_size_ += stripe_size_ % kBlock;  // whole blocks
    num_stripes_ = divide_up(vocab_size, stripe_size_);
    maxima_.resize(num_stripes_ * kLanes);
    parts_.resize(num_parts);
  }

  // --- the phases, each of which needs all parts of the one before -----------------------------------------------------

  void find_maxima(int64_t part) {
    Part& own = parts_[part];
    uint32_t nan = 0;
    for (int64_t stripe = first_stripe(part); stripe < first_stripe(part + 1); ++stripe) {
      Vec maximum = broadcast(-kInfinity);
      for (int64_t i = stripe * stripe_size_; i < stripe_end(stripe); i += kLanes) {
        const Vec x = logits_at(i);
        nan |= is_nan(x);
        maximum = max(x, maximum);
      }
      store(&maxima_[stripe * kLanes], maximum);
    }
    own.has_nan = nan != 0;
  }

  void find_maximum() {
    maximum_ = -kInfinity;
    for (const float value : maxima_) maximum_ = std::max(maximum_, value);
    bool has_nan = false;
    for (const Part& part : parts_) has_nan |= part.has_nan;
    if (has_nan || maximum_ == kInfinity) {
      token_ = kNotFinite;
    } else if (maximum_ == -kInfinity) {
      token_ = kAllExcluded;
    } else {
      token_ = first_of_largest();
    }
    is_drawn_ = token_ >= 0 && params_->temperature > 0;
    if (!is_drawn_) return;
    noise_.emplace(params_->noise);
    bound_ = token_noise(*noise_, token_);  // its score is 0: what wins is at least this
    cutoff_ = kMostMass;
    if (has_top_k()) cutoff_ = std::max(params_->floor, score_of_rank(std::min(params_->top_k, kFewTokens)));
  }

  // Where only top_p filters: adds up the mass of all tokens, by score from the cutoff on.
  void weigh(int64_t part) {
    if (has_only_top_p()) weigh(parts_[part], first_stripe(part), first_stripe(part + 1));
  }

  // Narrows what is to be collected to the bucket in which the mass reaches top_p.
  void find_bucket() {
    if (!has_only_top_p() || find_bucket_from_cutoff()) return;
    cutoff_ = kMassless;
    for (Part& part : parts_) part = Part();
    weigh(parts_[0], 0, num_stripes_);
    find_bucket_from_cutoff();
  }

  void collect(int64_t part) {
    if (is_drawn_ && is_ranked()) collect(parts_[part], first_stripe(part), first_stripe(part + 1));
  }

  void find_last_kept() {
    if (!is_drawn_) return;
    if (is_ranked() && !find_last_kept_of_collected()) {
      cutoff_ = -kInfinity;
      collect(parts_[0], 0, num_stripes_);
      find_last_kept_of_collected();
    }
    last_kept_score_ = std::max(params_->floor, last_kept_ == kNoKey ? -kInfinity : score_of(last_kept_));
    // Scores are compared as products first, which are off by their last bits.
    least_rough_score_ = last_kept_score_ * 1.000001f - 1e-30f;
    rough_factor_ = 1.0f / params_->temperature;
  }

  void draw(int64_t part) {
    if (!is_drawn_) return;
    Part& own = parts_[part];
    own.best = bound_;
    own.token = -1;
    for (int64_t stripe = first_stripe(part); stripe < first_stripe(part + 1); ++stripe) {
      const float most = score(max_of_lanes(load(&maxima_[stripe * kLanes])));
      if (most < least_rough_score_ || most + kLargestNoise < own.best) continue;
      for (int64_t i = stripe * stripe_size_; i < stripe_end(stripe); i += kBlock) draw_block(own, i);
    }
  }

  int64_t token() const {
    if (!is_drawn_) return token_;
    const Part* winner = nullptr;
    for (const Part& part : parts_) {
      if (part.token >= 0 && (winner == nullptr || part.best > winner->best)) winner = &part;
    }
    return winner->token;
  }

 private:
  struct Part {
    bool has_nan = false;
    std::vector<uint64_t> histogram;    // mass by bucket
    uint64_t mass_below = 0;            // of tokens below the cutoff that are not in the histogram
    std::vector<Candidate> candidates;  // by rising id
    float best = 0;
    int64_t token = -1;
  };

  int64_t first_stripe(int64_t part) const { return num_stripes_ * part / static_cast<int64_t>(parts_.size()); }
  int64_t stripe_end(int64_t stripe) const { return std::min(vocab_size_, (stripe + 1) * stripe_size_); }
  bool is_ranked() const { return has_top_k() || params_->top_p < 1; }
  bool has_top_k() const { return params_->top_k < vocab_size_; }
  bool has_only_top_p() const { return is_drawn_ && !has_top_k() && params_->top_p < 1; }

  // The logits i : i + kLanes, with -inf beyond the vocabulary.
  Vec logits_at(int64_t i) const {
    if (i + kLanes <= vocab_size_) return load(logits_ + i);
    float some[kLanes];
    std::fill(some, some + kLanes, -kInfinity);
    if (i < vocab_size_) std::memcpy(some, logits_ + i, (vocab_size_ - i) * sizeof(float));
    return load(some);
  }

  float score(float logit) const {
    const float value = (logit - maximum_) / params_->temperature;
    return value >= params_->floor ? value : -kInfinity;
  }
  Vec scores_at(int64_t i) const {
    const Vec value = div(sub(logits_at(i), broadcast(maximum_)), broadcast(params_->temperature));
    return select_at_least(value, broadcast(params_->floor), broadcast(-kInfinity));
  }

  Vec rough_scores_at(int64_t i) const {
    return mul(sub(logits_at(i), broadcast(maximum_)), broadcast(rough_factor_));
  }

  // The lowest id of the largest score, which every filter keeps, or of the largest logit where there are no scores. The
  // two differ where a logit is so near the largest that its score is 0.
  int64_t first_of_largest() const {
    const bool has_scores = params_->temperature > 0;
    for (int64_t stripe = 0;; ++stripe) {
      const float most = max_of_lanes(load(&maxima_[stripe * kLanes]));
      if (has_scores ? score(most) < 0 : most < maximum_) continue;
      for (int64_t i = stripe * stripe_size_;; i += kLanes) {
        const uint32_t found =
            has_scores ? at_least(scores_at(i), zero()) : at_least(logits_at(i), broadcast(maximum_));
        if (found != 0) return i + __builtin_ctz(found);
      }
    }
  }

  // A score that at least `rank` tokens reach, and not many more: that of the maxima of so many groups.
  float score_of_rank(int64_t rank) const {
    if (rank > static_cast<int64_t>(maxima_.size())) return -kInfinity;
    std::vector<float> maxima = maxima_;
    std::nth_element(maxima.begin(), maxima.begin() + (rank - 1), maxima.end(), std::greater<float>());
    return score(maxima[rank - 1]);
  }

  void weigh(Part& part, int64_t begin, int64_t end) const {
    part.histogram.resize(kBuckets);
    for (int64_t stripe = begin; stripe < end; ++stripe) {
      if (score(max_of_lanes(load(&maxima_[stripe * kLanes]))) < kMassless) continue;
      for (int64_t i = stripe * stripe_size_; i < stripe_end(stripe); i += kLanes) weigh_vector(part, scores_at(i));
    }
  }

  void weigh_vector(Part& part, Vec scores) const {
    uint64_t mass[kLanes];
    masses(mass, scores);
    if (at_least(scores, broadcast(cutoff_)) == 0) {
      for (const uint64_t of_token : mass) part.mass_below += of_token;
      return;
    }
    int32_t bucket[kLanes];
    store_truncated(bucket, mul(max(scores, broadcast(kMassless)), broadcast(-kBucketsPerUnit)));
    for (int lane = 0; lane < kLanes; ++lane) part.histogram[bucket[lane]] += mass[lane];
  }

  // Returns false where the bucket may lie below the cutoff.
  bool find_bucket_from_cutoff() {
    uint64_t histogram[kBuckets] = {}, mass = 0;
    mass_before_ = 0;
    for (const Part& part : parts_) {
      mass += part.mass_below;
      for (size_t bucket = 0; bucket < part.histogram.size(); ++bucket) histogram[bucket] += part.histogram[bucket];
    }
    for (const uint64_t of_bucket : histogram) mass += of_bucket;
    goal_ = static_cast<double>(mass) * params_->top_p;
    const int bucket = bucket_that_reaches(histogram, goal_, mass_before_);
    const float least = static_cast<float>(-1 - bucket) / kBucketsPerUnit;
    if (least < cutoff_ && cutoff_ > kMassless) return false;
    cutoff_ = std::nextafter(least, 0.0f);
    ceiling_ = least + 1 / kBucketsPerUnit;
    return true;
  }

  // Collects the tokens with scores from the cutoff to the ceiling.
  void collect(Part& part, int64_t begin, int64_t end) const {
    for (int64_t stripe = begin; stripe < end; ++stripe) {
      if (score(max_of_lanes(load(&maxima_[stripe * kLanes]))) < cutoff_) continue;
      for (int64_t i = stripe * stripe_size_; i < stripe_end(stripe); i += kLanes) collect_vector(part, i);
    }
  }

  void collect_vector(Part& part, int64_t i) const {
    const Vec scores = scores_at(i);
    uint32_t found = at_least(scores, broadcast(cutoff_)) & at_least(broadcast(ceiling_), scores);
    if (i + kLanes > vocab_size_) found &= (1u << (vocab_size_ - i)) - 1;
    if (found == 0) return;
    uint64_t mass[kLanes];
    masses(mass, scores);
    float some[kLanes];
    store(some, scores);
    for (; found != 0; found &= found - 1) {
      const int lane = __builtin_ctz(found);
      part.candidates.push_back({make_key(some[lane], i + lane), mass[lane]});
    }
  }

  // Returns false where a token that was not collected may be kept.
  bool find_last_kept_of_collected() {
    std::vector<Candidate> candidates;
    for (Part& part : parts_) {
      candidates.insert(candidates.end(), part.candidates.begin(), part.candidates.end());
      part.candidates.clear();
    }
    const auto mass_of = [](const Candidate& candidate) { return candidate.mass; };
    if (!has_top_k()) {
      last_kept_ = key_that_reaches(std::move(candidates), mass_of, goal_, mass_before_);
      return true;
    }
    if (static_cast<int64_t>(candidates.size()) < params_->top_k && cutoff_ > params_->floor) return false;
    last_kept_ = key_that_reaches(candidates, [](const Candidate&) { return 1; }, static_cast<double>(params_->top_k));
    if (params_->top_p < 1) {
      keep_if(candidates, [this](const Candidate& candidate) { return candidate.key <= last_kept_; });
      uint64_t mass = 0;
      for (const Candidate& candidate : candidates) mass += candidate.mass;
      const double goal = static_cast<double>(mass) * params_->top_p;
      last_kept_ = key_that_reaches(std::move(candidates), mass_of, goal);
    }
    return true;
  }

  // The first bucket up to which the weights add up to the goal, or the last that is not empty; adds to `before` what
  // lies before it.
  static int bucket_that_reaches(const uint64_t* histogram, double goal, uint64_t& before) {
    int bucket = 0, last = kBuckets - 1;
    while (last > 0 && histogram[last] == 0) --last;
    const auto is_too_early = [&] {
      return histogram[bucket] == 0 || static_cast<double>(before + histogram[bucket]) < goal;
    };
    while (bucket < last && is_too_early()) before += histogram[bucket++];
    return bucket;
  }

  // The first key, in rising order, up to which the weights of the candidates, and what lies before them, add up to the
  // goal; else the last.
  template <class Weight>
  static uint64_t key_that_reaches(std::vector<Candidate> candidates, const Weight& weight, double goal,
                                   uint64_t before = 0) {
    for (const int shift : {52, 41, 32}) {  // of scores whose last 20, 9 and 0 bits are left out
      if (candidates.size() <= kFewToSort) break;
      uint64_t histogram[kBuckets] = {};
      const auto digit = [=](const Candidate& candidate) { return static_cast<int>(candidate.key >> shift & (kBuckets - 1)); };
      for (const Candidate& candidate : candidates) histogram[digit(candidate)] += weight(candidate);
      const int bucket = bucket_that_reaches(histogram, goal, before);
      keep_if(candidates, [=](const Candidate& candidate) { return digit(candidate) == bucket; });
    }
    std::sort(candidates.begin(), candidates.end(),
              [](const Candidate& a, const Candidate& b) { return a.key < b.key; });
    for (const Candidate& candidate : candidates) {
      before += weight(candidate);
      if (static_cast<double>(before) >= goal) return candidate.key;
    }
    return candidates.back().key;
  }

  template <class Condition>
  static void keep_if(std::vector<Candidate>& candidates, const Condition& condition) {
    const auto is_dropped = [&](const Candidate& candidate) { return !condition(candidate); };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), is_dropped), candidates.end());
  }

  void draw_block(Part& part, int64_t i) const {
    Vec scores[2] = {rough_scores_at(i), rough_scores_at(i + kLanes)};
    const Vec least = broadcast(std::max(least_rough_score_, part.best - kLargestNoise));
    if ((at_least(scores[0], least) | at_least(scores[1], least)) == 0) return;
    uint32_t words[kBlock];
    noise_words(words, *noise_, i);
    for (int half = 0; half < 2; ++half) {
      uint32_t found = at_least(add(scores[half], noise_bound(words + half * kLanes)), broadcast(part.best));
      for (; found != 0; found &= found - 1) {
        const int lane = half * kLanes + __builtin_ctz(found);
        if (i + lane < vocab_size_) consider(part, i + lane, words[lane]);
      }
    }
  }

  void consider(Part& part, int64_t token, uint32_t word) const {
    const float own = score(logits_[token]);
    if (make_key(own, token) > last_kept_) return;
    const float value = own + to_gumbel(word);
    if (value > part.best || (value == part.best && part.token < 0)) {
      part.best = value;
      part.token = token;
    }
  }

  const float* logits_ = nullptr;
  int64_t vocab_size_ = 0;
  const Params* params_ = nullptr;
  int64_t stripe_size_ = 0, num_stripes_ = 0;
  std::vector<float> maxima_;  // [num_stripes, kLanes]
  std::vector<Part> parts_;
  float maximum_ = 0;
  int64_t token_ = 0;  // the lowest id of the largest score, or why there is none
  bool is_drawn_ = false;
  std::optional<Noise> noise_;
  float bound_ = 0;
  float cutoff_ = 0, ceiling_ = 0;  // scores that are collected
  double goal_ = 0;                 // of the mass, where only top_p filters …
  uint64_t mass_before_ = 0;        // … and what lies above the ceiling
  uint64_t last_kept_ = kNoKey;
  float last_kept_score_ = 0, least_rough_score_ = 0, rough_factor_ = 0;
};

// Calls a phase for each part of each row: one row after the other where that keeps the threads busy, because a row stays
// in a core's cache, and otherwise phase after phase.
void sample(ThreadPool* pool, int64_t* tokens, const float* logits, int64_t row_stride, const Params* params,
            int64_t num_rows, int64_t vocab_size) {
  const int64_t num_threads = pool->num_threads();
  const bool rows_alone = num_rows >= 2 * num_threads || num_threads == 1;
  const int64_t num_parts = rows_alone ? 1 : 4 * num_threads;
  std::vector<Row> rows(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) rows[r].begin(logits + r * row_stride, vocab_size, params[r], num_parts);
  if (rows_alone) {
    pool->parallel_for(num_rows, [&](int64_t r) {
      rows[r].find_maxima(0);
      rows[r].find_maximum();
      rows[r].weigh(0);
      rows[r].find_bucket();
      rows[r].collect(0);
      rows[r].find_last_kept();
      rows[r].draw(0);
    });
  } else {
    const auto of_parts = [&](auto phase) {
      pool->parallel_for(num_rows * num_parts, [&](int64_t i) { (rows[i / num_parts].*phase)(i % num_parts); });
    };
    const auto of_rows = [&](auto phase) { pool->parallel_for(num_rows, [&](int64_t r) { (rows[r].*phase)(); }); };
    of_parts(&Row::find_maxima);
    of_rows(&Row::find_maximum);
    of_parts(static_cast<void (Row::*)(int64_t)>(&Row::weigh));
    of_rows(&Row::find_bucket);
    of_parts(static_cast<void (Row::*)(int64_t)>(&Row::collect));
    of_rows(&Row::find_last_kept);
    of_parts(&Row::draw);
  }
  for (int64_t r = 0; r < num_rows; ++r) tokens[r] = rows[r].token();
}

}  // namespace

// tokens [num_rows]: the next token of each row, or -1 where the logits hold NaN or infinity, -2 where all are -inf.
// logits: num_rows rows of vocab_size, each row_stride after the one before. params [num_rows].
EXPORT void ryz_sample(ThreadPool* pool, int64_t* tokens, const float* logits, int64_t row_stride, const Params* params,
                       int64_t num_rows, int64_t vocab_size) {
  sample(pool, tokens, logits, row_stride, params, num_rows, vocab_size);
}
