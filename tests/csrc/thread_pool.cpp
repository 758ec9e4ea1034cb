// PyTorch's parallel_for on threads that ThreadSanitizer sees: those of OpenMP's runtime wait for each
// other in ways that it does not know. Linked into the library, it is found before PyTorch's.
#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
bool overlapping = false;
}  // namespace

// Lets the other threads take their share of the work.
namespace fastdit {
void rest() { std::this_thread::sleep_for(std::chrono::microseconds(50)); }
}  // namespace fastdit

// Pieces then begin an item early, as a kernel would whose pieces are wrong.
extern "C" __attribute__((visibility("default"))) void overlap(bool on) { overlapping = on; }

extern "C" int32_t torch_get_num_threads(uint32_t* count) { return *count = kThreads, 0; }

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*piece)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return 0;
  const int64_t most = (end - begin + grain - 1) / grain, count = std::min(kThreads, most);
  const int64_t size = (end - begin + count - 1) / count;
  std::vector<std::pair<int64_t, int64_t>> pieces;
  for (int64_t from = begin; from < end; from += size)
    pieces.emplace_back(std::max(begin, from - overlapping), std::min(end, from + size));
  std::barrier together(pieces.size());  // nobody has done everything before the last one starts
  std::vector<std::thread> threads;
  for (const auto& [from, to] : pieces)
    threads.emplace_back([&, from = from, to = to] {
      together.arrive_and_wait();
      piece(from, to, context);
    });
  for (std::thread& thread : threads) thread.join();
  return 0;
}
