// NEON with the dot product extension (armv8.2): 16 products an instruction with sdot, signed times signed, wrapping.
// Compiled with -march=armv8.2-a+dotprod, called only where `available` says so.
#include <arm_neon.h>
#ifdef __linux__
#  include <asm/hwcap.h>
#  include <sys/auxv.h>
#endif

#include "float_tile.h"
#include "vector.h"

namespace llmq {
namespace {

struct Isa {
  static constexpr int kUnit8 = 4;
  static constexpr uint8_t kFlip8 = 0;
  static constexpr bool kWide8 = false;
  static constexpr int kRows8 = 6;  // 24 sums and 4 weights of 32 registers
  static constexpr int kPanels8 = 1;
  static constexpr int kRows4 = 4;         // 16 sums and 8 weights
  static constexpr bool kExpand4 = false;  // taking nibbles apart is 8 instructions beside 8 products for each plane
  static constexpr int kWide4Rows = 0;
  static constexpr int kRowsFloat = 6;
  static constexpr int kPanelsFloat = 2;

  template <int R>
  static void start(const Micro& o, int32x4_t (*sums)[4]) {
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int v = 0; v < 4; ++v) sums[r][v] = o.add ? vld1q_s32(o.sums + r * kPanel + 4 * v) : vdupq_n_s32(0);
    }
  }

  template <int R>
  static void stop(const Micro& o, const int32x4_t (*sums)[4]) {
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int v = 0; v < 4; ++v) vst1q_s32(o.sums + r * kPanel + 4 * v, sums[r][v]);
    }
  }

  static int8x16_t four_codes(const uint8_t* codes) { return vreinterpretq_s8_s32(vdupq_n_s32(load_lane(codes))); }

  template <int R, int P>
  static void micro8(const Micro& o) {
    int32x4_t sums[R][4];
    start<R>(o, sums);
    const uint8_t* weights = o.weights;
    for (int64_t k = 0; k < o.size; k += kUnit8, weights += kPanel * kUnit8) {
      int8x16_t w[4];
      LLMQ_UNROLL
      for (int v = 0; v < 4; ++v) w[v] = vreinterpretq_s8_u8(vld1q_u8(weights + 16 * v));
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        const int8x16_t codes = four_codes(o.codes + r * o.plane_bytes + k);
        LLMQ_UNROLL
        for (int v = 0; v < 4; ++v) sums[r][v] = vdotq_s32(sums[r][v], w[v], codes);
      }
    }
    stop<R>(o, sums);
  }

  template <int R>
  static void micro4(const Micro& o) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    int32x4_t sums[R][4];
    start<R>(o, sums);
    const uint8_t* weights = o.weights;
    for (int64_t k = 0; k < o.size; k += kStep, weights += kPanel * kStep / 2) {
      int8x16_t first[4], last[4];
      LLMQ_UNROLL
      for (int v = 0; v < 4; ++v) {
        const uint8x16_t both = vld1q_u8(weights + 16 * v);
        first[v] = vreinterpretq_s8_u8(vandq_u8(both, nibble));
        last[v] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
      }
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        const uint8_t* at = o.codes + r * o.plane_bytes + k;
        const int8x16_t first_codes = four_codes(at), last_codes = four_codes(at + 4);
        LLMQ_UNROLL
        for (int v = 0; v < 4; ++v) sums[r][v] = vdotq_s32(sums[r][v], first[v], first_codes);
        LLMQ_UNROLL
        for (int v = 0; v < 4; ++v) sums[r][v] = vdotq_s32(sums[r][v], last[v], last_codes);
      }
    }
    stop<R>(o, sums);
  }

  template <int R>
  static inline void dot4(const uint8_t* weights, const uint8_t* const* planes, int64_t size, Words (*sums)[2]) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    int32x4_t parts[R][4];
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int v = 0; v < 4; ++v) parts[r][v] = vdupq_n_s32(0);
    }
    for (int64_t k = 0; k < size; k += kStep, weights += kPanel * kStep / 2) {
      LLMQ_UNROLL
      for (int v = 0; v < 4; ++v) {
        const uint8x16_t both = vld1q_u8(weights + 16 * v);
        const int8x16_t first = vreinterpretq_s8_u8(vandq_u8(both, nibble));
        const int8x16_t last = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        LLMQ_UNROLL
        for (int r = 0; r < R; ++r) {
          parts[r][v] = vdotq_s32(parts[r][v], first, four_codes(planes[r] + k));
          parts[r][v] = vdotq_s32(parts[r][v], last, four_codes(planes[r] + k + 4));
        }
      }
    }
    memcpy(sums, parts, sizeof(parts));
  }

  template <int R, int P, bool kBf16>
  static void micro_float(const MicroFloat& o) {
    float32x4_t sums[R][P][4];
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int p = 0; p < P; ++p) {
        LLMQ_UNROLL
        for (int v = 0; v < 4; ++v) {
          sums[r][p][v] = o.add ? vld1q_f32(o.sums + p * o.panel_sums + r * kPanel + 4 * v) : vdupq_n_f32(0);
        }
      }
    }
    const uint8_t* weights = o.weights;
    for (int64_t k = 0; k < o.size; k += 2, weights += 2 * kPanel * (kBf16 ? 2 : 4)) {
      LLMQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        LLMQ_UNROLL
        for (int p = 0; p < P; ++p) {
          LLMQ_UNROLL
          for (int v = 0; v < 4; ++v) {
            const uint8_t* at = weights + p * o.panel_bytes + 16 * v;
            float32x4_t w;
            if constexpr (kBf16) {  // the even input in the lower half of a lane, the odd in the upper
              const uint32x4_t both = vreinterpretq_u32_u8(vld1q_u8(at));
              w = vreinterpretq_f32_u32(half ? vandq_u32(both, vdupq_n_u32(0xffff0000u)) : vshlq_n_u32(both, 16));
            } else {
              w = vreinterpretq_f32_u8(vld1q_u8(at + half * 64));
            }
            LLMQ_UNROLL
            for (int r = 0; r < R; ++r) {
              sums[r][p][v] = vfmaq_n_f32(sums[r][p][v], w, o.rows[r * o.row_floats + k + half]);
            }
          }
        }
      }
    }
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int p = 0; p < P; ++p) {
        LLMQ_UNROLL
        for (int v = 0; v < 4; ++v) vst1q_f32(o.sums + p * o.panel_sums + r * kPanel + 4 * v, sums[r][p][v]);
      }
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

const IsaKernels kNeonDotprod = isa_table<Isa>("neon-dotprod", "int8-n16k4", available, &kVectorNeon);

}  // namespace llmq
