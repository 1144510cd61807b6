// Reads memory as fast as it comes: what `ryzanstein bench limits` measures, and weights are held against.
//
// Four streams in each chunk: where pages are small, one stream waits at each of their ends, and four wait less (measured
// on Zen 4, 4 KiB pages: 21 GB/s with one, 26 with four; 2 MiB pages: 30 with either).
#include <atomic>
#include <cstdint>

#include "export.h"
#include "thread_pool.h"

namespace {

using Words = uint64_t __attribute__((vector_size(64)));
constexpr int64_t kStreams = 4;
constexpr int64_t kWordsPerStream = 16384;  // vectors of 64 bytes: 1 MiB
constexpr int64_t kWordsPerChunk = kStreams * kWordsPerStream;

uint64_t sum_of_chunk(const Words* words) {
  Words sums[kStreams][2] = {};
  for (int64_t i = 0; i < kWordsPerStream; i += 2) {
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      sums[stream][0] += words[stream * kWordsPerStream + i];
      sums[stream][1] += words[stream * kWordsPerStream + i + 1];
    }
  }
  Words total = {};
  for (auto& of_stream : sums) total += of_stream[0] + of_stream[1];
  uint64_t sum = 0;
  for (int lane = 0; lane < 8; ++lane) sum += total[lane];
  return sum;
}

}  // namespace

// Adds up `num_chunks` times 4 MiB of 64-bit words, aligned to 64 bytes, into `sum`.
EXPORT void ryz_read_memory(ThreadPool* pool, uint64_t* sum, const void* data, int64_t num_chunks) {
  std::atomic<uint64_t> total{0};
  pool->parallel_for(num_chunks, [&](int64_t chunk) {
    const uint64_t of_chunk = sum_of_chunk(static_cast<const Words*>(data) + chunk * kWordsPerChunk);
    total.fetch_add(of_chunk, std::memory_order_relaxed);
  });
  *sum = total.load();
}
