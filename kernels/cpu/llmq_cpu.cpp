// The C ABI: checks arguments, chooses the instruction set, cuts the work into tasks.
#include "llmq_cpu.h"

#include "isa.h"
#include "parallel.h"

namespace llmq {
namespace {

const IsaKernels* const kIsas[] = {
    &kGeneric,
#if defined(__x86_64__)
    &kAvx2,
    &kAvx512Vnni,
#elif defined(__aarch64__)
    &kNeonDotprod,
#endif
};
constexpr int32_t kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

constexpr int64_t kCacheLine = 64;
constexpr int64_t kChunkRows = 512;           // rows quantized, then multiplied, at a time: bounds the workspace
constexpr int64_t kSerialElements = 16384;    // quantizing fewer costs less than waking a thread
constexpr int64_t kSerialProducts = 1 << 17;  // so for multiplying: a few microseconds of work
constexpr float kLeastNormal = 1.17549435e-38f;
constexpr float kMostFinite = 3.40282347e+38f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

const IsaKernels* known_isa(int32_t isa) { return isa >= 0 && isa < kIsaCount ? kIsas[isa] : nullptr; }

const IsaKernels* usable_isa(int32_t isa) {
  const IsaKernels* kernels = known_isa(isa);
  return kernels && kernels->available() ? kernels : nullptr;
}

bool shape_fits(int64_t m, int64_t n, int64_t k) { return m >= 0 && n >= 1 && k >= 1 && k <= LLMQ_MAX_K; }

// Written so that a NaN fails.
bool eps_fits(float eps) { return eps >= kLeastNormal && eps <= kMostFinite; }

int64_t packed_bytes(const IsaKernels& isa, int64_t n, int64_t k) {
  return ceil_div(n, kPanel) * kPanel * round_up(k, isa.unit);
}

// One more line than a row's codes need: rows of 2^i codes would all fall into the same few sets of the cache.
int64_t row_bytes(const IsaKernels& isa, int64_t k) {
  return round_up(round_up(k, isa.unit) * isa.code_bytes, kCacheLine) + kCacheLine;
}

int64_t workspace_bytes(const IsaKernels& isa, int64_t m, int64_t k) {
  const int64_t rows = min_of(m, kChunkRows);
  const int64_t per_row = static_cast<int64_t>(sizeof(float) + sizeof(int32_t)) + row_bytes(isa, k);
  return rows * per_row + 2 * kCacheLine;
}

QuantizedRows rows_in(uint8_t* workspace, const IsaKernels& isa, int64_t m, int64_t k) {
  const int64_t rows = min_of(m, kChunkRows);
  uintptr_t at = reinterpret_cast<uintptr_t>(workspace);
  workspace += round_up(static_cast<int64_t>(at % kCacheLine), kCacheLine) - static_cast<int64_t>(at % kCacheLine);
  QuantizedRows view;
  view.row_bytes = row_bytes(isa, k);
  view.codes = workspace;
  view.scale = reinterpret_cast<float*>(workspace + rows * view.row_bytes);
  view.sum = reinterpret_cast<int32_t*>(view.scale + rows);
  return view;
}

struct PackJob {
  const IsaKernels* isa;
  const void* from;
  void* to;
  int64_t n, k;
};

void pack_task(const void* context, int64_t panel) {
  const PackJob& job = *static_cast<const PackJob*>(context);
  job.isa->pack(static_cast<const int8_t*>(job.from), static_cast<uint8_t*>(job.to), job.n, job.k, panel);
}

void unpack_task(const void* context, int64_t panel) {
  const PackJob& job = *static_cast<const PackJob*>(context);
  job.isa->unpack(static_cast<const uint8_t*>(job.from), static_cast<int8_t*>(job.to), job.n, job.k, panel);
}

// Rows of x, quantized either to int8 [M, K] (`q`) or into a workspace (`rows`).
struct QuantizeJob {
  const IsaKernels* isa;
  const uint8_t* x;
  int64_t x_row_bytes;
  Dtype dtype;
  int64_t m, k;
  float eps;
  int64_t rows_per_task;
  int8_t* q;  // or null
  F32* scale;
  QuantizedRows rows;
};

void quantize_task(const void* context, int64_t task) {
  const QuantizeJob& job = *static_cast<const QuantizeJob*>(context);
  const int64_t end = min_of((task + 1) * job.rows_per_task, job.m);
  for (int64_t row = task * job.rows_per_task; row < end; ++row) {
    const uint8_t* x = job.x + row * job.x_row_bytes;
    if (job.q) {
      job.isa->quantize(x, job.dtype, job.k, job.eps, job.q + row * job.k, job.scale + row);
    } else {
      job.isa->quantize_row(x, job.dtype, job.k, job.eps, job.rows, row);
    }
  }
}

void quantize_rows(QuantizeJob& job, int32_t n_threads) {
  job.rows_per_task = max_of(1, kSerialElements / job.k);
  parallel_tasks(ceil_div(job.m, job.rows_per_task), n_threads, quantize_task, &job);
}

// How the outputs of one chunk of rows are cut into tiles.
struct TileJob {
  const IsaKernels* isa;
  LinearJob linear;
  int64_t rows, panels;
  int64_t tile_rows, tile_panels;
};

void tile_task(const void* context, int64_t task) {
  const TileJob& job = *static_cast<const TileJob*>(context);
  const int64_t across = ceil_div(job.panels, job.tile_panels);
  Tile tile;
  tile.row_begin = task / across * job.tile_rows;
  tile.row_end = min_of(tile.row_begin + job.tile_rows, job.rows);
  tile.panel_begin = task % across * job.tile_panels;
  tile.panel_end = min_of(tile.panel_begin + job.tile_panels, job.panels);
  job.isa->linear_tile(job.linear, tile);
}

void multiply_rows(TileJob& job, int32_t n_threads) {
  if (job.rows * job.panels * kPanel * job.linear.k <= kSerialProducts) n_threads = 1;
  const int64_t step = job.isa->row_step;
  const int64_t row_tiles = ceil_div(job.rows, kTileRows);
  job.tile_rows = min_of(kTileRows, round_up(ceil_div(job.rows, row_tiles), step));
  // Enough tiles that no thread waits long for another, in whole micro kernels.
  const int64_t wanted = ceil_div(job.panels * row_tiles, 4 * static_cast<int64_t>(n_threads));
  job.tile_panels = min_of(kTilePanels, round_up(max_of(1, wanted), job.isa->panel_step));
  parallel_tasks(ceil_div(job.rows, job.tile_rows) * ceil_div(job.panels, job.tile_panels), n_threads, tile_task, &job);
}

struct LinearArguments {
  int32_t isa;
  const void* x;
  const uint8_t* packed;
  const float *w_scale, *bias;
  void* y;
  uint8_t* workspace;
  int64_t m, n, k, x_stride;
  float eps;
  int32_t n_threads;
};

int32_t dynamic_linear(const LinearArguments& a, Dtype dtype) {
  const IsaKernels* isa = usable_isa(a.isa);
  if (!isa) return LLMQ_STATUS_ISA;
  if (!shape_fits(a.m, a.n, a.k) || a.x_stride < a.k) return LLMQ_STATUS_SHAPE;
  if (!eps_fits(a.eps)) return LLMQ_STATUS_EPS;
  if (a.n_threads < 1) return LLMQ_STATUS_THREADS;
  if (a.m == 0) return LLMQ_STATUS_OK;
  if (!a.x || !a.packed || !a.w_scale || !a.y || !a.workspace) return LLMQ_STATUS_NULL;

  const int64_t element = dtype == Dtype::kF32 ? 4 : 2;
  const QuantizedRows rows = rows_in(a.workspace, *isa, a.m, a.k);
  for (int64_t row = 0; row < a.m; row += kChunkRows) {
    const int64_t here = min_of(kChunkRows, a.m - row);
    QuantizeJob quantize = {};
    quantize.isa = isa;
    quantize.x = static_cast<const uint8_t*>(a.x) + row * a.x_stride * element;
    quantize.x_row_bytes = a.x_stride * element;
    quantize.dtype = dtype;
    quantize.m = here;
    quantize.k = a.k;
    quantize.eps = a.eps;
    quantize.rows = rows;
    quantize_rows(quantize, a.n_threads);

    TileJob multiply = {};
    multiply.isa = isa;
    multiply.linear.rows = rows;
    multiply.linear.packed = a.packed;
    multiply.linear.w_scale = reinterpret_cast<const F32*>(a.w_scale);
    multiply.linear.bias = reinterpret_cast<const F32*>(a.bias);
    multiply.linear.y = static_cast<uint8_t*>(a.y) + row * a.n * element;
    multiply.linear.dtype = dtype;
    multiply.linear.n = a.n;
    multiply.linear.k = a.k;
    multiply.rows = here;
    multiply.panels = ceil_div(a.n, kPanel);
    multiply_rows(multiply, a.n_threads);
  }
  return LLMQ_STATUS_OK;
}

struct QuantizeArguments {
  int32_t isa;
  const void* x;
  int8_t* q;
  float* scale;
  int64_t m, k, x_stride;
  float eps;
  int32_t n_threads;
};

int32_t quantize_per_token(const QuantizeArguments& a, Dtype dtype) {
  const IsaKernels* isa = usable_isa(a.isa);
  if (!isa) return LLMQ_STATUS_ISA;
  if (!shape_fits(a.m, 1, a.k) || a.x_stride < a.k) return LLMQ_STATUS_SHAPE;
  if (!eps_fits(a.eps)) return LLMQ_STATUS_EPS;
  if (a.n_threads < 1) return LLMQ_STATUS_THREADS;
  if (a.m == 0) return LLMQ_STATUS_OK;
  if (!a.x || !a.q || !a.scale) return LLMQ_STATUS_NULL;
  QuantizeJob job = {};
  job.isa = isa;
  job.x = static_cast<const uint8_t*>(a.x);
  job.x_row_bytes = a.x_stride * (dtype == Dtype::kF32 ? 4 : 2);
  job.dtype = dtype;
  job.m = a.m;
  job.k = a.k;
  job.eps = a.eps;
  job.q = a.q;
  job.scale = reinterpret_cast<F32*>(a.scale);
  quantize_rows(job, a.n_threads);
  return LLMQ_STATUS_OK;
}

int32_t repack(int32_t isa_number, PackJob job, void (*task)(const void*, int64_t), int32_t n_threads) {
  job.isa = usable_isa(isa_number);
  if (!job.isa) return LLMQ_STATUS_ISA;
  if (!shape_fits(0, job.n, job.k)) return LLMQ_STATUS_SHAPE;
  if (n_threads < 1) return LLMQ_STATUS_THREADS;
  if (!job.from || !job.to) return LLMQ_STATUS_NULL;
  parallel_tasks(ceil_div(job.n, kPanel), n_threads, task, &job);
  return LLMQ_STATUS_OK;
}

}  // namespace
}  // namespace llmq

