// AVX2: 16 products an instruction with vpmaddwd. Compiled with -mavx2, called only where `available` says so.
//
// Why not vpmaddubsw, which makes 32: its pairs of products saturate at int16, and 255 * 127 * 2 does not fit. With the
// signs moved (|w| <= 128 unsigned, a * sign(w) in [-127, 127]) they do (2 * 128 * 127 = 32512), but then each 32
// products cost vpsignb, vpmaddubsw, vpmaddwd by ones and vpaddd: four instructions, as many as two pairs of vpmaddwd
// and vpaddd, which need no such care. vpmaddwd cannot overflow here: |a0 w0 + a1 w1| <= 2 * 127 * 128 in int32.
//
// The floor, on a core with four vector pipes of which two multiply (Zen 3): 32 products a cycle take 2 vpmaddwd and 2
// vpaddd, all four pipes. The largest micro kernel (6 rows, 16 outputs) does 192 products in 26 vector instructions, 24
// of them these: at most 29.5 a cycle, 92 % of that floor.
#include <immintrin.h>

#include "int8_linear.h"

namespace llmq {
namespace {

struct Isa {
  using Code = int16_t;
  static constexpr int kUnit = 2;
  static constexpr int kMaxRows = 6;  // 12 sums, 2 weights, 1 pair of codes, 1 product: all 16 registers
  static constexpr int kMaxPanels = 1;
  static constexpr uint8_t kFlip = 0;
  static constexpr int64_t kAhead = 1024;  // bytes prefetched ahead: the hardware's own prefetcher stops at each page

  template <int R, int P>
  static void micro(const Operands<Isa>& o, int64_t steps, bool first) {
    __m256i low[R], high[R];  // sums of outputs 0..7 and 8..15
    for (int r = 0; r < R; ++r) {
      const __m256i* sums = reinterpret_cast<const __m256i*>(o.sums + r * kPanel);
      low[r] = first ? _mm256_set1_epi32(o.start[r]) : _mm256_loadu_si256(sums);
      high[r] = first ? _mm256_set1_epi32(o.start[r]) : _mm256_loadu_si256(sums + 1);
    }
    const uint8_t* weights = o.weights;
    for (int64_t s = 0; s < steps; ++s, weights += kPanel * kUnit) {
      _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead), _MM_HINT_T0);
      const __m128i* w = reinterpret_cast<const __m128i*>(weights);
      const __m256i w_low = _mm256_cvtepi8_epi16(_mm_loadu_si128(w));
      const __m256i w_high = _mm256_cvtepi8_epi16(_mm_loadu_si128(w + 1));
      for (int r = 0; r < R; ++r) {
        const __m256i pair = _mm256_set1_epi32(load_lane(o.codes + r * o.code_stride + 2 * s));
        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(pair, w_low));
        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(pair, w_high));
      }
    }
    for (int r = 0; r < R; ++r) {
      __m256i* sums = reinterpret_cast<__m256i*>(o.sums + r * kPanel);
      _mm256_storeu_si256(sums, low[r]);
      _mm256_storeu_si256(sums + 1, high[r]);
    }
  }
};

bool available() {
  // libgcc and compiler-rt count a feature only when XGETBV says that the operating system saves its registers.
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");
}

}  // namespace

const IsaKernels kAvx2 = Int8Linear<Isa>::table("avx2", "int8-n16k2", available);

}  // namespace llmq
