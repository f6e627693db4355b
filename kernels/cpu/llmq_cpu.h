/* llmq_cpu: the native CPU kernels behind a plain C ABI.
 *
 * Rules, for every symbol:
 *   - the caller owns all memory; nothing is kept between calls; nothing is thrown; any number of threads may call at
 * once;
 *   - sizes are int64_t and counted in elements unless the name says bytes; matrices are row-major;
 *   - pointers to numbers need no alignment at all, not even that of their element; buffers of one call must not overlap;
 *   - bf16 values are their uint16_t bits;
 *   - what can fail returns an LLMQ_STATUS_*, and has then written nothing;
 *   - no result depends on `n_threads`, to the last bit; those of integer weights do not depend on `isa` either: integer
 * sums are exact, and each float is made by the same IEEE operations in the same order (no contraction).
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

#define LLMQ_ABI_VERSION 3

#define LLMQ_STATUS_OK 0
#define LLMQ_STATUS_NULL 1    /* a pointer that must point at something is NULL */
#define LLMQ_STATUS_SHAPE 2   /* m < 0, n < 1, k < 1, k > LLMQ_MAX_K, a row stride under k, or a group that fits not */
#define LLMQ_STATUS_ISA 3     /* no such isa, or this machine cannot run it */
#define LLMQ_STATUS_EPS 4     /* eps, or the input scale, is not a normal positive finite float */
#define LLMQ_STATUS_THREADS 5 /* n_threads < 1 */
#define LLMQ_STATUS_FORMAT 6  /* a number of the format is none, or numbers that do not go together */
#define LLMQ_STATUS_MODEL 7   /* sizes of a model that cannot be, or a linear that has not the model's shape */
#define LLMQ_STATUS_CACHE 8   /* a cache of another batch or dtype, or positions that it has no room for */
#define LLMQ_STATUS_TOKEN 9   /* a token that is not in the vocabulary */

/* Above it a sum of K products of codes could leave int32: 2^17 * 127 * 128 = 2130706432 < 2^31 - 1. */
#define LLMQ_MAX_K 131072

/* LLMQ_ABI_VERSION of the library; raised whenever a symbol, an argument, a struct or a layout changes meaning. */
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

/* ---- linear --------------------------------------------------------------------------------------------------------
 *
 * y = x W^T + bias for a weight [N, K] of integer codes q with a scale s for each group of `group` inputs of a row, or of
 * floats. With integer codes everything below is exact or rounded in fp32 in this order, and the result depends on neither
 * isa nor n_threads nor the other rows, to the last bit:
 *
 *   LLMQ_ACTIVATION_FLOAT   x as 16-bit block floating point: the inputs of a group, at most 256 at a time, share a power of
 *                           two, e = the least with rint(max |x| / e) <= 32639; c = rint(x / e), exact for the x of 8
 *                           significant bits that are above 2^-6 of the block's largest.
 *                               y = sum over blocks of  s * e * float(sum c * (q - z))          (z: below)
 *   LLMQ_ACTIVATION_INT8    one scale a row: xs = max(max |x| / 127, eps), c = clamp(rint(x * (1 / xs)), -127, 127)
 *   LLMQ_ACTIVATION_STATIC  one scale for all rows, given: xs = input_scale, c as above; what is beyond it is clamped
 *   LLMQ_ACTIVATION_UINT8   one scale and zero point a row (asymmetric), as llmq's ActivationGrid(symmetric=False) has it,
 *                           c = code - zero point
 *                               y = xs * sum over blocks of  s * float(sum c * (q - z))
 *                           blocks as above, but a row of int8 weights with one scale and symmetric activations is one
 *
 *   LLMQ_ZERO_NONE   codes around 0: z = 0 (int8), z = 8 (int4, whose stored codes are 0..15)
 *   LLMQ_ZERO_INT    z is an integer of each group
 *   LLMQ_ZERO_FLOAT  z = 8, and a number f of each group is added: + f * e * float(sum c)
 *
 * Rows with a NaN or an infinity come out as NaN and spoil no other row. */
#define LLMQ_WEIGHT_INT8 1
#define LLMQ_WEIGHT_INT4 2
#define LLMQ_WEIGHT_BF16 3 /* no codes, no scales: fp32 sums, in an order that depends on isa alone */
#define LLMQ_WEIGHT_F32 4  /* the same */
#define LLMQ_ZERO_NONE 0
#define LLMQ_ZERO_INT 1
#define LLMQ_ZERO_FLOAT 2
#define LLMQ_SCALE_NONE 0 /* float weights */
#define LLMQ_SCALE_F32 1
#define LLMQ_SCALE_BF16 2 /* scales, and floating zero points, are bf16 numbers and stored as such */
#define LLMQ_ACTIVATION_FLOAT 0
#define LLMQ_ACTIVATION_INT8 1
#define LLMQ_ACTIVATION_UINT8 2
#define LLMQ_ACTIVATION_STATIC 3
#define LLMQ_DTYPE_F32 0
#define LLMQ_DTYPE_BF16 1

