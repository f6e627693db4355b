#include "linear.h"

#include "layout.h"

namespace llmq {
namespace {

constexpr float kLeastNormal = 1.17549435e-38f;
constexpr float kMostFinite = 3.40282347e+38f;

// Rows that are a power of two apart would all fall into the same few sets of the cache: one more line.
int64_t plane_bytes(const Layout& layout, const Codes& codes) {
  return round_up(layout.padded_k * codes.bytes, kLine) + kLine;
}

int64_t scales_of(const LlmqLinear& linear, const Layout& layout) {
  return linear.activation == LLMQ_ACTIVATION_FLOAT ? layout.blocks : 1;
}

// How the outputs are cut into tiles.
struct Cut {
  int64_t tile_rows, tile_panels, across, count;
};

Cut cut_of(const IsaKernels& isa, const Product& product, int32_t n_threads) {
  const LlmqLinear& linear = *product.linear;
  const int64_t panels = ceil_div(linear.n, kPanel), row_tiles = ceil_div(product.m, kTileRows);
  const bool int8 = linear.weight == LLMQ_WEIGHT_INT8, wide = product.rows.code_bytes == 2;
  const int32_t most = int8 || wide ? isa.rows8 : linear.weight == LLMQ_WEIGHT_INT4 ? isa.rows4 : isa.rows_float;
  const int64_t row_step = max_of(1, most / product.rows.planes);
  Cut cut;
  cut.tile_rows = min_of(kTileRows, round_up(ceil_div(product.m, max_of(1, row_tiles)), row_step));
  // Enough tiles that no thread waits long for another, in whole micro kernels.
  const int64_t wanted = ceil_div(panels * row_tiles, 4 * static_cast<int64_t>(n_threads));
  cut.tile_panels = min_of(kTilePanels, round_up(max_of(1, wanted), int8 ? isa.panels8 : 1));
  cut.across = ceil_div(panels, cut.tile_panels);
  cut.count = ceil_div(product.m, cut.tile_rows) * cut.across;
  return cut;
}

}  // namespace

int32_t check_linear(const LlmqLinear& linear) {
  if (linear.n < 1 || linear.k < 1 || linear.k > LLMQ_MAX_K) return LLMQ_STATUS_SHAPE;
  if (linear.weight == LLMQ_WEIGHT_BF16 || linear.weight == LLMQ_WEIGHT_F32) {
    const bool plain = linear.scale == LLMQ_SCALE_NONE && linear.zero == LLMQ_ZERO_NONE &&
                       linear.activation == LLMQ_ACTIVATION_FLOAT;
    return plain ? LLMQ_STATUS_OK : LLMQ_STATUS_FORMAT;
  }
  const bool int4 = linear.weight == LLMQ_WEIGHT_INT4;
  if (!int4 && linear.weight != LLMQ_WEIGHT_INT8) return LLMQ_STATUS_FORMAT;
  if (linear.scale != LLMQ_SCALE_F32 && linear.scale != LLMQ_SCALE_BF16) return LLMQ_STATUS_FORMAT;
  if (linear.zero < LLMQ_ZERO_NONE || linear.zero > (int4 ? LLMQ_ZERO_FLOAT : LLMQ_ZERO_NONE)) return LLMQ_STATUS_FORMAT;
  if (linear.activation < LLMQ_ACTIVATION_FLOAT || linear.activation > LLMQ_ACTIVATION_STATIC) return LLMQ_STATUS_FORMAT;
  if (!int4 && linear.activation == LLMQ_ACTIVATION_UINT8) return LLMQ_STATUS_FORMAT;
  if (linear.zero == LLMQ_ZERO_FLOAT && linear.activation != LLMQ_ACTIVATION_FLOAT) return LLMQ_STATUS_FORMAT;
  if (linear.group < 1 || linear.k % linear.group != 0) return LLMQ_STATUS_SHAPE;
  if (linear.group != linear.k && linear.group % kStep != 0) return LLMQ_STATUS_SHAPE;
  if (linear.activation == LLMQ_ACTIVATION_FLOAT) return LLMQ_STATUS_OK;
  const float scale = linear.activation == LLMQ_ACTIVATION_STATIC ? linear.input_scale : linear.eps;
  return scale >= kLeastNormal && scale <= kMostFinite ? LLMQ_STATUS_OK : LLMQ_STATUS_EPS;  // a NaN fails
}

int64_t rows_bytes(const IsaKernels& isa, const LlmqLinear& linear, int64_t m) {
  const Layout layout = layout_of(linear);
  const Codes few = codes_of(isa, linear, 1), many = codes_of(isa, linear, m);
  // The memory also serves fewer rows, whose codes may have another form.
  const int64_t codes = max_of(few.planes * plane_bytes(layout, few), many.planes * plane_bytes(layout, many));
  if (!is_integer(linear)) return m * codes;
  const int64_t numbers = scales_of(linear, layout) + layout.blocks + 1;
  return round_up(m * (codes + numbers * 4), kLine);
}

Rows rows_in(const IsaKernels& isa, const LlmqLinear& linear, int64_t m, uint8_t* memory) {
  const Layout layout = layout_of(linear);
  const Codes codes = codes_of(isa, linear, m);
  Rows rows = {};
  rows.planes = codes.planes;
  rows.code_bytes = codes.bytes;
  rows.plane_bytes = plane_bytes(layout, codes);
  rows.codes = memory;
  if (is_integer(linear)) {
    rows.scale = reinterpret_cast<float*>(memory + m * rows.planes * rows.plane_bytes);
    rows.sum = reinterpret_cast<int32_t*>(rows.scale + m * scales_of(linear, layout));
    rows.zero = rows.sum + m * layout.blocks;
  }
  return rows;
}

bool same_rows(const IsaKernels& isa, const LlmqLinear& a, const LlmqLinear& b) {
  if (a.k != b.k || is_integer(a) != is_integer(b)) return false;
  if (!is_integer(a)) return true;
  const Layout of_a = layout_of(a), of_b = layout_of(b);
  if (a.activation != b.activation || of_a.block != of_b.block || of_a.blocks != of_b.blocks) return false;
  const bool is_static = a.activation == LLMQ_ACTIVATION_STATIC;
  if (is_static && a.input_scale != b.input_scale) return false;
  if (!is_static && a.activation != LLMQ_ACTIVATION_FLOAT && a.eps != b.eps) return false;
  const int64_t few_and_many[] = {1, LLMQ_MAX_K};
  for (const int64_t m : few_and_many) {
    const Codes codes_a = codes_of(isa, a, m), codes_b = codes_of(isa, b, m);
    if (codes_a.planes != codes_b.planes || codes_a.bytes != codes_b.bytes) return false;
  }
  return true;
}

void prepare_rows(const IsaKernels& isa, const LlmqLinear& linear, const void* x, Dtype dtype, int64_t stride,
                  const Rows& rows, int64_t begin, int64_t end) {
  const Layout layout = layout_of(linear);
  const int64_t row_bytes = stride * (dtype == Dtype::kBf16 ? 2 : 4);
  for (int64_t row = begin; row < end; ++row) {
    isa.prepare_row(linear, layout, static_cast<const uint8_t*>(x) + row * row_bytes, dtype, rows, row);
  }
}

int64_t tile_count(const IsaKernels& isa, const Product& product, int32_t n_threads) {
  return cut_of(isa, product, n_threads).count;
}

void multiply_tile(const IsaKernels& isa, const Product& product, int32_t n_threads, int64_t tile) {
  const Cut cut = cut_of(isa, product, n_threads);
  const Layout layout = layout_of(*product.linear);
  TileJob job;
  job.linear = product.linear;
  job.layout = &layout;
  job.rows = product.rows;
  job.y = product.y;
  job.dtype = product.dtype;
  job.y_stride = product.y_stride;
  job.row_begin = tile / cut.across * cut.tile_rows;
  job.row_end = min_of(job.row_begin + cut.tile_rows, product.m);
  job.panel_begin = tile % cut.across * cut.tile_panels;
  job.panel_end = min_of(job.panel_begin + cut.tile_panels, ceil_div(product.linear->n, kPanel));
  switch (product.linear->weight) {
    case LLMQ_WEIGHT_INT8:
      return isa.int8_tile(job);
    case LLMQ_WEIGHT_INT4:
      return isa.int4_tile(job);
    default:
      return isa.float_tile(job);
  }
}

}  // namespace llmq
