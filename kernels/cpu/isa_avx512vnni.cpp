// AVX-512 VNNI: 64 products an instruction with vpdpbusd, unsigned times signed. The weights are the unsigned side,
// stored as code + 128, so that the broadcast codes of x can be memory operands; `linear_tile` starts each sum with
// -128 * (sum of the row's codes), which takes the offset out again. vpdpbusd wraps and does not saturate (vpdpbusds
// would).
//
// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512vnni, called only where `available` says so. With LLMQ_SIMDE it
// is compiled against SIMDe instead, for the tests of machines without AVX-512.
#ifdef LLMQ_SIMDE
#  define SIMDE_ENABLE_NATIVE_ALIASES
#  include <simde/x86/avx512.h>
#else
#  include <immintrin.h>
#endif

#include "int8_linear.h"

namespace llmq {
namespace {

struct Isa {
  using Code = int8_t;
  static constexpr int kUnit = 4;
  static constexpr int kMaxRows = 6;  // 24 sums and 4 weights of 32 registers
  static constexpr int kMaxPanels = 4;
  static constexpr uint8_t kFlip = 0x80;

  template <int R, int P>
  static void micro(const Operands<Isa>& o, int64_t steps, bool first) {
    __m512i sums[R][P];
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) {
        sums[r][p] = first ? _mm512_set1_epi32(o.start[r]) : _mm512_loadu_si512(o.sums + p * o.panel_sums + r * kPanel);
      }
    }
    const uint8_t* weights = o.weights;
    for (int64_t s = 0; s < steps; ++s, weights += kPanel * kUnit) {
      __m512i w[P];
      for (int p = 0; p < P; ++p) w[p] = _mm512_loadu_si512(weights + p * o.panel_bytes);
      for (int r = 0; r < R; ++r) {
        const __m512i four = _mm512_set1_epi32(load_lane(o.codes + r * o.code_stride + 4 * s));
        for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], w[p], four);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) _mm512_storeu_si512(o.sums + p * o.panel_sums + r * kPanel, sums[r][p]);
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

const IsaKernels kAvx512Vnni = Int8Linear<Isa>::table("avx512vnni", "uint8-n16k4", available);

}  // namespace llmq
