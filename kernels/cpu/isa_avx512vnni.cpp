// AVX-512 VNNI: 64 products an instruction with vpdpbusd, unsigned times signed; vpdpbusd wraps and does not saturate
// (vpdpbusds would). The weights are the unsigned side, int8 weights stored as code + 128, so that the broadcast codes of x
// can be memory operands; the offset times the sum of the codes is taken out again at the end.
//
// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512vnni, called only where `available` says so. With LLMQ_SIMDE it
// is compiled against SIMDe instead, for the tests of machines without AVX-512.
#ifdef LLMQ_SIMDE
#  define SIMDE_ENABLE_NATIVE_ALIASES
#  include <simde/x86/avx512.h>
#else
#  include <immintrin.h>
#endif

#include "float_tile.h"
#include "vector.h"

namespace llmq {
namespace {

struct Isa {
  static constexpr int kUnit8 = 4;
  static constexpr uint8_t kFlip8 = 0x80;
  static constexpr bool kWide8 = false;
  static constexpr int kRows8 = 6;  // 24 sums and 4 weights of 32 registers
  static constexpr int kPanels8 = 4;
  static constexpr int kRows4 = 12;  // 12 sums, which wait for themselves no longer than the two multipliers take for all
  static constexpr bool kExpand4 = false;  // taking nibbles apart is 3 instructions beside 2 products for each plane
  static constexpr int kWide4Rows = 0;
  static constexpr int kRowsFloat = 12;
  static constexpr int kPanelsFloat = 8;
  static constexpr int64_t kAhead = 1024;  // bytes prefetched ahead: the hardware's own prefetcher stops at each page

  static void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0); }

  template <int R, int P>
  LLMQ_ALONE static void micro8(const Micro& o) {
    __m512i sums[R][P];
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int p = 0; p < P; ++p) {
        sums[r][p] = o.add ? _mm512_loadu_si512(o.sums + p * o.panel_sums + r * kPanel) : _mm512_setzero_si512();
      }
    }
    const uint8_t* weights = o.weights;
    for (int64_t k = 0; k < o.size; k += kUnit8, weights += kPanel * kUnit8) {
      __m512i w[P];
      LLMQ_UNROLL
      for (int p = 0; p < P; ++p) {
        prefetch(weights + p * o.panel_bytes);
        w[p] = _mm512_loadu_si512(weights + p * o.panel_bytes);
      }
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512i four = _mm512_set1_epi32(load_lane(o.codes + r * o.plane_bytes + k));
        LLMQ_UNROLL
        for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], w[p], four);
      }
    }
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int p = 0; p < P; ++p) _mm512_storeu_si512(o.sums + p * o.panel_sums + r * kPanel, sums[r][p]);
    }
  }

  template <int R>
  LLMQ_ALONE static void micro4(const Micro& o) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i sums[R];
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_si512();
    const uint8_t* weights = o.weights;
    for (int64_t k = 0; k < o.size; k += kStep, weights += kPanel * kStep / 2) {
      prefetch(weights);
      const __m512i w = _mm512_loadu_si512(weights);
      const __m512i first = _mm512_and_si512(w, nibble), last = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        const uint8_t* codes = o.codes + r * o.plane_bytes + k;
        sums[r] = _mm512_dpbusd_epi32(sums[r], first, _mm512_set1_epi32(load_lane(codes)));
        sums[r] = _mm512_dpbusd_epi32(sums[r], last, _mm512_set1_epi32(load_lane(codes + 4)));
      }
    }
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) _mm512_storeu_si512(o.sums + r * kPanel, sums[r]);
  }

  template <int R>
  static inline __attribute__((always_inline)) void dot4(const uint8_t* weights, const uint8_t* const* planes,
                                                         int64_t size, Words (*sums)[2]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i first_sums[R], last_sums[R];  // two chains for each plane, so that none waits for itself
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) first_sums[r] = last_sums[r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < size; k += kStep, weights += kPanel * kStep / 2) {
      prefetch(weights);
      const __m512i w = _mm512_loadu_si512(weights);
      const __m512i first = _mm512_and_si512(w, nibble), last = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        first_sums[r] = _mm512_dpbusd_epi32(first_sums[r], first, _mm512_set1_epi32(load_lane(planes[r] + k)));
        last_sums[r] = _mm512_dpbusd_epi32(last_sums[r], last, _mm512_set1_epi32(load_lane(planes[r] + k + 4)));
      }
    }
    for (int r = 0; r < R; ++r) {
      const __m512i sum = _mm512_add_epi32(first_sums[r], last_sums[r]);
      memcpy(sums[r], &sum, sizeof(sum));
    }
  }

  template <int R, int P, bool kBf16>
  LLMQ_ALONE static void micro_float(const MicroFloat& o) {
    __m512 sums[R][P];
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int p = 0; p < P; ++p) {
        sums[r][p] = o.add ? _mm512_loadu_ps(o.sums + p * o.panel_sums + r * kPanel) : _mm512_setzero_ps();
      }
    }
    const uint8_t* weights = o.weights;
    const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    for (int64_t k = 0; k < o.size; k += 2, weights += 2 * kPanel * (kBf16 ? 2 : 4)) {
      LLMQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        LLMQ_UNROLL
        for (int p = 0; p < P; ++p) {
          const uint8_t* at = weights + p * o.panel_bytes;
          if (half == 0) prefetch(at);
          __m512 w;
          if constexpr (kBf16) {  // the even input in the lower half of a lane, the odd in the upper
            const __m512i both = _mm512_loadu_si512(at);
            w = _mm512_castsi512_ps(half ? _mm512_and_si512(both, upper) : _mm512_slli_epi32(both, 16));
          } else {
            w = _mm512_loadu_ps(at + half * 64);
          }
          LLMQ_UNROLL
          for (int r = 0; r < R; ++r) {
            const __m512 x = _mm512_set1_ps(o.rows[r * o.row_floats + k + half]);
            sums[r][p] = _mm512_fmadd_ps(x, w, sums[r][p]);
          }
        }
      }
    }
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int p = 0; p < P; ++p) _mm512_storeu_ps(o.sums + p * o.panel_sums + r * kPanel, sums[r][p]);
    }
  }
};

bool available() {
#ifdef LLMQ_SIMDE
  return true;
#else
  // libgcc and compiler-rt count a feature only when XGETBV says that the operating system saves its registers.
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
}

}  // namespace

const IsaKernels kAvx512Vnni = isa_table<Isa>("avx512vnni", "uint8-n16k4", available, &kVectorAvx512);

}  // namespace llmq
