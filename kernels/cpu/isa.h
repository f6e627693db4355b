// What one instruction set offers to the dispatcher: a table of functions. Each isa_*.cpp defines one.
#pragma once

#include <stdint.h>

namespace llmq {

// Elements that may lie at any address. Structs, because an attribute of a typedef is lost when it becomes a template
// argument.
struct __attribute__((packed, may_alias)) F32 {
  float value;
};
struct __attribute__((packed, may_alias)) Bf16 {
  uint16_t bits;
};

constexpr int64_t kPanel = 16;      // output features of one packed panel
constexpr int64_t kTileRows = 48;   // most rows of one tile: their codes stay in L2 while the tile's panels pass
constexpr int64_t kTilePanels = 8;  // most panels of one tile; the tile's int32 sums, 24 KiB, live on the stack

enum class Dtype { kF32, kBf16 };

// Quantized rows of x, as the isa's multiplier wants them. [rows] each.
struct QuantizedRows {
  uint8_t* codes;     // rows of `row_bytes` bytes: K codes of Isa::Code, zeros up to a multiple of Isa::kUnit
  int64_t row_bytes;  // multiple of 64
  float* scale;
  int32_t* sum;  // of the row's codes; only written where the isa needs it
};

struct LinearJob {
  QuantizedRows rows;
  const uint8_t* packed;
  const F32* w_scale;  // [N]
  const F32* bias;     // [N] or null
  void* y;             // [rows, N] of `dtype`
  Dtype dtype;
  int64_t n, k;
};

struct Tile {
  int64_t row_begin, row_end;      // at most kTileRows
  int64_t panel_begin, panel_end;  // at most kTilePanels
};

struct IsaKernels {
  const char* name;
  const char* layout;
  int64_t unit;         // consecutive k that one int32 lane sums; K is padded to a multiple of it
  int64_t code_bytes;   // of one quantized activation
  int64_t row_step;     // rows of the largest micro kernel
  int64_t panel_step;   // panels of the largest micro kernel
  bool (*available)();  // does the processor, and the operating system, run it?

  // Panel `panel` of w [N, K] to its place in packed, and back.
  void (*pack)(const int8_t* w, uint8_t* packed, int64_t n, int64_t k, int64_t panel);
  void (*unpack)(const uint8_t* packed, int8_t* w, int64_t n, int64_t k, int64_t panel);
  // One row x [K] of `dtype` to int8 codes [K] and its scale.
  void (*quantize)(const void* x, Dtype dtype, int64_t k, float eps, int8_t* q, F32* scale);
  // One row x [K] of `dtype` to row `row` of `rows`.
  void (*quantize_row)(const void* x, Dtype dtype, int64_t k, float eps, const QuantizedRows& rows, int64_t row);
  // The outputs of one tile.
  void (*linear_tile)(const LinearJob& job, const Tile& tile);
};

extern const IsaKernels kGeneric;
#if defined(__x86_64__)
extern const IsaKernels kAvx2;
extern const IsaKernels kAvx512Vnni;
#elif defined(__aarch64__)
extern const IsaKernels kNeonDotprod;
#endif

}  // namespace llmq
