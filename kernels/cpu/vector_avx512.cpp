// AVX-512 F. Compiled with -mavx512f -mavx512bw -mavx512vl; with LLMQ_SIMDE for any x86, for the tests of machines
// without it.
#ifdef LLMQ_SIMDE
#  define SIMDE_ENABLE_NATIVE_ALIASES
#  include <simde/x86/avx512.h>
#else
#  include <immintrin.h>
#endif

#include "attention.h"

namespace llmq {
namespace {

// What SIMDe lacks as yet; it declares what it has as macros.
#ifdef LLMQ_SIMDE
#  ifndef _mm512_cvtepu16_epi32
LLMQ_INLINE __m512i _mm512_cvtepu16_epi32(__m256i x) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  return reinterpret_cast<__m512i>(__builtin_convertvector(reinterpret_cast<Halves>(x), Words));
}
#  endif
#  ifndef _mm512_cvtepi8_epi32
LLMQ_INLINE __m512i _mm512_cvtepi8_epi32(__m128i x) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  typedef int32_t Words __attribute__((vector_size(64)));
  return reinterpret_cast<__m512i>(__builtin_convertvector(reinterpret_cast<Bytes>(x), Words));
}
#  endif
#  ifndef _mm512_cvtepi32_ps
LLMQ_INLINE __m512 _mm512_cvtepi32_ps(__m512i x) {
  typedef int32_t Words __attribute__((vector_size(64)));
  typedef float Floats __attribute__((vector_size(64)));
  return reinterpret_cast<__m512>(__builtin_convertvector(reinterpret_cast<Words>(x), Floats));
}
#  endif
#endif

struct Isa {
  static constexpr int kWidth = 16;
  static constexpr int kRows = 12, kCols = 2;  // 24 sums, 2 columns, 1 row of 32 registers
  using Reg = Wide<kWidth>::Reg;
  static LLMQ_INLINE Reg set1(float x) { return reinterpret_cast<Reg>(_mm512_set1_ps(x)); }
  static LLMQ_INLINE Reg fma(Reg a, Reg b, Reg c) {
    return reinterpret_cast<Reg>(_mm512_fmadd_ps(vec(a), vec(b), vec(c)));
  }
  static LLMQ_INLINE Reg max(Reg a, Reg b) { return reinterpret_cast<Reg>(_mm512_max_ps(vec(a), vec(b))); }
  static LLMQ_INLINE Reg bf16(const void* at) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
    return reinterpret_cast<Reg>(_mm512_slli_epi32(wide, 16));
  }
  static LLMQ_INLINE Reg int8(const void* at) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at)));
    return reinterpret_cast<Reg>(_mm512_cvtepi32_ps(wide));
  }
  static LLMQ_INLINE __m512 vec(Reg x) { return reinterpret_cast<__m512>(x); }
};

}  // namespace

const VectorKernels kVectorAvx512 = vector_table<Isa>("avx512");

}  // namespace llmq
