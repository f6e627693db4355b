// The int8 linear, written once for every instruction set.
//
// Each isa_*.cpp defines, in an anonymous namespace, a struct `Isa` with what differs (see below), and instantiates
// this. Nothing here may get external linkage: a function shared between translation units of different -m flags would
// be kept by the linker in one copy only, and that copy may hold instructions the machine does not have. Hence:
// templates over a type of an anonymous namespace, `static` functions, and no C++ standard library. A test looks at the
// objects' symbols.
//
// struct Isa {
//   using Code;                     // how a quantized activation is stored: int16_t or int8_t
//   static constexpr int kUnit;     // consecutive k that one int32 lane sums at a time
//   static constexpr int kMaxRows;  // rows of the largest micro kernel
//   static constexpr int kMaxPanels;// panels of the largest micro kernel
//   static constexpr uint8_t kFlip; // xor of each stored weight byte: 0, or 0x80 for code + 128
//   template <int R, int P> static void micro(const Operands<Isa>&, int64_t steps, bool first);
// };
#pragma once

#include <string.h>

#include "isa.h"

namespace llmq {

// What one micro kernel reads and adds to: R rows of codes times P panels of weights.
template <class Isa>
struct Operands {
  const typename Isa::Code* codes;  // [R, steps * kUnit], rows `code_stride` apart
  int64_t code_stride;
  const uint8_t* weights;  // [P] panels of [steps][16][kUnit], `panel_bytes` apart
  int64_t panel_bytes;
  const int32_t* start;  // [R]: what each sum begins with
  int32_t* sums;         // [P] of [R][16], `panel_sums` apart
  int64_t panel_sums;
};

// Inputs that a micro kernel sums before the next block of rows has its turn: a panel's share, 16 KiB, stays in L1
// until every row of the tile has used it.
constexpr int64_t kBlockInputs = 1024;
// Codes of a tile's rows that are used for all of its panels before the next inputs have their turn: they stay in L2.
// Within that limit a panel is read from end to end, as memory likes it best.
constexpr int64_t kSpanBytes = 256 * 1024;
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
constexpr uint32_t kInfBits = 0x7f800000u;

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
static inline uint32_t bits_of(F32 x) { return bits_of(x.value); }
static inline uint32_t bits_of(Bf16 x) {
  return static_cast<uint32_t>(x.bits) << 16;
}  // a bf16 is the upper half of a float
static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The kUnit codes that one lane multiplies, as its 32 bits.
static inline int32_t load_lane(const void* codes) {
  int32_t lane;
  memcpy(&lane, codes, sizeof(lane));
  return lane;
}

// Round to nearest, ties to even. Exact for |x| < 2^22, and the same in every instruction set, SSE2 included.
static inline float round_even(float x) { return (x + kRoundMagic) - kRoundMagic; }

static inline uint16_t bf16_bits(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > kInfBits ? 0x7fc0u : rounded);
}

static inline void store(F32* y, float value) { y->value = value; }
static inline void store(Bf16* y, float value) { y->bits = bf16_bits(value); }

// The largest |x| as bits. As integers, the bits of non-negative floats are ordered like the floats, with the infinity
// and then the NaNs above all numbers: one integer maximum finds the largest magnitude and anything not finite.
template <class Isa, class In>
static int32_t absmax_bits(const In* x, int64_t k) {
  int32_t most = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(x[i]) & 0x7fffffffu);
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

// One row: the codes to `q`, the scale returned. Codes of a row that is not finite are 0.
template <class Isa, class In, class Code>
static float quantize_into(const In* x, int64_t k, float eps, Code* q) {
  const int32_t most = absmax_bits<Isa>(x, k);
  if (static_cast<uint32_t>(most) >= kInfBits) {
    memset(q, 0, static_cast<size_t>(k) * sizeof(Code));
    return static_cast<uint32_t>(most) == kInfBits ? float_of(kInfBits) : float_of(0x7fc00000u);
  }
  const float by_range = float_of(static_cast<uint32_t>(most)) / 127.0f;
  const float scale = by_range > eps ? by_range : eps;
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < k; ++i) {
    const float rounded = round_even(float_of(bits_of(x[i])) * inverse);
    const float low = rounded < -127.0f ? -127.0f : rounded;
    q[i] = static_cast<Code>(static_cast<int32_t>(low > 127.0f ? 127.0f : low));
  }
  return scale;
}

template <class Isa>
struct Int8Linear {
  using Code = typename Isa::Code;

