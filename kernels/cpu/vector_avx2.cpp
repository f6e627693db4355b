// AVX2 and FMA. Compiled with -mavx2 -mfma.
#include <immintrin.h>

#include "attention.h"

namespace llmq {
namespace {

struct Isa {
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6, kCols = 2;  // 12 sums, 2 columns, 1 row: 15 of 16 registers
  using Reg = Wide<kWidth>::Reg;
  static LLMQ_INLINE Reg set1(float x) { return _mm256_set1_ps(x); }
  static LLMQ_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static LLMQ_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static LLMQ_INLINE Reg bf16(const void* at) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static LLMQ_INLINE Reg int8(const void* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at))));
  }
};

}  // namespace

const VectorKernels kVectorAvx2 = vector_table<Isa>("avx2");

}  // namespace llmq