using llmq::Dtype;

int32_t llmq_abi_version(void) { return LLMQ_ABI_VERSION; }

const char* llmq_status_message(int32_t status) {
  switch (status) {
    case LLMQ_STATUS_OK:
      return "done";
    case LLMQ_STATUS_NULL:
      return "a pointer is NULL that must not be";
    case LLMQ_STATUS_SHAPE:
      return "the shape is impossible: m >= 0, n >= 1, 1 <= k <= 131072 and x_stride >= k are required";
    case LLMQ_STATUS_ISA:
      return "this machine cannot run the instruction set that was asked for";
    case LLMQ_STATUS_EPS:
      return "eps must be a positive, finite, normal float";
    case LLMQ_STATUS_THREADS:
      return "n_threads must be at least 1";
    default:
      return "an unknown status";
  }
}

const char* llmq_threading(void) { return llmq::threading(); }

int32_t llmq_isa_count(void) { return llmq::kIsaCount; }

const char* llmq_isa_name(int32_t isa) {
  const llmq::IsaKernels* kernels = llmq::known_isa(isa);
  return kernels ? kernels->name : nullptr;
}

int32_t llmq_isa_available(int32_t isa) { return llmq::usable_isa(isa) != nullptr; }

int32_t llmq_isa_best(void) {
  int32_t best = llmq::kIsaCount - 1;
  while (!llmq_isa_available(best)) --best;  // ends at 0 at the latest: generic is always available
  return best;
}

