#include "collectives_group.h"

#include <poll.h>

#include <algorithm>

#include "futex.h"

namespace {

constexpr int64_t kLookNs = 20'000'000;  // between two looks at whether those who are waited for still live

enum WritingState : uint32_t { kUnwritten, kBeingWritten, kWritten };

}  // namespace

SharedGroup::SharedGroup(char* segment, int rank, int size, int64_t slot_bytes, int64_t spin_ns, int64_t timeout_ns,
                         const int* pidfds)
    : header_(reinterpret_cast<Header*>(segment)),
      slots_(segment + kHeaderBytes),
      rank_(rank),
      size_(size),
      slot_bytes_(slot_bytes),
      spin_ns_(spin_ns),
      timeout_ns_(timeout_ns),
      pidfds_(pidfds, pidfds + size) {}

bool SharedGroup::begin(uint64_t tag) {
  if (has_failed_) return false;
  if (!await_all()) return false;
  ++round_;
  tag_ = tag;
  header_->places[rank_].tags[round_ & 1].store(tag, std::memory_order_relaxed);
  return true;
}

void SharedGroup::come() {
  std::atomic<uint32_t>& word = header_->places[rank_].round;
  word.store(round_, std::memory_order_seq_cst);  // publishes the slot and the tag
  if (header_->sleepers[rank_].count.load(std::memory_order_seq_cst) > 0) futex_wake_all(word, true);
}

bool SharedGroup::await(int other) { return await(other, round_, tag_); }

bool SharedGroup::await_all() {
  for (int other = 0; other < size_; ++other) {
    if (other != rank_ && !await(other)) return false;
  }
  return true;
}

bool SharedGroup::await(int other, uint32_t round, uint64_t tag) {
  const auto is_there = [&] { return has_come(other, round); };
  if (!is_there()) {
    const int64_t began = now_ns();
    const bool came = spin_until(is_there, spin_ns_) || sleep_until_come(other, round, tag);
    waited_ns_ += now_ns() - began;
    if (!came) return false;
  }
  const uint64_t other_tag = header_->places[other].tags[round & 1].load(std::memory_order_relaxed);
  return other_tag == tag || fail(kMismatch, UINT64_C(1) << other, tag, other_tag, 0);
}

bool SharedGroup::sleep_until_come(int other, uint32_t round, uint64_t tag) {
  const std::atomic<uint32_t>& word = header_->places[other].round;
  std::atomic<uint32_t>& sleepers = header_->sleepers[other].count;
  const int64_t began = now_ns();
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t seen = word.load(std::memory_order_seq_cst);
    if (has_come(other, round)) break;
    const int64_t waited = now_ns() - began;
    if (is_hopeless(round, tag, waited)) break;
    futex_wait(word, seen, true, std::min(kLookNs, timeout_ns_ - waited));
  }
  sleepers.fetch_sub(1, std::memory_order_relaxed);
  return !has_failed_;
}

// Looks for a reason why those who have not come to `round` never will; fails if there is one.
bool SharedGroup::is_hopeless(uint32_t round, uint64_t tag, int64_t waited_ns) {
  if (header_->failure.state.load(std::memory_order_acquire) == kWritten) return has_failed_ = true;
  for (int other = 0; other < size_; ++other) {
    if (other == rank_ || has_come(other, round)) continue;
    const bool has_died = this->has_died(other);  // before the look at what it did last
    if (has_come(other, round)) continue;
    const bool has_left = header_->places[other].has_left.load(std::memory_order_acquire) != 0;
    if (has_left || has_died) return !fail(has_left ? kLeft : kDied, UINT64_C(1) << other, tag, 0, waited_ns);
  }
  return waited_ns >= timeout_ns_ && !fail(kMissing, slowest(round), tag, 0, waited_ns);
}

bool SharedGroup::has_died(int other) const {
  pollfd process{pidfds_[other], POLLIN, 0};
  return process.fd >= 0 && poll(&process, 1, 0) > 0;
}

// Returns those who are furthest behind: whoever is less so may be waiting for them.
uint64_t SharedGroup::slowest(uint32_t round) const {
  int32_t furthest = 0;
  uint64_t ranks = 0;
  for (int other = 0; other < size_; ++other) {
    const int32_t behind = static_cast<int32_t>(round - header_->places[other].round.load(std::memory_order_acquire));
    if (other == rank_ || behind < std::max(furthest, INT32_C(1))) continue;
    if (behind > furthest) ranks = 0;
    furthest = behind;
    ranks |= UINT64_C(1) << other;
  }
  return ranks;
}

// Writes down why this rank cannot go on, unless another has written already. Returns false.
bool SharedGroup::fail(FailureKind kind, uint64_t ranks, uint64_t tag, uint64_t other_tag, int64_t waited_ns) {
  Failure& failure = header_->failure;
  uint32_t expected = kUnwritten;
  has_failed_ = true;
  const bool is_first = failure.state.compare_exchange_strong(expected, kBeingWritten, std::memory_order_acq_rel);
  // Who writes has done so in a moment, unless it was killed meanwhile: then this rank's reason stands.
  const auto is_written = [&] { return failure.state.load(std::memory_order_acquire) == kWritten; };
  if (is_first || !spin_until(is_written, kLookNs)) {
    failure.report = {kind, static_cast<uint32_t>(rank_), ranks, tag, other_tag, waited_ns};
    failure.state.store(kWritten, std::memory_order_release);
  }
  return false;
}
