// The C ABI: checks arguments, chooses the instruction set, shares the work out.
#include "llmq_cpu.h"

#include "isa.h"
#include "layout.h"
#include "linear.h"
#include "pack.h"
#include "parallel.h"
#include "registry.h"

namespace llmq {
namespace {

constexpr int64_t kChunkRows = 512;           // rows prepared, then multiplied, at a time: bounds the workspace
constexpr int64_t kSerialElements = 16384;    // preparing fewer costs less than waking a thread
constexpr int64_t kSerialProducts = 1 << 17;  // so for multiplying: a few microseconds of work

uint8_t* first_line(uint8_t* memory) {
  const int64_t over = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory) % kLine);
  return memory + (over ? kLine - over : 0);
}

bool dtype_known(int32_t dtype) { return dtype == LLMQ_DTYPE_F32 || dtype == LLMQ_DTYPE_BF16; }
Dtype dtype_of(int32_t dtype) { return dtype == LLMQ_DTYPE_BF16 ? Dtype::kBf16 : Dtype::kF32; }
int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kBf16 ? 2 : 4; }

// One chunk of rows: prepared by all threads, then multiplied by all threads.
void multiply_rows(const IsaKernels& isa, const Product& product, const void* x, int64_t x_stride, Team& team) {
  const LlmqLinear& linear = *product.linear;
  const int64_t rows_per_task = max_of(1, kSerialElements / linear.k);
  team.share(ceil_div(product.m, rows_per_task), [&](int64_t task, int32_t) {
    prepare_rows(isa, linear, x, product.dtype, x_stride, product.rows, task * rows_per_task,
                 min_of((task + 1) * rows_per_task, product.m));
  });
  const int32_t n_threads = team.size();
  team.share(tile_count(isa, product, n_threads),
             [&](int64_t tile, int32_t) { multiply_tile(isa, product, n_threads, tile); });
}

int32_t repack(int32_t isa_number, const LlmqLinear* linear, PackJob job, int32_t n_threads,
               void (*move)(const PackJob&, int64_t)) {
  job.isa = usable_isa(isa_number);
  if (!job.isa) return LLMQ_STATUS_ISA;
  if (!linear) return LLMQ_STATUS_NULL;
  const int32_t status = check_linear(*linear);
  if (status) return status;
  if (n_threads < 1) return LLMQ_STATUS_THREADS;
  if (!job.packed || !job.weight || (is_integer(*linear) && !job.scale) || (linear->zero && !job.zero)) {
    return LLMQ_STATUS_NULL;
  }
  job.linear = linear;
  parallel_region(n_threads, [&](Team& team) {
    team.share(ceil_div(linear->n, kPanel), [&](int64_t panel, int32_t) { move(job, panel); });
  });
  return LLMQ_STATUS_OK;
}

}  // namespace
}  // namespace llmq

using namespace llmq;  // NOLINT: below are the symbols of the ABI alone

int32_t llmq_abi_version(void) { return LLMQ_ABI_VERSION; }

const char* llmq_status_message(int32_t status) {
  switch (status) {
    case LLMQ_STATUS_OK:
      return "done";
    case LLMQ_STATUS_NULL:
      return "a pointer is NULL that must not be";
    case LLMQ_STATUS_SHAPE:
      return "the shape is impossible: m >= 0, n >= 1, 1 <= k <= 131072 and x_stride >= k are required, and groups that "
             "divide k and are multiples of 8, or one a row";
    case LLMQ_STATUS_ISA:
      return "this machine cannot run the instruction set that was asked for";
    case LLMQ_STATUS_EPS:
      return "eps, or the scale of static activations, must be a positive, finite, normal float";
    case LLMQ_STATUS_THREADS:
      return "n_threads must be at least 1";
    case LLMQ_STATUS_FORMAT:
      return "weight, zero, scale, activation or dtype is no number of this library, or they do not go together";
    case LLMQ_STATUS_MODEL:
      return "the model's sizes are impossible (all positive, heads a multiple of kv_heads, head_dim even), or a linear has "
             "not the shape that they ask for";
    case LLMQ_STATUS_CACHE:
      return "the cache is of another batch or no known dtype, or has no room for these positions";
    case LLMQ_STATUS_TOKEN:
      return "a token is not in the vocabulary";
    default:
      return "an unknown status";
  }
}

const char* llmq_threading(void) { return threading(); }

int32_t llmq_isa_count(void) { return isa_count(); }

const char* llmq_isa_name(int32_t isa) {
  const IsaKernels* kernels = known_isa(isa);
  return kernels ? kernels->name : nullptr;
}

int32_t llmq_isa_available(int32_t isa) { return usable_isa(isa) != nullptr; }

int32_t llmq_isa_best(void) {
  int32_t best = isa_count() - 1;
  while (!llmq_isa_available(best)) --best;  // ends at 0 at the latest: generic is always available
  return best;
}

const char* llmq_linear_layout(int32_t isa, int32_t weight) {
  const IsaKernels* kernels = known_isa(isa);
  if (!kernels || weight < LLMQ_WEIGHT_INT8 || weight > LLMQ_WEIGHT_F32) return nullptr;
  return kernels->layouts[weight - LLMQ_WEIGHT_INT8];
}

