// Plain C++, for the baseline of the architecture (x86-64-v1, armv8-a): what every machine can run.
#include "int8_linear.h"

namespace llmq {
namespace {

struct Isa {
  using Code = int16_t;
  static constexpr int kUnit = 2;
  static constexpr int kMaxRows = 4;
  static constexpr int kMaxPanels = 1;
  static constexpr uint8_t kFlip = 0;

  template <int R, int P>
  static void micro(const Operands<Isa>& o, int64_t steps, bool first) {
    int32_t sums[R][kPanel];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kPanel; ++j) sums[r][j] = first ? o.start[r] : o.sums[r * kPanel + j];
    }
    const uint8_t* weights = o.weights;
    for (int64_t s = 0; s < steps; ++s, weights += kPanel * kUnit) {
      int16_t w[kPanel * kUnit];  // widened once, used by every row
      for (int j = 0; j < kPanel * kUnit; ++j) w[j] = static_cast<int8_t>(weights[j]);
      for (int r = 0; r < R; ++r) {
        const int32_t a0 = o.codes[r * o.code_stride + 2 * s], a1 = o.codes[r * o.code_stride + 2 * s + 1];
        for (int j = 0; j < kPanel; ++j) sums[r][j] += a0 * w[2 * j] + a1 * w[2 * j + 1];
      }
    }
    memcpy(o.sums, sums, sizeof(sums));
  }
};

bool available() { return true; }

}  // namespace

const IsaKernels kGeneric = Int8Linear<Isa>::table("generic", "int8-n16k2", available);

}  // namespace llmq
