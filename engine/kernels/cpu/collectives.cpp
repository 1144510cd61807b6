// Collectives among ranks on one machine, in rounds of collectives_group.h: each copies bytes into its slot and reads the
// others'. What does not fit into a slot goes in several rounds. Sums have one order, whatever the rank, the size and
// the number of rounds, so that all ranks have the same bits.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "collectives_group.h"
#include "collectives_sum.h"
#include "divide_up.h"
#include "export.h"
#include "futex.h"

namespace {

enum Operation { kAllReduce, kAllGather, kGather, kBroadcast, kReduceScatter, kBarrier, kNumOperations };
enum Type { kFloat32, kBFloat16, kFloat16, kFloat64, kInt64, kBytes };

constexpr int64_t kLine = 64;  // bytes that one core writes without disturbing another

// What the ranks must agree on: operation, type, source, and bytes of a rank.
uint64_t tag_of(Operation operation, int type, int source, int64_t bytes) {
  return static_cast<uint64_t>(operation + 1) << 56 | static_cast<uint64_t>(type) << 48 |
         static_cast<uint64_t>(source) << 40 | static_cast<uint64_t>(bytes);
}

// Observations since the last take: `counts[i]` are those above bounds[i - 1] and at most bounds[i].
struct Histogram {
  std::vector<int64_t> counts;
  int64_t sum_ns = 0;

