// The section `llama` of the C ABI: checks arguments, and starts the threads.
#include "layout.h"
#include "llama.h"
#include "registry.h"

namespace llmq {
namespace {

bool shaped(const LlmqLinear& linear, int64_t n, int64_t k) { return linear.n == n && linear.k == k; }

// Whether a linear has a format and, when a call is about to use it, a weight.
int32_t check_format(const LlmqLinear& linear, bool used) {
  const int32_t status = check_linear(linear);
  if (status) return status;
  return used && !linear.packed ? LLMQ_STATUS_NULL : LLMQ_STATUS_OK;
}

int32_t check_block(const LlmqLlama& model, const LlmqBlock& block, bool used) {
  const int64_t q = model.heads * model.head_dim, kv = model.kv_heads * model.head_dim;
  const int64_t hidden = model.hidden, inner = model.intermediate;
  const bool fits = shaped(block.q, q, hidden) && shaped(block.k, kv, hidden) && shaped(block.v, kv, hidden) &&
                    shaped(block.o, hidden, q) && shaped(block.gate, inner, hidden) &&
                    shaped(block.up, inner, hidden) && shaped(block.down, hidden, inner) && block.window >= 0;
  if (!fits) return LLMQ_STATUS_MODEL;
  if (used && (!block.attention_norm || !block.mlp_norm)) return LLMQ_STATUS_NULL;
  const LlmqLinear* const linears[] = {&block.q, &block.k, &block.v, &block.o, &block.gate, &block.up, &block.down};
  for (const LlmqLinear* linear : linears) {
    const int32_t status = check_format(*linear, used);
    if (status) return status;
  }
  return LLMQ_STATUS_OK;
}

// `used`: weights are about to be read; else only sizes are looked at.
int32_t check_model(const LlmqLlama* model, bool used) {
  if (!model || !model->blocks) return LLMQ_STATUS_NULL;
  const LlmqLlama& m = *model;
  const bool positive = m.vocab > 0 && m.hidden > 0 && m.intermediate > 0 && m.layers > 0 && m.heads > 0 &&
                        m.kv_heads > 0 && m.head_dim > 0;
  if (!positive || m.heads % m.kv_heads || m.head_dim % 2 || !shaped(m.head, m.vocab, m.hidden)) {
    return LLMQ_STATUS_MODEL;
  }
  if (m.dtype != LLMQ_DTYPE_F32 && m.dtype != LLMQ_DTYPE_BF16) return LLMQ_STATUS_FORMAT;
  if (used && (!m.embedding || !m.final_norm)) return LLMQ_STATUS_NULL;
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    const int32_t status = check_block(m, m.blocks[layer], used);
    if (status) return status;
  }
  return check_format(m.head, used);
}

int32_t check_cache(const LlmqLlama& model, const LlmqKVCache* cache, const LlamaCall& call) {
  if (!cache || !cache->keys || !cache->values || !cache->cosines || !cache->sines) return LLMQ_STATUS_NULL;
  const bool int8 = cache->dtype == LLMQ_CACHE_INT8;
  if (int8 && (!cache->key_scales || !cache->value_scales)) return LLMQ_STATUS_NULL;
  for (int64_t layer = 0; layer < model.layers; ++layer) {
    if (!cache->keys[layer] || !cache->values[layer]) return LLMQ_STATUS_NULL;
    if (int8 && (!cache->key_scales[layer] || !cache->value_scales[layer])) return LLMQ_STATUS_NULL;
  }
  const bool known = int8 || cache->dtype == LLMQ_CACHE_F32 || cache->dtype == LLMQ_CACHE_BF16;
  return known && cache->batch == call.batch && call.start + call.length <= cache->length ? LLMQ_STATUS_OK
                                                                                          : LLMQ_STATUS_CACHE;
}

int32_t check_tokens(const LlmqLlama& model, const int64_t* tokens, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t token;
    __builtin_memcpy(&token, reinterpret_cast<const uint8_t*>(tokens) + i * 8, sizeof(token));
    if (token < 0 || token >= model.vocab) return LLMQ_STATUS_TOKEN;
  }
  return LLMQ_STATUS_OK;
}

