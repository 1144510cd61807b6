// Ranks on one machine: processes that have mapped the same segment of memory, and meet in rounds.
//
// In a round each rank may leave bytes in a slot of its own, and says that it has come by the round's number. It counts
// up for ever, so nothing is ever reset. A rank has two slots and takes them in turns; it may write the one of round n
// once all others have come to round n - 1, since whoever has come there has read all that it wanted of round n - 2. So
// a round needs one meeting, not two.
//
// Who waits looks for a moment, then sleeps in a futex, and from time to time looks whether those whom it waits for
// still live. The first failure is written into the segment, and becomes everybody's.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

constexpr int kMostRanks = 64;
constexpr int64_t kHeaderBytes = 12288;  // of the segment; the slots follow

enum FailureKind : uint32_t { kNone, kMissing, kDied, kLeft, kMismatch };

// Why a group cannot go on.
struct FailureReport {
  uint32_t kind;
  uint32_t reporter;   // the rank that noticed
  uint64_t ranks;      // a bit for each that it is about
  uint64_t tag;        // what the reporter wanted of the round
  uint64_t other_tag;  // after a mismatch, what the one of `ranks` wanted
  int64_t waited_ns;   // by the reporter
};

struct Failure {
  std::atomic<uint32_t> state;  // unwritten, being written, written
  FailureReport report;
};

// What a rank tells the others.
struct alignas(64) Place {
  std::atomic<uint32_t> round;  // that it has come to; a futex
  std::atomic<uint32_t> has_left;
  std::atomic<uint64_t> tags[2];  // what it takes the rounds for, the even and the odd ones
};

struct alignas(64) Sleepers {
  std::atomic<uint32_t> count;
};

struct Header {
  alignas(64) Failure failure;
  Place places[kMostRanks];
  Sleepers sleepers[kMostRanks];  // that wait for a rank: a line apart, which it reads each time and they seldom write
};
static_assert(sizeof(Header) <= kHeaderBytes);

class SharedGroup {
 public:
  // segment: kHeaderBytes + 2 * size * slot_bytes, all zero when the first rank comes.
  // spin_ns: how long a rank looks for the others before it sleeps.
  // timeout_ns: how long it waits for them in one round.
  // pidfds: a descriptor of each rank's process, or -1 where its death cannot be seen.
  SharedGroup(char* segment, int rank, int size, int64_t slot_bytes, int64_t spin_ns, int64_t timeout_ns,
              const int* pidfds);

  int rank() const { return rank_; }
  int size() const { return size_; }
  int64_t slot_bytes() const { return slot_bytes_; }

  // --- a round. What returns false has failed, and so does everything after it; see failure().

  // Begins the next round, and waits until its slot may be written. `tag` is what all ranks must agree on.
  bool begin(uint64_t tag);
  // Says that this rank has come, and that what it wrote into its slot may be read.
  void come();
  // Waits until another rank has come.
  bool await(int other);
  bool await_all();
  // Returns a rank's slot of this round.
  char* slot(int of) const { return slots_ + (2 * of + (round_ & 1)) * slot_bytes_; }

  // --- beside the rounds

  void leave() { header_->places[rank_].has_left.store(1, std::memory_order_release); }
  const FailureReport& failure() const { return header_->failure.report; }
  // How long this rank has waited since the last take.
  int64_t take_waited_ns() {
    const int64_t waited = waited_ns_;
    waited_ns_ = 0;
    return waited;
  }

 private:
  bool has_come(int other, uint32_t round) const {
    return static_cast<int32_t>(header_->places[other].round.load(std::memory_order_acquire) - round) >= 0;
  }
  bool await(int other, uint32_t round, uint64_t tag);
  bool sleep_until_come(int other, uint32_t round, uint64_t tag);
  bool is_hopeless(uint32_t round, uint64_t tag, int64_t waited_ns);
  bool has_died(int other) const;
  uint64_t slowest(uint32_t round) const;
  bool fail(FailureKind kind, uint64_t ranks, uint64_t tag, uint64_t other_tag, int64_t waited_ns);

  Header* const header_;
  char* const slots_;
  const int rank_, size_;
  const int64_t slot_bytes_, spin_ns_, timeout_ns_;
  const std::vector<int> pidfds_;
  uint32_t round_ = 0;
  uint64_t tag_ = 0;
  bool has_failed_ = false;
  int64_t waited_ns_ = 0;
};
