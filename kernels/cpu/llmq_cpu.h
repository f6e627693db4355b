/* llmq_cpu: the native CPU kernels behind a plain C ABI.
 *
 * Rules, for every symbol:
 *   - the caller owns all memory; nothing is kept between calls; nothing is thrown; any number of threads may call at
 * once;
 *   - sizes are int64_t and counted in elements unless the name says bytes; matrices are row-major;
 *   - pointers need no alignment at all, not even that of their element; buffers of one call must not overlap;
 *   - bf16 values are their uint16_t bits;
 *   - what can fail returns an LLMQ_STATUS_*, and has then written nothing;
 *   - the result depends on neither `n_threads` nor `isa`, to the last bit: integer sums are exact, and each float is
 * made by the same IEEE operations in the same order (no contraction).
 *
 * `isa` numbers an instruction set of this build: 0 <= isa < llmq_isa_count(), and llmq_isa_available(isa) must be 1.
 * llmq_isa_best() names the fastest one; tests name others.
 *
 * Letters: M rows of x (tokens), N out_features, K in_features.
 */
#ifndef LLMQ_CPU_H_
#define LLMQ_CPU_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLMQ_API __attribute__((visibility("default")))

#define LLMQ_ABI_VERSION 1

#define LLMQ_STATUS_OK 0
#define LLMQ_STATUS_NULL 1    /* a pointer that must point at something is NULL */
#define LLMQ_STATUS_SHAPE 2   /* m < 0, n < 1, k < 1, k > LLMQ_MAX_K, or a row stride under k */
#define LLMQ_STATUS_ISA 3     /* no such isa, or this machine cannot run it */
#define LLMQ_STATUS_EPS 4     /* eps is not a normal positive finite float */
#define LLMQ_STATUS_THREADS 5 /* n_threads < 1 */

/* Above it a sum of K products of codes could leave int32: 2^17 * 127 * 128 = 2130706432 < 2^31 - 1. */
#define LLMQ_MAX_K 131072

/* LLMQ_ABI_VERSION of the library; raised whenever a symbol, an argument or a layout changes meaning. */
LLMQ_API int32_t llmq_abi_version(void);

/* One sentence for an LLMQ_STATUS_*. */
LLMQ_API const char* llmq_status_message(int32_t status);

/* "openmp" or "serial" (built without OpenMP: n_threads is then taken, and ignored). */
LLMQ_API const char* llmq_threading(void);

/* Number of instruction sets in this build, slowest first. */
LLMQ_API int32_t llmq_isa_count(void);

/* "generic", "avx2", "avx512vnni" or "neon-dotprod"; NULL for a number that is none. */
LLMQ_API const char* llmq_isa_name(int32_t isa);

/* 1 when this processor and operating system run it, else 0. */
LLMQ_API int32_t llmq_isa_available(int32_t isa);

/* The fastest available one. */
LLMQ_API int32_t llmq_isa_best(void);

/* The layout tag of packed int8 weights (see llmq_int8_pack); NULL for a number that is no isa. */
LLMQ_API const char* llmq_int8_layout(int32_t isa);

/* *bytes = size of the packed form of int8 [N, K]. */
LLMQ_API int32_t llmq_int8_packed_bytes(int32_t isa, int64_t n, int64_t k, int64_t* bytes);

/* Canonical codes -> kernel layout: panels of 16 output features, each of ceil(K/u) steps, each of [16][u] codes:
 *     packed[((p * steps + s) * 16 + j) * u + t] = w[16 * p + j][u * s + t], zero beyond N and K.
 *   "int8-n16k2"   u = 2: one lane of pmaddwd             (generic, avx2)
 *   "int8-n16k4"   u = 4: one lane of sdot                (neon-dotprod)
 *   "uint8-n16k4"  u = 4: one lane of vpdpbusd, each code stored as code + 128 (avx512vnni)
 * A layout belongs to the machine that packed it: never write one to a file. */
LLMQ_API int32_t llmq_int8_pack(int32_t isa, const int8_t* w /* [N, K] */, uint8_t* packed /* [packed_bytes] */,
                                int64_t n, int64_t k, int32_t n_threads);

/* Inverse of llmq_int8_pack, bit for bit. */
LLMQ_API int32_t llmq_int8_unpack(int32_t isa, const uint8_t* packed /* [packed_bytes] */, int8_t* w /* [N, K] */,
                                  int64_t n, int64_t k, int32_t n_threads);

/* Per-token symmetric int8, all in fp32 and rounding half to even:
 *     scale[m] = max(max_k |x[m, k]| / 127, eps)
 *     q[m, k]  = clamp(rint(x[m, k] * (1 / scale[m])), -127, 127)
 * A row that holds a NaN has scale NaN, one that holds an infinity and no NaN has scale +inf; their codes are all 0, so
 * that a linear of such a row is NaN throughout, and the other rows are untouched by it. */
LLMQ_API int32_t llmq_quantize_per_token_f32(int32_t isa, const float* x /* [M, K], rows x_stride apart */,
                                             int8_t* q /* [M, K] */, float* scale /* [M] */, int64_t m, int64_t k,
                                             int64_t x_stride, float eps, int32_t n_threads);
LLMQ_API int32_t llmq_quantize_per_token_bf16(int32_t isa, const uint16_t* x /* [M, K], rows x_stride apart */,
                                              int8_t* q /* [M, K] */, float* scale /* [M] */, int64_t m, int64_t k,
                                              int64_t x_stride, float eps, int32_t n_threads);

/* *bytes = scratch that llmq_int8_dynamic_linear_* needs: a few bytes an element of at most 512 rows. */
LLMQ_API int32_t llmq_int8_dynamic_linear_workspace_bytes(int32_t isa, int64_t m, int64_t k, int64_t* bytes);

/* With q, scale as llmq_quantize_per_token makes them of x, in fp32 and in this order:
 *     y[m, n] = float(sum_k q[m, k] * w[n, k]) * scale[m] * w_scale[n] + bias[n]
 * The sum is exact; y is rounded to its dtype (that of x) once, half to even. bias may be NULL: nothing is then added.
 */
LLMQ_API int32_t llmq_int8_dynamic_linear_f32(int32_t isa, const float* x /* [M, K], rows x_stride apart */,
                                              const uint8_t* packed /* [packed_bytes] */,
                                              const float* w_scale /* [N] */, const float* bias /* [N] or NULL */,
                                              float* y /* [M, N] */, uint8_t* workspace /* [workspace_bytes] */,
                                              int64_t m, int64_t n, int64_t k, int64_t x_stride, float eps,
                                              int32_t n_threads);
LLMQ_API int32_t llmq_int8_dynamic_linear_bf16(int32_t isa, const uint16_t* x /* [M, K], rows x_stride apart */,
                                               const uint8_t* packed /* [packed_bytes] */,
                                               const float* w_scale /* [N] */, const float* bias /* [N] or NULL */,
                                               uint16_t* y /* [M, N] */, uint8_t* workspace /* [workspace_bytes] */,
                                               int64_t m, int64_t n, int64_t k, int64_t x_stride, float eps,
                                               int32_t n_threads);

#ifdef __cplusplus
}
#endif

#endif /* LLMQ_CPU_H_ */