// One line more than the layout: the caller's memory may begin anywhere.
int32_t workspace_bytes(const IsaKernels* isa, const LlamaCall& call, int32_t n_threads, int64_t* bytes) {
  if (!isa || !isa->vector) return LLMQ_STATUS_ISA;
  const int32_t status = check_model(call.model, false);
  if (status) return status;
  if (call.batch < 1 || call.length < 1 || call.start < 0) return LLMQ_STATUS_SHAPE;
  if (n_threads < 1) return LLMQ_STATUS_THREADS;
  if (!bytes) return LLMQ_STATUS_NULL;
  *bytes = LlamaForward(*isa, call, n_threads).lay_out(nullptr) + kLine;
  return LLMQ_STATUS_OK;
}

int32_t forward(const IsaKernels& isa, const LlamaCall& call, uint8_t* workspace, int32_t n_threads) {
  const int64_t over = static_cast<int64_t>(reinterpret_cast<uintptr_t>(workspace) % kLine);
  LlamaForward pass(isa, call, n_threads);
  pass.lay_out(workspace + (over ? kLine - over : 0));
  parallel_region(n_threads, [&](Team& team) { pass.run(team); });
  return LLMQ_STATUS_OK;
}

}  // namespace
}  // namespace llmq

using namespace llmq;  // NOLINT: below are the symbols of the ABI alone

int32_t llmq_llama_workspace_bytes(int32_t isa, const LlmqLlama* model, int64_t b, int64_t t, int64_t start,
                                   int32_t n_threads, int64_t* bytes) {
  LlamaCall call = {};
  call.model = model;
  call.batch = b;
  call.length = t;
  call.start = start;
  return workspace_bytes(known_isa(isa), call, n_threads, bytes);
}

int32_t llmq_llama_forward(int32_t isa, const LlmqLlama* model, const LlmqKVCache* cache, const int64_t* tokens,
                           int64_t b, int64_t t, int64_t start, int32_t output, void* out, uint8_t* workspace,
                           int32_t n_threads) {
  const IsaKernels* kernels = usable_isa(isa);
  if (!kernels || !kernels->vector) return LLMQ_STATUS_ISA;
  int32_t status = check_model(model, true);
  if (status) return status;
  if (b < 1 || t < 1 || start < 0) return LLMQ_STATUS_SHAPE;
  if (output < LLMQ_OUTPUT_HIDDEN || output > LLMQ_OUTPUT_ALL) return LLMQ_STATUS_FORMAT;
  if (n_threads < 1) return LLMQ_STATUS_THREADS;
  if (!tokens || !out || !workspace) return LLMQ_STATUS_NULL;
  LlamaCall call = {};
  call.model = model;
  call.cache = cache;
  call.tokens = tokens;
  call.batch = b;
  call.length = t;
  call.start = start;
  call.output = output;
  call.out = out;
  status = check_cache(*model, cache, call);
  if (!status) status = check_tokens(*model, tokens, b * t);
  return status ? status : forward(*kernels, call, workspace, n_threads);
}

int32_t llmq_llama_head_workspace_bytes(int32_t isa, const LlmqLlama* model, int64_t m, int32_t n_threads,
                                        int64_t* bytes) {
  LlamaCall call = {};
  call.model = model;
  call.batch = m;
  call.length = 1;
  call.head_only = true;
  return workspace_bytes(known_isa(isa), call, n_threads, bytes);
}

int32_t llmq_llama_head(int32_t isa, const LlmqLlama* model, const void* h, void* out, uint8_t* workspace, int64_t m,
                        int32_t n_threads) {
  const IsaKernels* kernels = usable_isa(isa);
  if (!kernels || !kernels->vector) return LLMQ_STATUS_ISA;
  const int32_t status = check_model(model, true);
  if (status) return status;
  if (m < 1) return LLMQ_STATUS_SHAPE;
  if (n_threads < 1) return LLMQ_STATUS_THREADS;
  if (!h || !out || !workspace) return LLMQ_STATUS_NULL;
  LlamaCall call = {};
  call.model = model;
  call.batch = m;
  call.length = 1;
  call.output = LLMQ_OUTPUT_ALL;
  call.out = out;
  call.head_only = true;
  call.hidden = h;
  return forward(*kernels, call, workspace, n_threads);
}

int32_t llmq_exp(int32_t isa, const float* x, float* y, int64_t n) {
  const IsaKernels* kernels = usable_isa(isa);
  if (!kernels || !kernels->vector) return LLMQ_STATUS_ISA;
  if (n < 0) return LLMQ_STATUS_SHAPE;
  if (n && (!x || !y)) return LLMQ_STATUS_NULL;
  kernels->vector->exp(reinterpret_cast<const F32*>(x), reinterpret_cast<F32*>(y), n);
  return LLMQ_STATUS_OK;
}