/* One linear. `group` divides K and is a multiple of 8, or is K itself (one scale a row). INT8 weights have ZERO_NONE. */
typedef struct LlmqLinear {
  int64_t n, k, group;
  int32_t weight, zero, scale, activation; /* LLMQ_WEIGHT_*, LLMQ_ZERO_*, LLMQ_SCALE_*, LLMQ_ACTIVATION_* */
  float eps;         /* least scale of a row of INT8 and UINT8 activations: a positive, finite, normal float */
  float input_scale; /* the scale of STATIC activations: such a float, too */
  const uint8_t* packed;                   /* [packed_bytes], what llmq_linear_pack wrote; any address */
  const float* bias;                       /* [N] or NULL */
} LlmqLinear;

/* The name of the layout that llmq_linear_pack writes for this isa and kind of weight; NULL for numbers that are none. */
LLMQ_API const char* llmq_linear_layout(int32_t isa, int32_t weight);

/* *bytes = size of the packed form; `packed` and `bias` of the linear are not looked at, nor are they by the next two. */
LLMQ_API int32_t llmq_linear_packed_bytes(int32_t isa, const LlmqLinear* linear, int64_t* bytes);

/* Canonical tensors -> kernel layout, and back bit for bit (scales that were bf16 numbers are such again). A layout belongs
 * to the isa that packed it: never write one to a file. */
LLMQ_API int32_t llmq_linear_pack(int32_t isa, const LlmqLinear* linear,
                                  const void* weight /* [N, K]: int8; uint8 0..15; bf16; fp32 */,
                                  const float* scale /* [N, K / group], NULL for float weights */,
                                  const float* zero /* [N, K / group] of numbers or integers, NULL with ZERO_NONE */,
                                  uint8_t* packed /* [packed_bytes] */, int32_t n_threads);
LLMQ_API int32_t llmq_linear_unpack(int32_t isa, const LlmqLinear* linear, const uint8_t* packed /* [packed_bytes] */,
                                    void* weight /* [N, K] */, float* scale /* [N, K / group] or NULL */,
                                    float* zero /* [N, K / group] or NULL */, int32_t n_threads);

/* *bytes = scratch that llmq_linear needs for m rows. */
LLMQ_API int32_t llmq_linear_workspace_bytes(int32_t isa, const LlmqLinear* linear, int64_t m, int64_t* bytes);

/* y = x W^T + bias. */
LLMQ_API int32_t llmq_linear(int32_t isa, const LlmqLinear* linear,
                             const void* x /* [M, K] of dtype, rows x_stride apart */, void* y /* [M, N] of dtype */,
                             uint8_t* workspace /* [workspace_bytes] */, int64_t m, int64_t x_stride,
                             int32_t dtype /* LLMQ_DTYPE_* */, int32_t n_threads);

/* Per-token symmetric int8, all in fp32 and rounding half to even:
 *     scale[m] = max(max_k |x[m, k]| / 127, eps)
 *     q[m, k]  = clamp(rint(x[m, k] * (1 / scale[m])), -127, 127)
 * A row that holds a NaN has scale NaN, one that holds an infinity and no NaN has scale +inf; their codes are all 0. */
LLMQ_API int32_t llmq_quantize_per_token(int32_t isa, const void* x /* [M, K] of dtype, rows x_stride apart */,
                                         int8_t* q /* [M, K] */, float* scale /* [M] */, int64_t m, int64_t k,
                                         int64_t x_stride, int32_t dtype, float eps, int32_t n_threads);