const char* llmq_int8_layout(int32_t isa) {
  const llmq::IsaKernels* kernels = llmq::known_isa(isa);
  return kernels ? kernels->layout : nullptr;
}

int32_t llmq_int8_packed_bytes(int32_t isa, int64_t n, int64_t k, int64_t* bytes) {
  const llmq::IsaKernels* kernels = llmq::known_isa(isa);
  if (!kernels) return LLMQ_STATUS_ISA;
  if (!llmq::shape_fits(0, n, k)) return LLMQ_STATUS_SHAPE;
  if (!bytes) return LLMQ_STATUS_NULL;
  *bytes = llmq::packed_bytes(*kernels, n, k);
  return LLMQ_STATUS_OK;
}

int32_t llmq_int8_pack(int32_t isa, const int8_t* w, uint8_t* packed, int64_t n, int64_t k, int32_t n_threads) {
  return llmq::repack(isa, {nullptr, w, packed, n, k}, llmq::pack_task, n_threads);
}

int32_t llmq_int8_unpack(int32_t isa, const uint8_t* packed, int8_t* w, int64_t n, int64_t k, int32_t n_threads) {
  return llmq::repack(isa, {nullptr, packed, w, n, k}, llmq::unpack_task, n_threads);
}

int32_t llmq_quantize_per_token_f32(int32_t isa, const float* x, int8_t* q, float* scale, int64_t m, int64_t k,
                                    int64_t x_stride, float eps, int32_t n_threads) {
  return llmq::quantize_per_token({isa, x, q, scale, m, k, x_stride, eps, n_threads}, Dtype::kF32);
}