int32_t llmq_linear_packed_bytes(int32_t isa, const LlmqLinear* linear, int64_t* bytes) {
  if (!known_isa(isa)) return LLMQ_STATUS_ISA;
  if (!linear || !bytes) return LLMQ_STATUS_NULL;
  const int32_t status = check_linear(*linear);
  if (status) return status;
  *bytes = ceil_div(linear->n, kPanel) * layout_of(*linear).panel_bytes;
  return LLMQ_STATUS_OK;
}

int32_t llmq_linear_pack(int32_t isa, const LlmqLinear* linear, const void* weight, const float* scale,
                         const float* zero, uint8_t* packed, int32_t n_threads) {
  // pack_panel only reads them; the other direction writes.
  return repack(isa, linear,
                {nullptr, nullptr, packed, const_cast<void*>(weight), const_cast<float*>(scale),
                 const_cast<float*>(zero)},
                n_threads, pack_panel);
}

int32_t llmq_linear_unpack(int32_t isa, const LlmqLinear* linear, const uint8_t* packed, void* weight, float* scale,
                           float* zero, int32_t n_threads) {
  return repack(isa, linear, {nullptr, nullptr, const_cast<uint8_t*>(packed), weight, scale, zero}, n_threads,
                unpack_panel);
}

int32_t llmq_linear_workspace_bytes(int32_t isa, const LlmqLinear* linear, int64_t m, int64_t* bytes) {
  const IsaKernels* kernels = known_isa(isa);
  if (!kernels) return LLMQ_STATUS_ISA;
  if (!linear || !bytes) return LLMQ_STATUS_NULL;
  const int32_t status = check_linear(*linear);
  if (status) return status;
  if (m < 0) return LLMQ_STATUS_SHAPE;
  *bytes = rows_bytes(*kernels, *linear, min_of(m, kChunkRows)) + kLine;
  return LLMQ_STATUS_OK;
}

int32_t llmq_linear(int32_t isa, const LlmqLinear* linear, const void* x, void* y, uint8_t* workspace, int64_t m,
                    int64_t x_stride, int32_t dtype, int32_t n_threads) {
  const IsaKernels* kernels = usable_isa(isa);
  if (!kernels) return LLMQ_STATUS_ISA;
  if (!linear) return LLMQ_STATUS_NULL;
  const int32_t status = check_linear(*linear);
  if (status) return status;
  if (m < 0 || x_stride < linear->k) return LLMQ_STATUS_SHAPE;
  if (!dtype_known(dtype)) return LLMQ_STATUS_FORMAT;
  if (n_threads < 1) return LLMQ_STATUS_THREADS;
  if (m == 0) return LLMQ_STATUS_OK;
  if (!x || !y || !workspace || !linear->packed) return LLMQ_STATUS_NULL;
  if (m * linear->n * linear->k <= kSerialProducts) n_threads = 1;
  const Dtype type = dtype_of(dtype);
  const Rows rows = rows_in(*kernels, *linear, min_of(m, kChunkRows), first_line(workspace));
  parallel_region(n_threads, [&](Team& team) {
    for (int64_t row = 0; row < m; row += kChunkRows) {
      const Product product = {linear,
                               rows,
                               min_of(kChunkRows, m - row),
                               static_cast<uint8_t*>(y) + row * linear->n * element_bytes(type),
                               type,
                               linear->n};
      multiply_rows(*kernels, product, static_cast<const uint8_t*>(x) + row * x_stride * element_bytes(type), x_stride,
                    team);
    }
  });
  return LLMQ_STATUS_OK;
}

int32_t llmq_quantize_per_token(int32_t isa, const void* x, int8_t* q, float* scale, int64_t m, int64_t k,
                                int64_t x_stride, int32_t dtype, float eps, int32_t n_threads) {
  const IsaKernels* kernels = usable_isa(isa);
  if (!kernels) return LLMQ_STATUS_ISA;
  if (m < 0 || k < 1 || k > LLMQ_MAX_K || x_stride < k) return LLMQ_STATUS_SHAPE;
  if (!dtype_known(dtype)) return LLMQ_STATUS_FORMAT;
  if (!(eps >= 1.17549435e-38f && eps <= 3.40282347e+38f)) return LLMQ_STATUS_EPS;
  if (n_threads < 1) return LLMQ_STATUS_THREADS;
  if (m == 0) return LLMQ_STATUS_OK;
  if (!x || !q || !scale) return LLMQ_STATUS_NULL;
  const Dtype type = dtype_of(dtype);
  const int64_t rows_per_task = max_of(1, kSerialElements / k), tasks = ceil_div(m, rows_per_task);
  parallel_region(tasks == 1 ? 1 : n_threads, [&](Team& team) {
    team.share(tasks, [&](int64_t task, int32_t) {
      for (int64_t row = task * rows_per_task; row < min_of((task + 1) * rows_per_task, m); ++row) {
        kernels->quantize(static_cast<const uint8_t*>(x) + row * x_stride * element_bytes(type), type, k, eps,
                          q + row * k, reinterpret_cast<F32*>(scale) + row);
      }
    });
  });
  return LLMQ_STATUS_OK;
}