  static int64_t steps_of(int64_t k) { return ceil_div(k, Isa::kUnit); }
  static int64_t panel_bytes(int64_t k) { return steps_of(k) * kPanel * Isa::kUnit; }

  static void pack(const int8_t* w, uint8_t* packed, int64_t n, int64_t k, int64_t panel) {
    uint8_t* out = packed + panel * panel_bytes(k);
    const int64_t columns = min_of(kPanel, n - panel * kPanel);
    const int64_t whole = k / Isa::kUnit;
    memset(out, Isa::kFlip, static_cast<size_t>(panel_bytes(k)));
    for (int64_t j = 0; j < columns; ++j) {
      const int8_t* row = w + (panel * kPanel + j) * k;
      uint8_t* lane = out + j * Isa::kUnit;
      for (int64_t s = 0; s < whole; ++s) {
        for (int t = 0; t < Isa::kUnit; ++t) {
          lane[s * kPanel * Isa::kUnit + t] = static_cast<uint8_t>(row[s * Isa::kUnit + t]) ^ Isa::kFlip;
        }
      }
      for (int64_t t = 0; t < k - whole * Isa::kUnit; ++t) {
        lane[whole * kPanel * Isa::kUnit + t] = static_cast<uint8_t>(row[whole * Isa::kUnit + t]) ^ Isa::kFlip;
      }
    }
  }

  static void unpack(const uint8_t* packed, int8_t* w, int64_t n, int64_t k, int64_t panel) {
    const uint8_t* in = packed + panel * panel_bytes(k);
    const int64_t columns = min_of(kPanel, n - panel * kPanel);
    const int64_t whole = k / Isa::kUnit;
    for (int64_t j = 0; j < columns; ++j) {
      int8_t* row = w + (panel * kPanel + j) * k;
      const uint8_t* lane = in + j * Isa::kUnit;
      for (int64_t s = 0; s < whole; ++s) {
        for (int t = 0; t < Isa::kUnit; ++t) {
          row[s * Isa::kUnit + t] = static_cast<int8_t>(lane[s * kPanel * Isa::kUnit + t] ^ Isa::kFlip);
        }
      }
      for (int64_t t = 0; t < k - whole * Isa::kUnit; ++t) {
        row[whole * Isa::kUnit + t] = static_cast<int8_t>(lane[whole * kPanel * Isa::kUnit + t] ^ Isa::kFlip);
      }
    }
  }

  static void quantize(const void* x, Dtype dtype, int64_t k, float eps, int8_t* q, F32* scale) {
    scale->value = dtype == Dtype::kF32 ? quantize_into<Isa>(static_cast<const F32*>(x), k, eps, q)
                                        : quantize_into<Isa>(static_cast<const Bf16*>(x), k, eps, q);
  }

  static void quantize_row(const void* x, Dtype dtype, int64_t k, float eps, const QuantizedRows& rows, int64_t row) {
    Code* codes = reinterpret_cast<Code*>(rows.codes + row * rows.row_bytes);
    rows.scale[row] = dtype == Dtype::kF32 ? quantize_into<Isa>(static_cast<const F32*>(x), k, eps, codes)
                                           : quantize_into<Isa>(static_cast<const Bf16*>(x), k, eps, codes);
    for (int64_t i = k; i < steps_of(k) * Isa::kUnit; ++i) codes[i] = 0;
    if (Isa::kFlip == 0) return;
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += codes[i];
    rows.sum[row] = sum;
  }

  // `rows` in [1, kMaxRows] at run time to a micro kernel of exactly that many rows.
  template <int P, int R = Isa::kMaxRows>
  static void micro_rows(int64_t rows, const Operands<Isa>& operands, int64_t steps, bool first) {
    if (rows == R) {
      Isa::template micro<R, P>(operands, steps, first);
    } else if constexpr (R > 1) {
      micro_rows<P, R - 1>(rows, operands, steps, first);
    }
  }

