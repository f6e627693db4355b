// What one instruction set offers between the linears of a Llama: a table of functions, which each vector_*.cpp defines
// from the templates in vector_ops.h and attention.h. What isa.h says about linkage holds here too.
//
// Everything is fp32. `round` asks for numbers that bf16 has, rounded to nearest even, and kept in fp32. Scratch memory
// and fp32 results are the caller's and begin at multiples of 64 bytes; what users own (F32, Bf16, void) lies at any
// address.
#pragma once

#include "isa.h"

namespace llmq {

constexpr int64_t kKeyBlock = 64;  // keys that meet a block of queries at a time: with their values 32 KiB for D = 64
constexpr int64_t kDecodeKeys = 256;  // keys of one task of a decode step; the split depends on nothing else
constexpr int64_t kBlockRows =
    128;  // rows (queries of all heads of a group) of one task of a prefill, at least one position

enum class KVDtype { kF32, kBf16, kInt8 };

// Keys and values of one key-value head of one sequence, [length, D] each.
struct HeadCache {
  const void* keys;
  const void* values;
  const F32* key_scale;    // [length] for int8, else null
  const F32* value_scale;  // the same
  KVDtype dtype;
};

// The queries of one position that share a key-value head.
struct DecodeJob {
  HeadCache cache;
  int64_t head_dim, queries;
  int64_t key_begin, key_end;  // what they see, at most kDecodeKeys
  const float* q;              // [queries up to a multiple of 4, padded D]: rotated, scaled, zeros elsewhere
  float* scratch;              // decode_floats()
  float* partial;  // partial_floats(): sums [queries, padded D], their greatest scores, their sums of weights
};

// Rows of queries that share a key-value head; row r is at position `position` + r / group.
struct BlockJob {
  HeadCache cache;
  int64_t head_dim, rows, group;
  int64_t position;
  int64_t window;  // keys that a query sees, itself included; 0: all before it
  bool round;
  const float* q;  // [rows, padded D]: rotated, scaled, zeros behind D
  float* scratch;  // block_floats()
  float* out;      // [rows, padded D]
};

struct VectorKernels {
  const char* name;
  int64_t columns;  // the padded D is a multiple of it

  void (*widen)(const void* x, Dtype dtype, int64_t n, float* y);
  void (*narrow)(const float* x, Dtype dtype, int64_t n, void* y);
  // y = exp(x), relative error below 2^-22 where the result is a normal number; 0 below, infinity above.
  void (*exp)(const F32* x, F32* y, int64_t n);
  // h += add (where there is one), then y = h / sqrt(mean(h^2) + eps) * weight.
  void (*norm)(float* h, const float* add, const F32* weight, float eps, bool round, int64_t n, float* y);
  // y = silu(gate) * up, rounded after each of the two.
  void (*silu_mul)(const float* gate, const float* up, bool round, int64_t n, float* y);
  // y = (x turned by a position's angles, rounded) * scale; cosines and sines [D] as rope.rotation_table has them.
  void (*rotate)(const float* x, const F32* cosines, const F32* sines, bool round, float scale, int64_t d, float* y);
  // One row to int8 codes and a scale: max(max |x| / 127, 1e-8), clamp(rint(x * (1 / scale)), -127, 127).
  void (*quantize)(const float* x, int64_t n, int8_t* codes, F32* scale);

  // Not yet divided sums over the keys of one task, and over all tasks: y [D] of query `query`, rounded.
  void (*decode)(const DecodeJob& job);
  void (*combine)(const float* partials, int64_t count, int64_t stride, int64_t queries, int64_t query, bool round,
                  int64_t d, float* y);
  void (*block)(const BlockJob& job);
};

static inline int64_t pad_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Floats of scratch and results, all multiples of 16.
static inline int64_t padded_dim(const VectorKernels& v, int64_t d) { return pad_to(d, v.columns); }
static inline int64_t partial_floats(const VectorKernels& v, int64_t queries, int64_t d) {
  return pad_to(pad_to(queries, 4) * (padded_dim(v, d) + 2), 16);
}
static inline int64_t decode_floats() { return 2 * 4 * (kDecodeKeys + 16); }
static inline int64_t block_rows(int64_t group) { return group > kBlockRows ? group : kBlockRows / group * group; }
static inline int64_t block_floats(const VectorKernels& v, int64_t rows, int64_t d) {
  return pad_to(rows, 16) * 2 + rows * kKeyBlock + 2 * kKeyBlock * padded_dim(v, d);
}

extern const VectorKernels kVectorGeneric;
#if defined(__x86_64__)
extern const VectorKernels kVectorAvx2;
extern const VectorKernels kVectorAvx512;
#elif defined(__aarch64__)
extern const VectorKernels kVectorNeon;
#endif

}  // namespace llmq
