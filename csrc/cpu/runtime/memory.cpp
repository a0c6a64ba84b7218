#include "memory.h"

#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ctxkern {
namespace {

constexpr uintptr_t kPage = uintptr_t{2} << 20;

using Clock = std::chrono::steady_clock;

struct Kept {
  char* data;
  int64_t bytes;
  Clock::time_point since;
};

// In the order in which they were given back. Never destroyed, as tensors may outlive what runs at exit.
std::vector<Kept>& kept() {
  static auto* const each = new std::vector<Kept>;
  return *each;
}

void give_back(char* data) { ::operator delete(data, std::align_val_t{kPage}); }

}  // namespace

void advise_huge(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // advice, whose failure changes nothing
  if (p != nullptr && bytes > 0 && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

LargeMemory::LargeMemory(int64_t size) : bytes(size) {
  release_kept(kept_seconds());
  std::vector<Kept>& each = kept();
  for (size_t i = each.size(); i-- > 0;) {
    if (each[i].bytes != bytes) continue;
    data = each[i].data;
    each.erase(each.begin() + static_cast<std::ptrdiff_t>(i));
    return;
  }
  release_kept(0);
  data = static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{kPage}));
  advise_huge(data, bytes);
}

LargeMemory::~LargeMemory() {
  if (kept_seconds() > 0 && kept_bytes() + bytes <= kMostKept) {
    kept().push_back({data, bytes, Clock::now()});
  } else {
    give_back(data);
  }
}

double kept_seconds() {
  static const double seconds = [] {
    const char* const text = std::getenv("CTXKERN_KEPT_SECONDS");
    if (text == nullptr || *text == 0) return 10.0;
    char* end = nullptr;
    const double found = std::strtod(text, &end);
    if (*end == 0 && found >= 0) return found;
    throw std::invalid_argument("CTXKERN_KEPT_SECONDS is '" + std::string(text) +
                                "'; it must be a number of seconds, 0 or more");
  }();
  return seconds;
}

int64_t kept_bytes() {
  int64_t bytes = 0;
  for (const Kept& each : kept()) bytes += each.bytes;
  return bytes;
}

void release_kept(double seconds) {
  std::vector<Kept>& each = kept();
  if (each.empty()) return;
  const Clock::time_point now = Clock::now();
  const auto waited = [&](const Kept& k) { return std::chrono::duration<double>(now - k.since).count() >= seconds; };
  size_t gone = 0;
  while (gone < each.size() && waited(each[gone])) give_back(each[gone++].data);
  each.erase(each.begin(), each.begin() + static_cast<std::ptrdiff_t>(gone));
}

}  // namespace ctxkern
