// NEON, which every armv8-a has.
#include <arm_neon.h>

#include "attention.h"

namespace llmq {
namespace {

struct Isa {
  static constexpr int kWidth = 4;
  static constexpr int kRows = 6, kCols = 4;  // 24 sums, 4 columns, 1 row of 32 registers
  using Reg = Wide<kWidth>::Reg;
  static LLMQ_INLINE Reg set1(float x) { return reinterpret_cast<Reg>(vdupq_n_f32(x)); }
  static LLMQ_INLINE Reg fma(Reg a, Reg b, Reg c) { return reinterpret_cast<Reg>(vfmaq_f32(vec(c), vec(a), vec(b))); }
  static LLMQ_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static LLMQ_INLINE Reg bf16(const void* at) {
    uint16x4_t half;
    memcpy(&half, at, sizeof(half));
    return reinterpret_cast<Reg>(vshll_n_u16(half, 16));
  }
  static LLMQ_INLINE Reg int8(const void* at) {
    int8x8_t codes = vdup_n_s8(0);
    memcpy(&codes, at, 4);
    return reinterpret_cast<Reg>(vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes)))));
  }
  static LLMQ_INLINE float32x4_t vec(Reg x) { return reinterpret_cast<float32x4_t>(x); }
};

}  // namespace

const VectorKernels kVectorNeon = vector_table<Isa>("neon");

}  // namespace llmq
