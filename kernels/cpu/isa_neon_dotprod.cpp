// NEON with the dot product extension (armv8.2): 16 products an instruction with sdot, signed times signed, wrapping.
// Compiled with -march=armv8.2-a+dotprod, called only where `available` says so.
#include <arm_neon.h>
#ifdef __linux__
#  include <asm/hwcap.h>
#  include <sys/auxv.h>
#endif

#include "int8_linear.h"

namespace llmq {
namespace {

struct Isa {
  using Code = int8_t;
  static constexpr int kUnit = 4;
  static constexpr int kMaxRows = 6;  // 24 sums and 4 weights of 32 registers
  static constexpr int kMaxPanels = 1;
  static constexpr uint8_t kFlip = 0;

  template <int R, int P>
  static void micro(const Operands<Isa>& o, int64_t steps, bool first) {
    int32x4_t sums[R][4];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 4; ++v) {
        sums[r][v] = first ? vdupq_n_s32(o.start[r]) : vld1q_s32(o.sums + r * kPanel + 4 * v);
      }
    }
    const uint8_t* weights = o.weights;
    for (int64_t s = 0; s < steps; ++s, weights += kPanel * kUnit) {
      int8x16_t w[4];
      for (int v = 0; v < 4; ++v) w[v] = vreinterpretq_s8_u8(vld1q_u8(weights + 16 * v));
      for (int r = 0; r < R; ++r) {
        const int32_t four = load_lane(o.codes + r * o.code_stride + 4 * s);
        const int8x16_t codes = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int v = 0; v < 4; ++v) sums[r][v] = vdotq_s32(sums[r][v], w[v], codes);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 4; ++v) vst1q_s32(o.sums + r * kPanel + 4 * v, sums[r][v]);
    }
  }
};

bool available() {
#ifdef __linux__
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}

}  // namespace

const IsaKernels kNeonDotprod = Int8Linear<Isa>::table("neon-dotprod", "int8-n16k4", available);

}  // namespace llmq
