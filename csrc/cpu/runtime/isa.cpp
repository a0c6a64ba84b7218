#include "isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ctxkern {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// What setup.py found the compiler to take.
constexpr bool kBuilt[kIsaCount] = {
    true,
#ifdef CTXKERN_HAVE_AVX2
    true,
#else
    false,
#endif
#ifdef CTXKERN_HAVE_AVX512
    true,
#else
    false,
#endif
#ifdef CTXKERN_HAVE_AVX512_BF16
    true,
#else
    false,
#endif
#ifdef CTXKERN_HAVE_AMX_BF16
    true,
#else
    false,
#endif
};

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// cpuid rather than __builtin_cpu_supports: clang 16 takes neither "f16c" nor "amx-bf16" there.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool has(uint64_t value, uint64_t bits) { return (value & bits) == bits; }
constexpr uint64_t bit(int n) { return uint64_t{1} << n; }

// The register states that the operating system saves (XCR0).
uint64_t saved_states() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Linux hands out the tile registers on request only.
bool request_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Bit numbers: Intel SDM volume 2A, CPUID; volume 1, 13.3 (XCR0).
Isa detect() {
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  const uint64_t fma = bit(12), osxsave = bit(27), avx = bit(28), f16c = bit(29), avx2 = bit(5);
  if (!has(leaf1.ecx, fma | osxsave | avx | f16c) || !has(leaf7.ebx, avx2)) return Isa::scalar;
  const uint64_t states = saved_states(), ymm = bit(1) | bit(2), zmm = bit(5) | bit(6) | bit(7),
                 tiles = bit(17) | bit(18);
  if (!has(states, ymm)) return Isa::scalar;
  const uint64_t f = bit(16), dq = bit(17), bw = bit(30), vl = bit(31);
  if (!has(leaf7.ebx, f | dq | bw | vl) || !has(states, zmm)) return Isa::avx2;
  if (!has(leaf7_1.eax, bit(5))) return Isa::avx512;
#if defined(CTXKERN_EMULATE_AMX)
  return Isa::amx_bf16;
#endif
  const uint64_t amx_bf16 = bit(22), amx_tile = bit(24);
  if (!has(leaf7.edx, amx_bf16 | amx_tile) || !has(states, tiles) || !request_tiles()) return Isa::avx512_bf16;
  return Isa::amx_bf16;
}

#else

Isa detect() { return Isa::scalar; }

#endif

Isa best_of_machine() {
  static const Isa best = detect();
  return best;
}

Isa choose(const char* wanted) {
  Isa best = Isa::scalar;
  std::string choices;
  const bool forced = wanted != nullptr && *wanted != '\0';
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    if (forced && std::strcmp(wanted, kNames[i]) == 0) return isa;
    best = isa;
    choices += (choices.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  if (forced) {
    throw std::invalid_argument("CTXKERN_CPU_ISA is '" + std::string(wanted) +
                                "'; this build on this machine takes one of: " + choices);
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) { return kBuilt[static_cast<int>(isa)] && isa <= best_of_machine(); }

namespace {
std::atomic<Isa>& in_use() {
  static std::atomic<Isa> isa{choose(std::getenv("CTXKERN_CPU_ISA"))};
  return isa;
}
}  // namespace

Isa chosen_isa() { return in_use().load(std::memory_order_relaxed); }

void force_isa(const char* name) { in_use().store(choose(name), std::memory_order_relaxed); }

const char* cpu_name() {
#if defined(__x86_64__)
  static char brand[49] = {};  // three leaves of 16 bytes and the end
  constexpr unsigned kFirstLeaf = 0x80000002;
  if (brand[0] == '\0' && __get_cpuid_max(0x80000000, nullptr) >= kFirstLeaf + 2) {
    for (unsigned i = 0; i < 3; ++i) {
      const Registers r = cpuid(kFirstLeaf + i, 0);
      std::memcpy(brand + 16 * i, &r, sizeof r);
    }
  }
  return brand;
#else
  return "";
#endif
}

}  // namespace ctxkern
