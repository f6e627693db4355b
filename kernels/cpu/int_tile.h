// Products of prepared rows and integer weights, written once for every instruction set (isa.h says why everything here is
// static or a template).
//
// Each isa_*.cpp defines, in an anonymous namespace, a struct `Isa` with what differs:
//
//   kUnit8, kFlip8, kWide8   the int8 layout; see IsaKernels
//   kRows8, kPanels8         largest micro8
//   kRows4, kExpand4         largest micro4; whether more rows than that are better served by codes expanded to bytes
//   kWide4Rows               from so many rows on 16-bit codes are one plane, and int4 weights are expanded for micro8; or 0
//   template <int R, int P> static void micro8(const Micro&)
//   template <int R> static void micro4(const Micro&)         nibbles, as they are packed
//   template <int R> static void micro4_bytes(const Micro&)   expanded by expand4, where kExpand4
//   expand4_for_micro8                                        the same for micro8, where kWide4Rows
//   template <int R> static void dot4(const uint8_t* weights, const uint8_t* const* planes, int64_t size, Words (*sums)[2])
//                                                             micro4 for a single row: always inlined, sums in registers
//
// A micro kernel adds products of codes, exactly. Everything else, the offsets of codes and the scales, is done here.
#pragma once

#include "rows.h"

namespace llmq {

// Never inlined: a micro kernel keeps its sums in registers only while nothing around it asks for some.
#define LLMQ_ALONE __attribute__((noinline))
// Between the rows of a micro kernel: GCC would load the inputs of all rows first, and then has no registers for the sums.
#define LLMQ_IN_ORDER asm volatile("" ::: "memory")
// Before each loop over an array of registers: only when unrolled early does GCC see that it is one.
#define LLMQ_UNROLL _Pragma("GCC unroll 16")

// R planes of codes times P panels of weights.
struct Micro {
  const uint8_t* codes;  // [R] planes, `plane_bytes` apart
  int64_t plane_bytes;
  const uint8_t* weights;  // [P] panels, `panel_bytes` apart
  int64_t panel_bytes;
  int64_t size;   // inputs; micro8: in whole units, micro4: in whole steps of 8
  bool add;       // to what `sums` holds, instead of starting from 0
  int32_t* sums;  // [P] of [R][16], `panel_sums` apart
  int64_t panel_sums;
};

static const uint8_t kOnes[kBlock] = {
#define LLMQ_ONES 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1
    LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES,
    LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES, LLMQ_ONES,
#undef LLMQ_ONES
};

// Codes of a tile's rows that are used for all of its panels before the next inputs have their turn: they stay in L2.
constexpr int64_t kSpanBytes = 256 * 1024;
// Inputs of a row with one scale that all rows of a tile use before the next have their turn: 16 KiB of a panel, in L1.
constexpr int64_t kPieceInputs = 1024;

// Eight lanes, for the compiler to map to whatever registers there are. It does not find them by itself in a loop over arrays
// of which it cannot know that they do not overlap.
constexpr int64_t kLanes = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class Vector>
static inline __attribute__((always_inline)) Vector load_lanes(const void* from) {
  Vector lanes;
  memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

// What a row brings to the sums of one block.
struct RowFactors {
  uint32_t sum, zero;  // of its codes; its zero point
  float step, all;     // what a code is worth; what they are worth together
};
constexpr int64_t kRowBlocks = 1024;  // most blocks of a row whose factors lie on the stack: K up to 32,768 in groups of 32

// Scales and zero points of one group of 16 outputs, as numbers.
struct Header {
  float scale[kPanel];
  float zero[kPanel];       // LLMQ_ZERO_FLOAT
  int32_t offset[kPanel];   // what a stored code is above the code it means
};

static inline void store(F32* y, float value) { y->value = value; }
static inline void store(Bf16* y, float value) { y->bits = bf16_bits(value); }

// Sixteen results of one row to their place.
static inline void store_panel(const TileJob& job, int64_t row, int64_t column, const float* values) {
  const int64_t columns = min_of(kPanel, job.linear->n - column);
  const int64_t at = row * job.y_stride + column;
  if (job.dtype == Dtype::kBf16) {
    Bf16* y = static_cast<Bf16*>(job.y) + at;
    for (int64_t j = 0; j < columns; ++j) store(y + j, values[j]);
  } else if (job.dtype == Dtype::kF32) {
    memcpy(static_cast<F32*>(job.y) + at, values, static_cast<size_t>(columns) * sizeof(float));
  } else {
    F32* y = static_cast<F32*>(job.y) + at;
    for (int64_t j = 0; j < columns; ++j) store(y + j, float_of(static_cast<uint32_t>(bf16_bits(values[j])) << 16));
  }
}

static inline void load_bias(const TileJob& job, int64_t column, float* bias) {
  memset(bias, 0, kPanel * sizeof(float));
  const size_t columns = static_cast<size_t>(min_of(kPanel, job.linear->n - column));
  memcpy(bias, job.linear->bias + column, columns * sizeof(float));
}

static inline void load_numbers(const uint8_t* from, int32_t kind, float* numbers) {
  if (kind == LLMQ_SCALE_F32) {
    memcpy(numbers, from, kPanel * sizeof(float));
  } else {
    const Bf16* stored = reinterpret_cast<const Bf16*>(from);
    for (int64_t j = 0; j < kPanel; ++j) numbers[j] = float_of(bits_of(stored[j]));
  }
}

template <class Isa, bool kInt4>
struct IntTile {
  static constexpr int kMicroRows = kInt4 ? Isa::kRows4 : Isa::kRows8;
  static constexpr int kMicroPanels = kInt4 ? 1 : Isa::kPanels8;
  static constexpr int32_t kStored = kInt4 ? 0 : Isa::kFlip8;  // a stored int8 code is this much above the code

  union Sums {
    float number[kTilePanels][kTileRows][kPanel];   // of scaled blocks
    int32_t exact[kTilePanels][kTileRows][kPanel];  // of a whole row that has one scale
  };

  static void load_header(const LlmqLinear& linear, const Layout& layout, const uint8_t* at, Header* header) {
    load_numbers(at, linear.scale, header->scale);
    for (int64_t j = 0; j < kPanel; ++j) header->offset[j] = kInt4 ? 8 : kStored;
    if (linear.zero == LLMQ_ZERO_FLOAT) load_numbers(at + layout.zero_offset, linear.scale, header->zero);
    if (linear.zero == LLMQ_ZERO_INT) {
      for (int64_t j = 0; j < kPanel; ++j) header->offset[j] = at[layout.zero_offset + j];
    }
  }

  using MicroFunction = void (*)(const Micro&);

  // Where a micro kernel finds the weights: as they are packed, or expanded for many rows.
  enum Weights { kPacked, kBytes, kForMicro8 };

  // The micro kernel of exactly `count` planes, 1 <= count <= kMicroRows, for one panel.
  template <int R = kMicroRows>
  static MicroFunction micro_of(int64_t count, Weights form) {
    if constexpr (R > 1) {
      if (count < R) return micro_of<R - 1>(count, form);
    }
    if constexpr (!kInt4) return Isa::template micro8<R, 1>;
    if constexpr (kInt4 && (Isa::kWide4Rows > 0)) {
      if (form == kForMicro8) return Isa::template micro8<R, 1>;
    }
    if constexpr (kInt4 && Isa::kExpand4) {
      if (form == kBytes) return Isa::template micro4_bytes<R>;
    }
    if constexpr (kInt4) return Isa::template micro4<R>;
  }

  static const uint8_t* expand(Weights form, const uint8_t* packed, uint8_t* bytes, int64_t size) {
    if constexpr (kInt4 && (Isa::kWide4Rows > 0)) {
      if (form == kForMicro8) Isa::expand4_for_micro8(packed, bytes, size);
    }
    if constexpr (kInt4 && Isa::kExpand4) {
      if (form == kBytes) Isa::expand4(packed, bytes, size);
    }
    return bytes;
  }

  // The same for int8 weights and P panels.
  template <int P, int R = kMicroRows>
  static void micro8(int64_t count, const Micro& operands) {
    if constexpr (R > 1) {
      if (count < R) return micro8<P, R - 1>(count, operands);
    }
    Isa::template micro8<R, P>(operands);
  }

  // What the rows of a tile need to turn the sums of one block into numbers.
  struct Flush {
    const TileJob& job;
    const Block& block;
    const Header& header;
    const int32_t* codes;  // [16]: sums of the codes themselves, for activations with a zero point
  };

  // Sums [rows * kPlanes][16] of one block, scaled and added to `numbers`. What a format lacks is not compiled in: this
  // follows every 32 to 256 inputs.
  template <int kPlanes, int kZero, bool kCodes>
  static void flush(const Flush& f, int64_t row, int64_t rows, const int32_t* sums, float (*numbers)[kPanel]) {
    const Rows& x = f.job.rows;
    const bool blocks_scaled = f.job.linear->activation == LLMQ_ACTIVATION_FLOAT;
    for (int64_t r = 0; r < rows; ++r, sums += kPlanes * kPanel) {
      const int64_t at = (row + r) * f.job.layout->blocks + f.block.index;
      const uint32_t row_sum = static_cast<uint32_t>(x.sum[at]);
      const float step = blocks_scaled ? x.scale[at] : 1.0f;
      const uint32_t offset = static_cast<uint32_t>(kInt4 ? 8 : kStored) * row_sum;
      const uint32_t zero = kCodes ? static_cast<uint32_t>(x.zero[row + r]) : 0;
      const float all = static_cast<float>(static_cast<int32_t>(row_sum)) * step;
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        Words exact = load_lanes<Words>(sums + j);  // modulo 2^32; the true sum fits
        if constexpr (kPlanes == 2) exact = (exact << 8) + load_lanes<Words>(sums + kPanel + j);
        if constexpr (kZero == LLMQ_ZERO_INT) {
          exact -= load_lanes<Words>(f.header.offset + j) * row_sum;
        } else {
          exact -= offset;
        }
        if constexpr (kCodes) exact -= load_lanes<Words>(f.codes + j) * zero;
        Floats number = load_lanes<Floats>(numbers[r] + j);
        number += __builtin_convertvector(reinterpret_cast<Ints>(exact), Floats) *
                  (load_lanes<Floats>(f.header.scale + j) * step);
        if constexpr (kZero == LLMQ_ZERO_FLOAT) number += load_lanes<Floats>(f.header.zero + j) * all;
        memcpy(numbers[r] + j, &number, sizeof(number));
      }
    }
  }

  using SpanFunction = void (*)(const TileJob&, int64_t, int64_t, int64_t, float (*)[kPanel]);

  static SpanFunction span_of(const LlmqLinear& linear, int32_t planes) {
    if constexpr (!kInt4) return planes == 2 ? block_span<2, LLMQ_ZERO_NONE, false> : block_span<1, LLMQ_ZERO_NONE, false>;
    const bool whole = linear.zero == LLMQ_ZERO_INT;
    if (linear.activation == LLMQ_ACTIVATION_UINT8) {
      return whole ? block_span<1, LLMQ_ZERO_INT, true> : block_span<1, LLMQ_ZERO_NONE, true>;
    }
    if (planes == 1) {
      if (linear.zero == LLMQ_ZERO_FLOAT) return block_span<1, LLMQ_ZERO_FLOAT, false>;
      return whole ? block_span<1, LLMQ_ZERO_INT, false> : block_span<1, LLMQ_ZERO_NONE, false>;
    }
    if (linear.zero == LLMQ_ZERO_FLOAT) return block_span<2, LLMQ_ZERO_FLOAT, false>;
    return whole ? block_span<2, LLMQ_ZERO_INT, false> : block_span<2, LLMQ_ZERO_NONE, false>;
  }

  static void tile(const TileJob& job) {
    Sums sums;
    const Layout& layout = *job.layout;
    const int64_t rows = job.row_end - job.row_begin;
    const bool whole_row = layout.blocks == 1 && layout.block > kBlock;
    // Rows whose micro kernels are one are read from end to end, as memory likes it best.
    const bool one_micro = rows * job.rows.planes <= kMicroRows;
    const int64_t row_codes = job.rows.planes * job.rows.code_bytes;
    if (!kInt4 && whole_row) {
      const int64_t piece = one_micro ? layout.padded_k : kPieceInputs;
      const int64_t pieces = max_of(1, kSpanBytes / (rows * row_codes * piece));
      for (int64_t k = 0; k < layout.padded_k; k += piece * pieces) {
        const int64_t end = min_of(k + piece * pieces, layout.padded_k);
        int64_t p = job.panel_begin;
        for (; p + kMicroPanels <= job.panel_end; p += kMicroPanels) {
          exact_span<kMicroPanels>(job, p, k, end, piece, &sums);
        }
        for (; p < job.panel_end; ++p) exact_span<1>(job, p, k, end, piece, &sums);
      }
    } else if (kInt4 && rows == 1 && job.rows.code_bytes == 1 && layout.blocks <= kRowBlocks) {
      if constexpr (kInt4) row_tile(job, &sums);
    } else {
      memset(&sums, 0, static_cast<size_t>(job.panel_end - job.panel_begin) * sizeof(sums.number[0]));
      const SpanFunction block_span = span_of(*job.linear, job.rows.planes);
      const int64_t span = one_micro ? layout.blocks : max_of(1, kSpanBytes / (rows * row_codes * layout.block));
      for (int64_t b = 0; b < layout.blocks; b += span) {
        const int64_t end = min_of(b + span, layout.blocks);
        for (int64_t p = job.panel_begin; p < job.panel_end; ++p) {
          block_span(job, p, b, end, sums.number[p - job.panel_begin]);
        }
      }
    }
    for (int64_t p = job.panel_begin; p < job.panel_end; ++p) finish(job, p, whole_row, &sums);
  }

  // All rows of the tile times P panels, inputs [begin, end) of a row with one scale, `piece` at a time. Rows are dealt out
  // evenly (7 = 4 + 3, not 6 + 1), since a micro kernel of few rows does little with each weight that it loads.
  template <int P>
  static void exact_span(const TileJob& job, int64_t panel, int64_t begin, int64_t end, int64_t piece, Sums* sums) {
    const Layout& layout = *job.layout;
    const int64_t rows = job.row_end - job.row_begin;
    Micro operands;
    operands.plane_bytes = job.rows.plane_bytes;
    operands.panel_bytes = layout.panel_bytes;
    operands.panel_sums = kTileRows * kPanel;
    for (int64_t k = begin; k < end; k += piece) {
      operands.size = min_of(piece, end - k);
      operands.weights =
          job.linear->packed + panel * layout.panel_bytes + layout.header_bytes + k * layout.input_bytes;
      operands.add = k > 0;
      int64_t row = 0;
      for (int64_t left = ceil_div(rows, kMicroRows); left > 0; --left) {
        const int64_t count = ceil_div(rows - row, left);
        operands.codes = job.rows.codes + (job.row_begin + row) * job.rows.plane_bytes +
                         k * job.rows.code_bytes;
        operands.sums = sums->exact[panel - job.panel_begin][row];
        micro8<P>(count, operands);
        row += count;
      }
    }
  }

  // All rows of the tile times one panel, blocks [begin, end), each scaled as soon as it is summed.
  template <int kPlanes, int kZero, bool kCodes>
  static void block_span(const TileJob& job, int64_t panel, int64_t begin, int64_t end, float (*numbers)[kPanel]) {
    constexpr int64_t kMost = kMicroRows / kPlanes;  // rows of one micro kernel
    constexpr bool kCanExpand = kInt4 && (Isa::kExpand4 || Isa::kWide4Rows > 0);
    const bool wide = kInt4 && job.rows.code_bytes == 2;
    const Layout& layout = *job.layout;
    const int64_t rows = job.row_end - job.row_begin;
    const uint8_t* base = job.linear->packed + panel * layout.panel_bytes;
    const Weights form = wide ? kForMicro8 : kInt4 && Isa::kExpand4 && rows > kMost ? kBytes : kPacked;
    // Rows are dealt out evenly: the first `longer` micro kernels do one more than the others.
    const int64_t kernels = ceil_div(rows, kMost), each = rows / kernels, longer = rows % kernels;
    const MicroFunction micro_each = micro_of(each * kPlanes, form);
    const MicroFunction micro_longer = micro_of(longer ? (each + 1) * kPlanes : each * kPlanes, form);
    alignas(kLine) int32_t sums[kMicroRows][kPanel], codes[kPanel];
    alignas(kLine) uint8_t bytes[kCanExpand ? kBlock * kPanel : 1];
    Header header = {};
    Micro operands;
    operands.plane_bytes = job.rows.plane_bytes;
    operands.panel_bytes = 0;
    operands.panel_sums = 0;
    operands.add = false;
    for (int64_t b = begin; b < end; ++b) {
      const Block block = block_at(layout, b);
      if (block.first_of_group || b == begin) load_header(*job.linear, layout, base + block.header, &header);
      operands.size = round_up(block.size, kStep);
      operands.weights = base + block.offset;
      if constexpr (kCodes) {
        operands.codes = kOnes;
        operands.sums = codes;
        micro_of(1, kPacked)(operands);
        for (int64_t j = 0; j < kPanel; ++j) codes[j] -= static_cast<int32_t>(block.size) * header.offset[j];
      }
      if (form != kPacked) operands.weights = expand(form, operands.weights, bytes, operands.size);
      const Flush how = {job, block, header, codes};
      operands.sums = &sums[0][0];
      int64_t row = 0;
      for (int64_t i = 0; i < kernels; ++i) {
        const int64_t count = each + (i < longer), at = job.row_begin + row;
        operands.codes = job.rows.codes + at * kPlanes * job.rows.plane_bytes + block.begin * job.rows.code_bytes;
        (i < longer ? micro_longer : micro_each)(operands);
        flush<kPlanes, kZero, kCodes>(how, at, count, &sums[0][0], numbers + row);
        row += count;
      }
    }
  }

  // One row times the tile's panels of int4 weights: a decode step. A block's sums stay in registers until they are scaled; going
  // through memory, as for many rows, would take as long as the products. Block by block over all panels: a core reads several
  // streams of memory at once faster than one.
  template <int kPlanes, int kZero, bool kCodes>
  static void row_span(const TileJob& job, const RowFactors* factors, Sums* sums) {
    const Layout& layout = *job.layout;
    const uint8_t* codes = job.rows.codes + job.row_begin * job.rows.planes * job.rows.plane_bytes;
    const bool wide_scale = job.linear->scale == LLMQ_SCALE_F32;
    const int64_t panels = job.panel_end - job.panel_begin;
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const Block block = block_at(layout, b);
      const RowFactors& row = factors[b];
      const uint8_t* planes[2] = {codes + block.begin, kCodes ? kOnes : codes + job.rows.plane_bytes + block.begin};
      const uint8_t* base = job.linear->packed + job.panel_begin * layout.panel_bytes;
      for (int64_t p = 0; p < panels; ++p, base += layout.panel_bytes) {
        const uint8_t* header = base + block.header;
        Floats scale[2] = {}, zero[2] = {};
        Words offset[2] = {};
        load_pair(header, wide_scale, scale);
        if constexpr (kZero == LLMQ_ZERO_FLOAT) load_pair(header + layout.zero_offset, wide_scale, zero);
        if constexpr (kZero == LLMQ_ZERO_INT) {
          for (int64_t j = 0; j < kPanel; ++j) offset[j / kLanes][j % kLanes] = header[layout.zero_offset + j];
        }
        constexpr int kDots = kCodes ? 2 : kPlanes;
        Words dots[2][2];
        Isa::template dot4<kDots>(base + block.offset, planes, round_up(block.size, kStep), dots);
        for (int h = 0; h < 2; ++h) {
          Words exact = dots[0][h];
          if constexpr (kPlanes == 2) exact = (exact << 8) + dots[1][h];
          if constexpr (kZero == LLMQ_ZERO_INT) {
            exact -= offset[h] * row.sum;
          } else {
            exact -= 8 * row.sum;
          }
          if constexpr (kCodes) {
            const uint32_t size = static_cast<uint32_t>(block.size);
            exact -= (kZero == LLMQ_ZERO_INT ? dots[1][h] - offset[h] * size : dots[1][h] - 8 * size) * row.zero;
          }
          float* at = sums->number[p][0] + h * kLanes;
          Floats number = b == 0 ? Floats{} : load_lanes<Floats>(at);
          number += __builtin_convertvector(reinterpret_cast<Ints>(exact), Floats) * (scale[h] * row.step);
          if constexpr (kZero == LLMQ_ZERO_FLOAT) number += zero[h] * row.all;
          memcpy(at, &number, sizeof(number));
        }
      }
    }
  }

