#pragma once

namespace ctxkern {

// Each level contains the ones before it, except that scalar code runs everywhere.
enum class Isa : int { scalar, avx2, avx512, avx512_bf16, amx_bf16 };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// Whether this build has code for it and this machine runs it.
bool isa_available(Isa isa);

// The best available, or the one named by CTXKERN_CPU_ISA; read once. Throws std::invalid_argument
// if that is unknown or not available.
Isa chosen_isa();

// Makes the one of this name the chosen one from here on; throws as chosen_isa does.
void force_isa(const char* name);

// The brand string, or "" where the processor has none.
const char* cpu_name();

}  // namespace ctxkern
