// Where everything lies in a packed weight: arithmetic on a format's numbers. Static, because every instruction set's file
// includes it.
#pragma once

#include "isa.h"

namespace llmq {

constexpr int64_t kBlock = 256;  // 256 * 128 * 32639 < 2^31: no sum of a block of 16-bit codes leaves int32
constexpr int64_t kStep = 8;     // inputs of one step of int4 codes; every row is padded to whole steps

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

static inline bool is_integer(const LlmqLinear& linear) {
  return linear.weight == LLMQ_WEIGHT_INT8 || linear.weight == LLMQ_WEIGHT_INT4;
}

// Whether int8 codes of x have no zero point; 16-bit ones have none either, but other steps.
static inline bool is_symmetric(int32_t activation) {
  return activation == LLMQ_ACTIVATION_INT8 || activation == LLMQ_ACTIVATION_STATIC;
}

static inline Layout layout_of(const LlmqLinear& linear) {
  Layout at = {};
  at.padded_k = round_up(linear.k, kStep);
  at.group = is_integer(linear) ? linear.group : linear.k;
  at.groups = linear.k / at.group;
  // int8 products of int8 codes never leave int32 (LLMQ_MAX_K), so a row with one scale is one sum.
  const bool whole_row = !is_integer(linear) || (linear.weight == LLMQ_WEIGHT_INT8 && at.groups == 1 &&
                                                 is_symmetric(linear.activation));
  at.block = whole_row ? linear.k : min_of(at.group, kBlock);
  at.blocks_per_group = ceil_div(at.group, at.block);
  at.blocks = at.groups * at.blocks_per_group;
  const int64_t number = linear.scale == LLMQ_SCALE_F32 ? 4 : linear.scale == LLMQ_SCALE_BF16 ? 2 : 0;
  const int64_t zero = linear.zero == LLMQ_ZERO_FLOAT ? number : linear.zero == LLMQ_ZERO_INT ? 1 : 0;
  at.zero_offset = kPanel * number;
  at.header_bytes = round_up(kPanel * (number + zero), 32);
  at.input_bytes = linear.weight == LLMQ_WEIGHT_INT4   ? 8
                          : linear.weight == LLMQ_WEIGHT_INT8 ? 16
                          : linear.weight == LLMQ_WEIGHT_BF16 ? 32
                                                              : 64;
  const int64_t group_k = at.groups == 1 ? at.padded_k : at.group;
  at.group_bytes = at.header_bytes + group_k * at.input_bytes;
  at.panel_bytes = at.groups * at.group_bytes;
  return at;
}

// One block of inputs: [begin, begin + size) of a row; its codes lie `offset` bytes into the panel, the header of its group
// at `header`.
struct Block {
  int64_t index, begin, size, header, offset;
  bool first_of_group;
};

static inline Block block_at(const Layout& layout, int64_t index) {
  const int64_t group = index / layout.blocks_per_group, within = index % layout.blocks_per_group * layout.block;
  Block at;
  at.index = index;
  at.begin = group * layout.group + within;
  at.size = min_of(layout.block, layout.group - within);
  at.header = group * layout.group_bytes;
  at.offset = at.header + layout.header_bytes + within * layout.input_bytes;
  at.first_of_group = within == 0;
  return at;
}

// The form of the codes of `m` rows. Codes of 16 bits that meet a multiplier of bytes need two planes, high and low.
struct Codes {
  int32_t planes, bytes;  // bytes of one code of one plane
};

static inline Codes codes_of(const IsaKernels& isa, const LlmqLinear& linear, int64_t m) {
  if (!is_integer(linear)) return {1, 4};
  const bool int8 = linear.weight == LLMQ_WEIGHT_INT8, sixteen = linear.activation == LLMQ_ACTIVATION_FLOAT;
  if (int8 && isa.wide8) return {1, 2};
  if (!int8 && sixteen && isa.wide4_rows && m >= isa.wide4_rows) return {1, 2};
  return {sixteen ? 2 : 1, 1};
}

}  // namespace llmq