  // Sixteen fp32 or bf16 numbers, widened.
  static inline __attribute__((always_inline)) void load_pair(const uint8_t* from, bool wide, Floats* numbers) {
    for (int h = 0; h < 2; ++h) {
      if (wide) {
        numbers[h] = load_lanes<Floats>(from + 32 * h);
      } else {
        const Halves halves = load_lanes<Halves>(from + 16 * h);
        numbers[h] = reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
      }
    }
  }

  using RowFunction = void (*)(const TileJob&, const RowFactors*, Sums*);

  static RowFunction row_of(const LlmqLinear& linear) {
    const bool whole = linear.zero == LLMQ_ZERO_INT;
    if (linear.activation == LLMQ_ACTIVATION_UINT8) {
      return whole ? row_span<1, LLMQ_ZERO_INT, true> : row_span<1, LLMQ_ZERO_NONE, true>;
    }
    if (is_symmetric(linear.activation)) {
      return whole ? row_span<1, LLMQ_ZERO_INT, false> : row_span<1, LLMQ_ZERO_NONE, false>;
    }
    if (linear.zero == LLMQ_ZERO_FLOAT) return row_span<2, LLMQ_ZERO_FLOAT, false>;
    return whole ? row_span<2, LLMQ_ZERO_INT, false> : row_span<2, LLMQ_ZERO_NONE, false>;
  }

