// Canonical tensors to packed weights and back, a panel at a time; layout.h says where everything lies.
#pragma once

#include "isa.h"

namespace llmq {

struct PackJob {
  const IsaKernels* isa;
  const LlmqLinear* linear;
  uint8_t* packed;
  void* weight;  // [N, K]: int8, uint8 codes 0..15, bf16 or fp32
  float* scale;  // [N, groups]
  float* zero;   // [N, groups] or null
};

void pack_panel(const PackJob& job, int64_t panel);
void unpack_panel(const PackJob& job, int64_t panel);

}  // namespace llmq