int32_t llmq_quantize_per_token_bf16(int32_t isa, const uint16_t* x, int8_t* q, float* scale, int64_t m, int64_t k,
                                     int64_t x_stride, float eps, int32_t n_threads) {
  return llmq::quantize_per_token({isa, x, q, scale, m, k, x_stride, eps, n_threads}, Dtype::kBf16);
}

int32_t llmq_int8_dynamic_linear_workspace_bytes(int32_t isa, int64_t m, int64_t k, int64_t* bytes) {
  const llmq::IsaKernels* kernels = llmq::known_isa(isa);
  if (!kernels) return LLMQ_STATUS_ISA;
  if (!llmq::shape_fits(m, 1, k)) return LLMQ_STATUS_SHAPE;
  if (!bytes) return LLMQ_STATUS_NULL;
  *bytes = llmq::workspace_bytes(*kernels, m, k);
  return LLMQ_STATUS_OK;
}

int32_t llmq_int8_dynamic_linear_f32(int32_t isa, const float* x, const uint8_t* packed, const float* w_scale,
                                     const float* bias, float* y, uint8_t* workspace, int64_t m, int64_t n, int64_t k,
                                     int64_t x_stride, float eps, int32_t n_threads) {
  return llmq::dynamic_linear({isa, x, packed, w_scale, bias, y, workspace, m, n, k, x_stride, eps, n_threads},
                              Dtype::kF32);
}

int32_t llmq_int8_dynamic_linear_bf16(int32_t isa, const uint16_t* x, const uint8_t* packed, const float* w_scale,
                                      const float* bias, uint16_t* y, uint8_t* workspace, int64_t m, int64_t n,
                                      int64_t k, int64_t x_stride, float eps, int32_t n_threads) {
  return llmq::dynamic_linear({isa, x, packed, w_scale, bias, y, workspace, m, n, k, x_stride, eps, n_threads},
                              Dtype::kBf16);
}
