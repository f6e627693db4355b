// The linears inside the library: rows of x are prepared once, and multiplied with as many weights as share them.
//
// Both halves are functions of a range (rows, tiles), so that a caller can hand the ranges to the threads of its own
// parallel region, between its own phases.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace llmq {

// Bytes of memory for `m` rows, a multiple of 64; the memory must begin at a multiple of 64.
int64_t rows_bytes(const IsaKernels& isa, const LlmqLinear& linear, int64_t m);
Rows rows_in(const IsaKernels& isa, const LlmqLinear& linear, int64_t m, uint8_t* memory);

// Whether rows prepared for `a` serve `b` too: q, k and v mostly, gate and up.
bool same_rows(const IsaKernels& isa, const LlmqLinear& a, const LlmqLinear& b);

// Prepares rows [begin, end). x: [m, K] of `dtype`, rows `stride` elements apart. Any split of the rows over any threads
// gives the same result; a split never crosses a row.
void prepare_rows(const IsaKernels& isa, const LlmqLinear& linear, const void* x, Dtype dtype, int64_t stride,
                  const Rows& rows, int64_t begin, int64_t end);

// Where the products of one linear go.
struct Product {
  const LlmqLinear* linear;
  Rows rows;
  int64_t m;  // rows
  void* y;    // [m, N] of `dtype`, rows `y_stride` elements apart
  Dtype dtype;
  int64_t y_stride;
};

// How many independent tasks `product` is cut into for `n_threads`, and one of them. A tile's result depends neither on
// the cut nor on the other rows.
int64_t tile_count(const IsaKernels& isa, const Product& product, int32_t n_threads);
void multiply_tile(const IsaKernels& isa, const Product& product, int32_t n_threads, int64_t tile);

// LLMQ_STATUS_OK, or what is wrong with the format; pointers are not looked at.
int32_t check_linear(const LlmqLinear& linear);

}  // namespace llmq