  void observe(const std::vector<int64_t>& bounds_ns, int64_t ns) {
    ++counts[std::lower_bound(bounds_ns.begin(), bounds_ns.end(), ns) - bounds_ns.begin()];
    sum_ns += ns;
  }
};

struct Times {
  Histogram whole, waiting;
  int64_t num_bytes = 0;  // of a rank's part
};

// A rank's end of the group.
struct Collectives {
  SharedGroup group;
  int64_t most_shared_by_all;  // bytes of an all-reduce which each rank sums as a whole
  std::vector<int64_t> bounds_ns;
  bool is_timed;
  Times times[kNumOperations];
  int64_t spent_ns;  // in all operations, since the beginning
};

// Copies n bytes; the addresses of none may be null, as an empty tensor's is.
void copy(void* to, const void* from, int64_t n) {
  if (n > 0) std::memcpy(to, from, n);
}

// --- all-reduce ------------------------------------------------------------------------------------------------------

// A rank's part of n elements, at whole lines.
struct Slice {
  int64_t begin, size;
};

Slice slice_of(int rank, int num_ranks, int64_t n, int64_t element_bytes) {
  const int64_t line = kLine / element_bytes;
  const int64_t each = divide_up(divide_up(n, num_ranks), line) * line;
  const int64_t begin = std::min(rank * each, n);
  return {begin, std::min(each, n - begin)};
}

// Sums n elements of all ranks into out: this rank's are at `own`, the others' in their slots, `offset` elements in.
template <class T>
void sum_slots(const SharedGroup& group, T* out, const T* own, int64_t offset, int64_t n) {
  const T* sources[kMostRanks];
  for (int rank = 0; rank < group.size(); ++rank) {
    sources[rank] = rank == group.rank() ? own : reinterpret_cast<const T*>(group.slot(rank)) + offset;
  }
  sum_ranks(out, sources, group.size(), n);
}

// Each rank sums everything: one round, as many bytes read as there are ranks.
template <class T>
bool all_reduce_as_a_whole(SharedGroup& group, uint64_t tag, T* data, int64_t n) {
  if (!group.begin(tag)) return false;
  copy(group.slot(group.rank()), data, n * sizeof(T));
  group.come();
  if (!group.await_all()) return false;
  sum_slots(group, data, data, 0, n);
  return true;
}

// Each rank sums a slice, and takes the others' sums: two rounds, twice the bytes read, whatever the number of ranks.
template <class T>
bool all_reduce_by_slices(SharedGroup& group, uint64_t tag, T* data, int64_t n) {
  const auto slice = [&](int rank) { return slice_of(rank, group.size(), n, sizeof(T)); };
  const Slice own = slice(group.rank());
  if (!group.begin(tag)) return false;
  T* slot = reinterpret_cast<T*>(group.slot(group.rank()));
  copy(slot, data, own.begin * sizeof(T));
  const int64_t end = own.begin + own.size;
  copy(slot + end, data + end, (n - end) * sizeof(T));
  group.come();
  if (!group.await_all()) return false;
  sum_slots(group, data + own.begin, data + own.begin, own.begin, own.size);
  if (!group.begin(tag)) return false;
  copy(group.slot(group.rank()), data + own.begin, own.size * sizeof(T));
  group.come();
  for (int step = 1; step < group.size(); ++step) {  // not all from the same rank at once
    const int other = (group.rank() + step) % group.size();
    if (!group.await(other)) return false;
    const Slice theirs = slice(other);
    copy(data + theirs.begin, group.slot(other), theirs.size * sizeof(T));
  }
  return true;
}

template <class T>
bool all_reduce(Collectives& self, uint64_t tag, void* data, int64_t count) {
  SharedGroup& group = self.group;
  const int64_t most = group.slot_bytes() / static_cast<int64_t>(sizeof(T));
  const bool is_small = count * static_cast<int64_t>(sizeof(T)) <= self.most_shared_by_all;
  T* const elements = static_cast<T*>(data);
  int64_t done = 0;
  do {
    const int64_t n = std::min(most, count - done);
    const bool went_well = is_small ? all_reduce_as_a_whole(group, tag, elements + done, n)
                                    : all_reduce_by_slices(group, tag, elements + done, n);
    if (!went_well) return false;
    done += n;
  } while (done < count);
  return true;
}

// --- copies ----------------------------------------------------------------------------------------------------------

// Calls f(row, column, position, n) for each piece of bytes [begin, begin + size) that lies in one row of `row_bytes`:
// n bytes from its `column` on, `position` bytes after begin.
template <class F>
void for_each_piece(int64_t begin, int64_t size, int64_t row_bytes, const F& f) {
  for (int64_t position = 0; position < size;) {
    const int64_t row = (begin + position) / row_bytes, column = (begin + position) % row_bytes;
    const int64_t n = std::min(row_bytes - column, size - position);
    f(row, column, position, n);
    position += n;
  }
}

// out [rows, ranks, row_bytes] on each rank, or on rank 0 alone, of each rank's own [rows, row_bytes].
bool gather(SharedGroup& group, uint64_t tag, char* out, const char* own, int64_t rows, int64_t row_bytes,
            bool is_reader) {
  const int64_t bytes = rows * row_bytes;
  const auto put = [&](int rank, const char* from, int64_t begin, int64_t size) {
    for_each_piece(begin, size, row_bytes, [&](int64_t row, int64_t column, int64_t position, int64_t n) {
      copy(out + (row * group.size() + rank) * row_bytes + column, from + position, n);
    });
  };
  int64_t done = 0;
  do {
    const int64_t n = std::min(group.slot_bytes(), bytes - done);
    if (!group.begin(tag)) return false;
    copy(group.slot(group.rank()), own + done, n);
    group.come();
    if (is_reader) {
      put(group.rank(), own + done, done, n);
      for (int step = 1; step < group.size(); ++step) {
        const int other = (group.rank() + step) % group.size();
        if (!group.await(other)) return false;
        put(other, group.slot(other), done, n);
      }
    }
    done += n;
  } while (done < bytes);
  return true;
}

bool broadcast(SharedGroup& group, uint64_t tag, char* data, int64_t bytes, int source) {
  int64_t done = 0;
  do {
    const int64_t n = std::min(group.slot_bytes(), bytes - done);
    if (!group.begin(tag)) return false;
    if (group.rank() == source) copy(group.slot(source), data + done, n);
    group.come();
    if (group.rank() != source) {
      if (!group.await(source)) return false;
      copy(data + done, group.slot(source), n);
    }
    done += n;
  } while (done < bytes);
  return true;
}

// out [rows, run] of the sum over ranks of [rows, ranks, run]: the part in the middle that is this rank's.
template <class T>
bool reduce_scatter(Collectives& self, uint64_t tag, void* out, const void* data, int64_t rows, int64_t run) {
  SharedGroup& group = self.group;
  const int64_t line = kLine / static_cast<int64_t>(sizeof(T));
  // The slot holds a part for each rank, the own one unused, at whole lines.
  const int64_t most = group.slot_bytes() / static_cast<int64_t>(sizeof(T)) / group.size() / line * line;
  const T* const from = static_cast<const T*>(data);
  T* const to = static_cast<T*>(out);
  const auto take = [&](T* place, int rank, int64_t begin, int64_t size) {
    for_each_piece(begin, size, run, [&](int64_t row, int64_t column, int64_t position, int64_t n) {
      copy(place + position, from + (row * group.size() + rank) * run + column, n * sizeof(T));
    });
  };
  int64_t done = 0;
  do {
    const int64_t n = std::min(most, rows * run - done);
    if (!group.begin(tag)) return false;
    T* slot = reinterpret_cast<T*>(group.slot(group.rank()));
    for (int rank = 0; rank < group.size(); ++rank) {
      if (rank != group.rank()) take(slot + rank * most, rank, done, n);
    }
    group.come();
    take(to + done, group.rank(), done, n);
    if (!group.await_all()) return false;
    sum_slots(group, to + done, to + done, group.rank() * most, n);
    done += n;
  } while (done < rows * run);
  return true;
}

// --- types and times -------------------------------------------------------------------------------------------------

template <class F>
bool with_type(int type, const F& f) {
  switch (type) {
    case kFloat32: return f(static_cast<float*>(nullptr));
    case kBFloat16: return f(static_cast<bf16*>(nullptr));
    case kFloat16: return f(static_cast<f16*>(nullptr));
    case kFloat64: return f(static_cast<double*>(nullptr));
    default: return f(static_cast<uint64_t*>(nullptr));
  }
}

// Does an operation and, if that went well, counts its time, and the bytes of this rank's part; returns 0, or 1 if it
// failed or this rank has left.
template <class F>
int timed(Collectives* self, Operation operation, int64_t num_bytes, const F& work) {
  if (self == nullptr) return 1;
  if (!self->is_timed) return work() ? 0 : 1;
  const int64_t began = now_ns();
  if (!work()) return 1;
  const int64_t spent = now_ns() - began;
  Times& times = self->times[operation];
  times.whole.observe(self->bounds_ns, spent);
  times.waiting.observe(self->bounds_ns, self->group.take_waited_ns());
  times.num_bytes += num_bytes;
  self->spent_ns += spent;
  return 0;
}

int64_t element_bytes(int type) {
  constexpr int64_t kSizes[] = {4, 2, 2, 8, 8, 1};
  return kSizes[type];
}

}  // namespace