/* ---- llama ---------------------------------------------------------------------------------------------------------
 *
 * A whole forward pass of a model of the Llama family in one call, on one team of threads: embedding, blocks, and as much of
 * the head as is asked for. Everything between the linears is fp32, and rounded to the model's dtype (rn) where a model of
 * torch tensors would: with h the residual stream,
 *
 *     x = rn(h / sqrt(mean(h^2) + norm_eps) * norm)
 *     q, k, v = rn(linear(x));  q = rn(rotate(q)) and k = rotate(k) rounded by the cache;  a = rn(attention)
 *     h = rn(h + rn(o(a)));  h = rn(h + rn(down(rn(rn(silu(rn(gate(x)))) * rn(up(x))))))
 *
 * q is rounded to the cache's dtype, or the model's when the cache is int8; softmax and the sum of values are fp32. Attention
 * reads all keys and values, those of the call's own tokens too, as the cache holds them. Sums of attention, norm and softmax
 * have an order that depends on isa and on the positions, not on n_threads.
 *
 * Structs and arrays of pointers lie where C puts them; what they point at, at any address.
 *
 * Letters: B sequences, T tokens of each, H heads, H_kv key-value heads, D head_dim. */
#define LLMQ_CACHE_F32 0
#define LLMQ_CACHE_BF16 1
#define LLMQ_CACHE_INT8 2      /* codes, and scales max(max |x| / 127, 1e-8) of each token and head */
#define LLMQ_OUTPUT_HIDDEN 0   /* [B, T, hidden]: h after the last block, what llmq_llama_head takes */
#define LLMQ_OUTPUT_LAST 1     /* [B, vocab]: logits of the last token of each sequence */
#define LLMQ_OUTPUT_ALL 2      /* [B, T, vocab]: logits of all tokens */

typedef struct LlmqBlock {
  LlmqLinear q, k, v, o, gate, up, down;
  const float* attention_norm; /* [hidden] */
  const float* mlp_norm;       /* [hidden] */
  int64_t window;              /* keys that a token sees, itself included; 0: all before it */
} LlmqBlock;

typedef struct LlmqLlama {
  int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim;
  int32_t dtype; /* LLMQ_DTYPE_*: of embedding, residual stream and results */
  float norm_eps;
  const void* embedding;   /* [vocab, hidden] of dtype */
  const float* final_norm; /* [hidden] */
  const LlmqBlock* blocks; /* [layers] */
  LlmqLinear head;
} LlmqLlama;

/* Keys (rotated) and values of a call's sequences. Pointers of one layer each. */
typedef struct LlmqKVCache {
  int64_t batch, length; /* B, and tokens there is room for */
  int32_t dtype;         /* LLMQ_CACHE_* */
  int32_t reserved;      /* 0 */
  void* const* keys;     /* [layers] of [B, H_kv, length, D] */
  void* const* values;   /* [layers] of [B, H_kv, length, D] */
  float* const* key_scales;   /* [layers] of [B, H_kv, length] for INT8, else NULL */
  float* const* value_scales; /* [layers] of [B, H_kv, length] for INT8, else NULL */
  const float* cosines;       /* [length, D] */
  const float* sines;         /* [length, D], the first half of each row negated */
} LlmqKVCache;

/* *bytes = scratch that llmq_llama_forward needs for B sequences of T tokens from position `start` on. */
LLMQ_API int32_t llmq_llama_workspace_bytes(int32_t isa, const LlmqLlama* model, int64_t b, int64_t t, int64_t start,
                                            int32_t n_threads, int64_t* bytes);

/* Reads B x T tokens that stand at `start` and after, and writes their keys and values to the cache, which holds those of
 * the positions before. LLMQ_STATUS_TOKEN and LLMQ_STATUS_CACHE: nothing has been written. */
LLMQ_API int32_t llmq_llama_forward(int32_t isa, const LlmqLlama* model, const LlmqKVCache* cache,
                                    const int64_t* tokens /* [B, T] */, int64_t b, int64_t t, int64_t start,
                                    int32_t output /* LLMQ_OUTPUT_* */, void* out /* of the model's dtype */,
                                    uint8_t* workspace /* [workspace_bytes] */, int32_t n_threads);

/* Logits [M, vocab] of rows h [M, hidden], both of the model's dtype: final norm and head. *bytes as above. */
LLMQ_API int32_t llmq_llama_head_workspace_bytes(int32_t isa, const LlmqLlama* model, int64_t m, int32_t n_threads,
                                                 int64_t* bytes);
LLMQ_API int32_t llmq_llama_head(int32_t isa, const LlmqLlama* model, const void* h, void* out, uint8_t* workspace,
                                 int64_t m, int32_t n_threads);

/* y[i] = e^x[i] as the softmax and SiLU above have it: relative error below 2^-22 where e^x is a normal float, 0 below,
 * infinity from 88.7228 on, NaN for NaN. */
LLMQ_API int32_t llmq_exp(int32_t isa, const float* x /* [n] */, float* y /* [n] */, int64_t n);

#ifdef __cplusplus
}
#endif

#endif /* LLMQ_CPU_H_ */