  static void linear_tile(const LinearJob& job, const Tile& tile) {
    alignas(64) int32_t sums[kTilePanels][kTileRows][kPanel];
    int32_t start[kTileRows];
    const int64_t rows = tile.row_end - tile.row_begin, steps = steps_of(job.k);
    for (int64_t r = 0; r < rows; ++r) {
      // With weights stored as w + 128: sum a (w + 128) - 128 sum a = sum a w, modulo 2^32, hence exactly, because the
      // true sum fits (LLMQ_MAX_K).
      start[r] =
          Isa::kFlip == 0 ? 0 : static_cast<int32_t>(-128u * static_cast<uint32_t>(job.rows.sum[tile.row_begin + r]));
    }
    const int64_t block =
        rows <= Isa::kMaxRows ? steps : kBlockInputs / Isa::kUnit;  // a single block of rows: no turns
    const int64_t blocks_in_l2 = kSpanBytes / (rows * block * Isa::kUnit * static_cast<int64_t>(sizeof(Code)));
    const int64_t span = block * (blocks_in_l2 > 1 ? blocks_in_l2 : 1);
    for (int64_t s = 0; s < steps; s += span) {
      const Span here = {s, min_of(s + span, steps), block};
      int64_t p = tile.panel_begin;
      for (; p + Isa::kMaxPanels <= tile.panel_end; p += Isa::kMaxPanels) {
        panel_span<Isa::kMaxPanels>(job, tile, p, here, start, &sums[p - tile.panel_begin][0][0]);
      }
      for (; p < tile.panel_end; ++p) panel_span<1>(job, tile, p, here, start, &sums[p - tile.panel_begin][0][0]);
    }
    for (int64_t p = tile.panel_begin; p < tile.panel_end; ++p) {
      const int32_t* panel_sums = &sums[p - tile.panel_begin][0][0];
      if (job.dtype == Dtype::kF32) {
        scale_out<F32>(job, tile, p, panel_sums);
      } else {
        scale_out<Bf16>(job, tile, p, panel_sums);
      }
    }
  }

  // Steps [begin, end) of the inputs, `block` at a time.
  struct Span {
    int64_t begin, end, block;
  };

  // All rows of the tile times P panels. Rows are dealt out evenly (7 = 4 + 3, not 6 + 1), since a micro kernel of few
  // rows does little with each weight that it loads.
  template <int P>
  static void panel_span(const LinearJob& job, const Tile& tile, int64_t panel, const Span& span, const int32_t* start,
                         int32_t* sums) {
    const int64_t rows = tile.row_end - tile.row_begin, row_blocks = ceil_div(rows, Isa::kMaxRows);
    Operands<Isa> operands;
    operands.code_stride = job.rows.row_bytes / static_cast<int64_t>(sizeof(Code));
    operands.panel_bytes = panel_bytes(job.k);
    operands.panel_sums = kTileRows * kPanel;
    for (int64_t s = span.begin; s < span.end; s += span.block) {
      operands.weights = job.packed + panel * operands.panel_bytes + s * kPanel * Isa::kUnit;
      int64_t row = 0;
      for (int64_t left = row_blocks; left > 0; --left) {
        const int64_t block_rows = ceil_div(rows - row, left);
        const uint8_t* codes = job.rows.codes + (tile.row_begin + row) * job.rows.row_bytes;
        operands.codes = reinterpret_cast<const Code*>(codes) + s * Isa::kUnit;
        operands.start = start + row;
        operands.sums = sums + row * kPanel;
        micro_rows<P>(block_rows, operands, min_of(span.block, span.end - s), s == 0);
        row += block_rows;
      }
    }
  }

  template <class Out>
  static void scale_out(const LinearJob& job, const Tile& tile, int64_t panel, const int32_t* sums) {
    float w_scale[kPanel] = {0}, bias[kPanel] = {0};
    const int64_t column = panel * kPanel, columns = min_of(kPanel, job.n - column);
    memcpy(w_scale, job.w_scale + column, static_cast<size_t>(columns) * sizeof(float));
    if (job.bias) memcpy(bias, job.bias + column, static_cast<size_t>(columns) * sizeof(float));
    for (int64_t row = tile.row_begin; row < tile.row_end; ++row, sums += kPanel) {
      const float scale = job.rows.scale[row];
      float out[kPanel];
      for (int64_t j = 0; j < kPanel; ++j) out[j] = static_cast<float>(sums[j]) * scale * w_scale[j];
      if (job.bias) {
        for (int64_t j = 0; j < kPanel; ++j) out[j] += bias[j];
      }
      Out* y = static_cast<Out*>(job.y) + row * job.n + column;
      if (columns == kPanel) {
        for (int64_t j = 0; j < kPanel; ++j) store(y + j, out[j]);
      } else {
        for (int64_t j = 0; j < columns; ++j) store(y + j, out[j]);
      }
    }
  }

  static constexpr IsaKernels table(const char* name, const char* layout, bool (*available)()) {
    return {name,          layout,          Isa::kUnit,   static_cast<int64_t>(sizeof(Code)),
            Isa::kMaxRows, Isa::kMaxPanels, available,    pack,
            unpack,        quantize,        quantize_row, linear_tile};
  }
};

}  // namespace llmq
