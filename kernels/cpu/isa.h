// What one instruction set offers: a table of functions. Each isa_*.cpp defines one, of the templates in rows.h,
// int_tile.h and float_tile.h.
//
// Those templates are compiled once for each instruction set, each with its own -m flags. Nothing in them may get external
// linkage: a function that two such translation units share would be kept by the linker in one copy only, and that copy may
// hold instructions the machine does not have. Hence: templates over a type of an anonymous namespace, `static` functions,
// and no C++ standard library. A test looks at the objects' symbols.
#pragma once

#include <stdint.h>

#include "llmq_cpu.h"

namespace llmq {

// Elements that may lie at any address. Structs, because an attribute of a typedef is lost when it becomes a template
// argument.
struct __attribute__((packed, may_alias)) F32 {
  float value;
};
struct __attribute__((packed, may_alias)) Bf16 {
  uint16_t bits;
};

// kF32OfBf16: fp32 in memory, each number rounded to one that bf16 has. For results only.
enum class Dtype { kF32, kBf16, kF32OfBf16 };

constexpr int64_t kPanel = 16;      // output features of one packed panel
constexpr int64_t kTileRows = 48;   // most rows of one tile: their codes stay in L2 while the tile's panels pass
constexpr int64_t kTilePanels = 8;  // most panels of one tile; the tile's sums, 24 KiB, live on the stack
constexpr int64_t kLine = 64;       // bytes of a cache line

// Rows of x as the linears of one instruction set and one format multiply them. A view: the memory is the caller's.
//
// Integer weights: integer codes, in one plane of int16 or int8, or in two of int8 (high and low byte of 16-bit codes:
// code = 256 * high + low, both signed). Float weights: fp32 numbers. Zeros up to a multiple of 8 inputs.
struct Rows {
  uint8_t* codes;
  float* scale;         // [rows, blocks], or [rows] for int8 activations
  int32_t* sum;         // [rows, blocks]: sum of the codes of a block
  int32_t* zero;        // [rows]: zero points of asymmetric int8 activations
  int64_t plane_bytes;  // from one plane of a row to its next; a multiple of 64
  int32_t planes;       // 1 or 2; a row has planes * plane_bytes bytes
  int32_t code_bytes;   // of one code of one plane
};

// How the inputs of a weight are cut, and where everything lies in its packed form; layout.h computes it.
//
// Packed: panels of 16 outputs; in a panel the groups, each a header (16 scales, then 16 zero points where there are some,
// up to a multiple of 32 bytes) and the codes of its inputs. The header lies beside the codes that need it, so that a panel
// is one stream of memory.
struct Layout {
  int64_t groups;            // scales of a row
  int64_t group;             // inputs of a group
  int64_t block;             // most inputs that are summed as integers before they are scaled
  int64_t blocks_per_group;  //
  int64_t blocks;            // of a row
  int64_t padded_k;          // K up to a whole step of codes
  int64_t header_bytes;      // of a group
  int64_t zero_offset;       // of the zero points in the header
  int64_t group_bytes;       // header and codes
  int64_t panel_bytes;
  int64_t input_bytes;       // of the codes of one input and 16 outputs: 8 (int4), 16 (int8), 32 (bf16), 64 (fp32)
};

// A product of prepared rows and one weight, and the part of it that is one task.
struct TileJob {
  const LlmqLinear* linear;
  const Layout* layout;
  Rows rows;
  void* y;  // [rows, N] of `dtype`, rows `y_stride` elements apart
  Dtype dtype;
  int64_t y_stride;
  int64_t row_begin, row_end;      // at most kTileRows
  int64_t panel_begin, panel_end;  // at most kTilePanels
};

struct VectorKernels;

struct IsaKernels {
  const char* name;
  const char* layouts[4];  // of LLMQ_WEIGHT_INT8, INT4, BF16, F32
  int32_t unit8;           // consecutive inputs of an output in the int8 layout: those that one int32 lane sums at once
  uint8_t flip8;           // xor of each stored int8 weight: 0, or 0x80 for code + 128
  bool wide8;              // int8 weights meet int16 codes, one plane; else int8 codes
  int32_t rows8, panels8;  // of the largest micro kernel for int8 weights, in planes of rows
  int32_t rows4;           // for int4
  int32_t wide4_rows;      // from so many rows on, 16-bit codes meet int4 weights in one plane of int16, too; 0: never
  int32_t rows_float;
  bool (*available)();  // does the processor, and the operating system, run it?

  // Row `row` of x, [K] of `dtype`, to its place in `rows`.
  void (*prepare_row)(const LlmqLinear& linear, const Layout& layout, const void* x, Dtype dtype, const Rows& rows,
                      int64_t row);
  // One row x [K] of `dtype` to symmetric int8 codes [K] and its scale.
  void (*quantize)(const void* x, Dtype dtype, int64_t k, float eps, int8_t* q, F32* scale);
  void (*int8_tile)(const TileJob& job);
  void (*int4_tile)(const TileJob& job);
  void (*float_tile)(const TileJob& job);
  const VectorKernels* vector;
};

extern const IsaKernels kGeneric;
#if defined(__x86_64__)
extern const IsaKernels kAvx2;
extern const IsaKernels kAvx512Vnni;
#elif defined(__aarch64__)
extern const IsaKernels kNeonDotprod;
#endif

}  // namespace llmq
