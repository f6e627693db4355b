// The baseline of the architecture (x86-64-v1, armv8-a), as far as the compiler's vectors of 16 bytes reach.
#include "attention.h"

namespace llmq {
namespace {

struct Isa {
  static constexpr int kWidth = 4;
  static constexpr int kRows = 4, kCols = 2;
  using Reg = Wide<kWidth>::Reg;
  static LLMQ_INLINE Reg set1(float x) { return Reg{x, x, x, x}; }
  static LLMQ_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static LLMQ_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static LLMQ_INLINE Reg bf16(const void* at) {
    uint16_t half[kWidth];
    memcpy(half, at, sizeof(half));
    uint32_t wide[kWidth];
    for (int i = 0; i < kWidth; ++i) wide[i] = static_cast<uint32_t>(half[i]) << 16;
    Reg x;
    memcpy(&x, wide, sizeof(x));
    return x;
  }
  static LLMQ_INLINE Reg int8(const void* at) {
    int8_t codes[kWidth];
    memcpy(codes, at, sizeof(codes));
    Reg x;
    for (int i = 0; i < kWidth; ++i) x[i] = static_cast<float>(codes[i]);
    return x;
  }
};

}  // namespace

const VectorKernels kVectorGeneric = vector_table<Isa>("generic");

}  // namespace llmq
