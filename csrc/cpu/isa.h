// Which instruction set's copy of the kernels runs: the best of this machine, or what
// FASTDIT_CPU_ISA names when the library is loaded.
//
// A kernel in isa/<name>.cpp is compiled once for each; FASTDIT_KERNEL declares the copies and a
// function of the same name that calls the chosen one.
#pragma once

#include "cpu/types.h"

namespace fastdit {

enum class Isa : int8_t { baseline, avx2, avx512 };

Isa current_isa();

}  // namespace fastdit

#if defined(__x86_64__)
#define FASTDIT_KERNEL(name, parameters, arguments)              \
  namespace fastdit {                                            \
  namespace baseline { void name parameters; }                   \
  namespace avx2 { void name parameters; }                       \
  namespace avx512 { void name parameters; }                     \
  inline void name parameters {                                  \
    switch (current_isa()) {                                     \
      case Isa::avx512: return avx512::name arguments;           \
      case Isa::avx2: return avx2::name arguments;               \
      case Isa::baseline: return baseline::name arguments;       \
    }                                                            \
  }                                                              \
  }
#else
#define FASTDIT_KERNEL(name, parameters, arguments)              \
  namespace fastdit {                                            \
  namespace baseline { void name parameters; }                   \
  inline void name parameters { return baseline::name arguments; } \
  }
#endif