  // Panels of the tile's only row.
  static void row_tile(const TileJob& job, Sums* sums) {
    RowFactors factors[kRowBlocks];
    const int64_t blocks = job.layout->blocks;
    const bool blocks_scaled = job.linear->activation == LLMQ_ACTIVATION_FLOAT;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = job.row_begin * blocks + b;
      RowFactors& row = factors[b];
      row.sum = static_cast<uint32_t>(job.rows.sum[at]);
      row.step = blocks_scaled ? job.rows.scale[at] : 1.0f;
      row.all = static_cast<float>(static_cast<int32_t>(row.sum)) * row.step;
      row.zero = job.linear->activation == LLMQ_ACTIVATION_UINT8 ? static_cast<uint32_t>(job.rows.zero[job.row_begin]) : 0;
    }
    row_of(*job.linear)(job, factors, sums);
  }

  // The scale of the row and the bias, and out.
  static void finish(const TileJob& job, int64_t panel, bool whole_row, const Sums* sums) {
    const int64_t column = panel * kPanel, in_tile = panel - job.panel_begin;
    Header header = {};
    if (whole_row) load_header(*job.linear, *job.layout, job.linear->packed + panel * job.layout->panel_bytes, &header);
    float bias[kPanel];
    if (job.linear->bias) load_bias(job, column, bias);
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
      float out[kPanel];
      if (whole_row) {
        const uint32_t offset = static_cast<uint32_t>(kStored) * static_cast<uint32_t>(job.rows.sum[row]);
        const int32_t* exact = sums->exact[in_tile][row - job.row_begin];
        for (int64_t j = 0; j < kPanel; ++j) {
          out[j] = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(exact[j]) - offset)) * header.scale[j];
        }
      } else {
        memcpy(out, sums->number[in_tile][row - job.row_begin], sizeof(out));
      }
      if (job.linear->activation != LLMQ_ACTIVATION_FLOAT) {
        const float scale = job.rows.scale[row];
        for (int64_t j = 0; j < kPanel; ++j) out[j] *= scale;
      }
      if (job.linear->bias) {
        for (int64_t j = 0; j < kPanel; ++j) out[j] += bias[j];
      }
      store_panel(job, row, column, out);
    }
  }
};

}  // namespace llmq
