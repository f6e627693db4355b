// Products of rows and float weights, summed in fp32: output by output from the first input to the last, whatever the cut.
//
// struct Isa defines
//   kRowsFloat               largest micro_float
//   kPanelsFloat             panels that a single row is multiplied with at once, so that sums do not wait for each other
//   template <int R, int P, bool kBf16> static void micro_float(const MicroFloat&)
#pragma once

#include "int_tile.h"

namespace llmq {

// R rows times P panels. bf16 weights lie in steps of two inputs [16][2], fp32 in steps of one [16].
struct MicroFloat {
  const float* rows;  // [R], `row_floats` apart
  int64_t row_floats;
  const uint8_t* weights;  // [P] panels, `panel_bytes` apart
  int64_t panel_bytes;
  int64_t size;  // inputs, even
  bool add;      // to what `sums` holds, instead of starting from 0
  float* sums;   // [P] of [R][16], `panel_sums` apart
  int64_t panel_sums;
};

// Inputs that all rows of a tile use before the next have their turn: 16 or 32 KiB of a panel.
constexpr int64_t kFloatPieceInputs = 512;

template <class Isa>
struct FloatTile {
  template <int P, bool kBf16, int R = Isa::kRowsFloat>
  static void micro(int64_t count, const MicroFloat& operands) {
    if (count == R) {
      Isa::template micro_float<R, P, kBf16>(operands);
    } else if constexpr (R > 1) {
      micro<P, kBf16, R - 1>(count, operands);
    }
  }

  template <bool kBf16>
  static void tile_of(const TileJob& job) {
    alignas(kLine) float sums[kTilePanels][kTileRows][kPanel];
    const Layout& layout = *job.layout;
    const int64_t rows = job.row_end - job.row_begin;
    const int64_t piece = rows <= Isa::kRowsFloat ? layout.padded_k : kFloatPieceInputs;
    for (int64_t k = 0; k < layout.padded_k; k += piece) {
      int64_t p = job.panel_begin;
      if (rows == 1) {
        for (; p + Isa::kPanelsFloat <= job.panel_end; p += Isa::kPanelsFloat) {
          rows_times<Isa::kPanelsFloat, kBf16, 1>(job, p, k, piece, sums[p - job.panel_begin]);
        }
      }
      for (; p < job.panel_end; ++p) {
        rows_times<1, kBf16, Isa::kRowsFloat>(job, p, k, piece, sums[p - job.panel_begin]);
      }
    }
    for (int64_t p = job.panel_begin; p < job.panel_end; ++p) {
      const int64_t column = p * kPanel;
      float bias[kPanel];
      if (job.linear->bias) load_bias(job, column, bias);
      for (int64_t row = 0; row < rows; ++row) {
        float* out = sums[p - job.panel_begin][row];
        if (job.linear->bias) {
          for (int64_t j = 0; j < kPanel; ++j) out[j] += bias[j];
        }
        store_panel(job, job.row_begin + row, column, out);
      }
    }
  }

  template <int P, bool kBf16, int kMostRows>
  static void rows_times(const TileJob& job, int64_t panel, int64_t k, int64_t piece, float (*sums)[kPanel]) {
    const Layout& layout = *job.layout;
    const int64_t rows = job.row_end - job.row_begin;
    MicroFloat operands;
    operands.row_floats = job.rows.plane_bytes / static_cast<int64_t>(sizeof(float));
    operands.weights = job.linear->packed + panel * layout.panel_bytes + k * layout.input_bytes;
    operands.panel_bytes = layout.panel_bytes;
    operands.size = min_of(piece, layout.padded_k - k);
    operands.add = k > 0;
    operands.panel_sums = kTileRows * kPanel;
    int64_t row = 0;
    for (int64_t left = ceil_div(rows, kMostRows); left > 0; --left) {
      const int64_t count = ceil_div(rows - row, left);
      operands.rows = reinterpret_cast<const float*>(job.rows.codes) + (job.row_begin + row) * operands.row_floats + k;
      operands.sums = sums[row];
      micro<P, kBf16, kMostRows>(count, operands);
      row += count;
    }
  }

  static void tile(const TileJob& job) {
    if (job.linear->weight == LLMQ_WEIGHT_BF16) {
      tile_of<true>(job);
    } else {
      tile_of<false>(job);
    }
  }
};

template <class Isa>
constexpr IsaKernels isa_table(const char* name, const char* layout8, bool (*available)(), const VectorKernels* vector) {
  return {name,
          {layout8, "int4-n16k8", "bf16-n16k2", "f32-n16"},
          Isa::kUnit8,
          Isa::kFlip8,
          Isa::kWide8,
          Isa::kRows8,
          Isa::kPanels8,
          Isa::kRows4,
          Isa::kWide4Rows,
          Isa::kRowsFloat,
          available,
          RowMaker<Isa>::prepare_row,
          RowMaker<Isa>::quantize,
          IntTile<Isa, false>::tile,
          IntTile<Isa, true>::tile,
          FloatTile<Isa>::tile,
          vector};
}

}  // namespace llmq