// Returns the bytes of a segment.
EXPORT int64_t ryz_collectives_segment_bytes(int size, int64_t slot_bytes) {
  return kHeaderBytes + 2 * size * slot_bytes;
}

// Returns this rank's end of a group, or null without memory for it; see SharedGroup. A slot is a multiple of a line for
// each rank. bounds_ns: of the histograms. is_timed: whether operations are timed and counted.
EXPORT Collectives* ryz_collectives_create(char* segment, int rank, int size, int64_t slot_bytes,
                                           int64_t most_shared_by_all, int64_t spin_ns, int64_t timeout_ns,
                                           const int* pidfds, const int64_t* bounds_ns, int num_bounds,
                                           int is_timed) {
  try {
    std::unique_ptr<Collectives> self(
        new Collectives{SharedGroup(segment, rank, size, slot_bytes, spin_ns, timeout_ns, pidfds),
                        std::min(most_shared_by_all, slot_bytes),
                        std::vector<int64_t>(bounds_ns, bounds_ns + num_bounds),
                        is_timed != 0,
                        {},
                        0});
    for (Times& times : self->times) {
      times.whole.counts.resize(num_bounds + 1);
      times.waiting.counts.resize(num_bounds + 1);
    }
    return self.release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// Says that this rank comes no more, and forgets it. The segment is the caller's to unmap.
EXPORT void ryz_collectives_destroy(Collectives* self) {
  self->group.leave();
  delete self;
}

// Each returns 0, or 1 if the group cannot go on: then ryz_collectives_failure says why. For a rank that has left, null,
// it is 1 too.

// data [count], in place.
EXPORT int ryz_all_reduce(Collectives* self, void* data, int64_t count, int type) {
  const int64_t num_bytes = count * element_bytes(type);
  const uint64_t tag = tag_of(kAllReduce, type, 0, num_bytes);
  return timed(self, kAllReduce, num_bytes, [=] {
    return with_type(type, [=](auto* of_type) {
      return all_reduce<std::remove_pointer_t<decltype(of_type)>>(*self, tag, data, count);
    });
  });
}

// out [rows, ranks, row_bytes] of each rank's own [rows, row_bytes].
EXPORT int ryz_all_gather(Collectives* self, char* out, const char* own, int64_t rows, int64_t row_bytes) {
  const uint64_t tag = tag_of(kAllGather, kBytes, 0, rows * row_bytes);
  return timed(self, kAllGather, rows * row_bytes,
               [=] { return gather(self->group, tag, out, own, rows, row_bytes, true); });
}

// Likewise on rank 0; out is not touched on the others, which do not wait for it.
EXPORT int ryz_gather(Collectives* self, char* out, const char* own, int64_t rows, int64_t row_bytes) {
  const uint64_t tag = tag_of(kGather, kBytes, 0, rows * row_bytes);
  return timed(self, kGather, rows * row_bytes,
               [=] { return gather(self->group, tag, out, own, rows, row_bytes, self->group.rank() == 0); });
}

// data [bytes], overwritten but on the source.
EXPORT int ryz_broadcast(Collectives* self, char* data, int64_t bytes, int source) {
  const uint64_t tag = tag_of(kBroadcast, kBytes, source, bytes);
  return timed(self, kBroadcast, bytes, [=] { return broadcast(self->group, tag, data, bytes, source); });
}

// out [rows, run], this rank's of the sum of data [rows, ranks, run].
EXPORT int ryz_reduce_scatter(Collectives* self, void* out, const void* data, int64_t rows, int64_t run, int type) {
  const int64_t num_bytes = rows * run * element_bytes(type);
  const uint64_t tag = tag_of(kReduceScatter, type, 0, num_bytes);
  return timed(self, kReduceScatter, num_bytes, [=] {
    return with_type(type, [=](auto* of_type) {
      return reduce_scatter<std::remove_pointer_t<decltype(of_type)>>(*self, tag, out, data, rows, run);
    });
  });
}

EXPORT int ryz_barrier(Collectives* self) {
  const uint64_t tag = tag_of(kBarrier, kBytes, 0, 0);
  return timed(self, kBarrier, 0, [=] {
    if (!self->group.begin(tag)) return false;
    self->group.come();
    return self->group.await_all();
  });
}

EXPORT void ryz_collectives_failure(Collectives* self, FailureReport* out) { *out = self->group.failure(); }

// Returns where the nanoseconds lie that were spent in all operations since the beginning.
EXPORT const int64_t* ryz_collectives_spent_ns(const Collectives* self) { return &self->spent_ns; }

// Takes what was counted since the last take, [operations, 2 * (num_bounds + 2) + 1]: the histogram of the whole time and
// that of the waiting, each with its counts and then its sum in nanoseconds, and the bytes of this rank's parts.
EXPORT void ryz_collectives_take_times(Collectives* self, int64_t* out) {
  for (Times& times : self->times) {
    for (Histogram* histogram : {&times.whole, &times.waiting}) {
      out = std::copy(histogram->counts.begin(), histogram->counts.end(), out);
      *out++ = histogram->sum_ns;
      std::fill(histogram->counts.begin(), histogram->counts.end(), 0);
      histogram->sum_ns = 0;
    }
    *out++ = times.num_bytes;
    times.num_bytes = 0;
  }
}
