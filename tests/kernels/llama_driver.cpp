// Drives the section `llama` of the C ABI without Python, for the sanitizers and for machines that are emulated. A
// small random model of odd sizes on every instruction set that runs here: against a naive reference in double, in
// pieces of several lengths, by one thread and by three, with buffers that start one byte off any alignment and end
// where the allocation ends. Prints one line an instruction set; exits 1 at the first difference.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "llmq_cpu.h"

namespace {

long checks = 0;

void expect(bool ok, const char* what, double a = 0, double b = 0) {
  ++checks;
  if (ok) return;
  fprintf(stderr, "FAILED: %s (%g, %g)\n", what, a, b);
  exit(1);
}

// `count` T that start at an odd address; AddressSanitizer guards the end.
template <class T>
class Odd {
 public:
  explicit Odd(int64_t count) : raw_(static_cast<uint8_t*>(malloc(count * sizeof(T) + 1))), count_(count) {
    memset(raw_, 0xa5, count * sizeof(T) + 1);
  }
  explicit Odd(const std::vector<T>& values) : Odd(static_cast<int64_t>(values.size())) {
    memcpy(raw_ + 1, values.data(), values.size() * sizeof(T));
  }
  ~Odd() { free(raw_); }
  Odd(const Odd&) = delete;
  Odd& operator=(const Odd&) = delete;
  T* data() const { return reinterpret_cast<T*>(raw_ + 1); }
  int64_t count() const { return count_; }
  T get(int64_t i) const {
    T value;
    memcpy(&value, raw_ + 1 + i * sizeof(T), sizeof(T));
    return value;
  }
  bool same(const Odd& other) const { return memcmp(raw_ + 1, other.raw_ + 1, count_ * sizeof(T)) == 0; }

 private:
  uint8_t* raw_;
  int64_t count_;
};

uint64_t state = 1;
double random_number() {  // Knuth's MMIX generator, high half; in [-1, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<int32_t>(state >> 32) / 2147483648.0;
}

float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
float widen(uint16_t bf16) { return float_of(static_cast<uint32_t>(bf16) << 16); }
uint16_t narrow(double x) {  // finite; the nearer neighbour, the even one of two
  const float single = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &single, 4);
  const uint16_t low = static_cast<uint16_t>(bits >> 16), high = static_cast<uint16_t>(low + 1);
  const double below = fabs(x - widen(low)), above = fabs(widen(high) - x);
  return below < above || (below == above && !(low & 1)) ? low : high;
}

constexpr int64_t kVocab = 33, kHidden = 40, kInner = 56, kLayers = 2, kHeads = 6, kKvHeads = 2, kDim = 10;
constexpr int64_t kBatch = 2, kTokens = 24, kLength = 25, kWindow = 5;
constexpr float kNormEps = 1e-5f;

enum Kind { kQ, kK, kV, kO, kGate, kUp, kDown, kKinds };
constexpr int64_t kShape[kKinds][2] = {{kHeads * kDim, kHidden}, {kKvHeads * kDim, kHidden}, {kKvHeads * kDim, kHidden},
                                       {kHidden, kHeads * kDim}, {kInner, kHidden},          {kInner, kHidden},
                                       {kHidden, kInner}};

using Numbers = std::vector<double>;
Numbers random_numbers(int64_t count, double scale, double offset = 0) {
  Numbers found(count);
  for (double& x : found) x = widen(narrow(offset + scale * random_number()));  // bf16 numbers serve both dtypes
  return found;
}

// The weights as numbers, the same for every instruction set and format.
struct Weights {
  Numbers embedding, final_norm, head, linear[kLayers][kKinds], bias[kLayers][kKinds], norm[kLayers][2];
  Weights() {
    embedding = random_numbers(kVocab * kHidden, 1);
    final_norm = random_numbers(kHidden, 0.5, 1);
    head = random_numbers(kVocab * kHidden, 0.3);
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      for (int kind = 0; kind < kKinds; ++kind) {
        linear[layer][kind] = random_numbers(kShape[kind][0] * kShape[kind][1], 0.3);
        bias[layer][kind] = random_numbers(kShape[kind][0], 0.2);
      }
      for (Numbers& norm : norm[layer]) norm = random_numbers(kHidden, 0.5, 1);
    }
  }
};

// ---- the reference: no cache, no rounding
// ----------------------------------------------------------------------------

Numbers linear(const Numbers& x, const Numbers& w, const Numbers& bias, int64_t n, int64_t k) {
  const int64_t m = static_cast<int64_t>(x.size()) / k;
  Numbers y(m * n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias.empty() ? 0 : bias[j];
      for (int64_t l = 0; l < k; ++l) sum += x[i * k + l] * w[j * k + l];
      y[i * n + j] = sum;
    }
  }
  return y;
}

Numbers normed(const Numbers& h, const Numbers& weight) {
  Numbers y(h.size());
  for (size_t row = 0; row < h.size(); row += kHidden) {
    double sum = 0;
    for (int64_t i = 0; i < kHidden; ++i) sum += h[row + i] * h[row + i];
    for (int64_t i = 0; i < kHidden; ++i) y[row + i] = h[row + i] / sqrt(sum / kHidden + kNormEps) * weight[i];
  }
  return y;
}

double angle(int64_t position, int64_t i) { return position * pow(10000.0, -2.0 * (i % (kDim / 2)) / kDim); }

void turn(Numbers& x, int64_t heads) {
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t head = 0; head < heads; ++head) {
      double* one = &x[(t * heads + head) * kDim];
      for (int64_t i = 0; i < kDim / 2; ++i) {
        const double a = one[i], b = one[i + kDim / 2], c = cos(angle(t, i)), s = sin(angle(t, i));
        one[i] = a * c - b * s;
        one[i + kDim / 2] = b * c + a * s;
      }
    }
  }
}

Numbers attention(const Numbers& q, const Numbers& k, const Numbers& v, int64_t window) {
  Numbers y(q.size());
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t head = 0; head < kHeads; ++head) {
      const int64_t group = head / (kHeads / kKvHeads);
      Numbers weights(kTokens);
      double total = 0;
      for (int64_t s = window && t >= window ? t - window + 1 : 0; s <= t; ++s) {
        double score = 0;
        for (int64_t i = 0; i < kDim; ++i)
          score += q[(t * kHeads + head) * kDim + i] * k[(s * kKvHeads + group) * kDim + i];
        total += weights[s] = exp(score / sqrt(static_cast<double>(kDim)));
      }
      for (int64_t s = 0; s <= t; ++s) {
        for (int64_t i = 0; i < kDim; ++i) {
          y[(t * kHeads + head) * kDim + i] += weights[s] / total * v[(s * kKvHeads + group) * kDim + i];
        }
      }
    }
  }
  return y;
}

// Logits [kTokens, kVocab] of one sequence.
Numbers reference(const Weights& w, const int64_t* tokens) {
  Numbers h(kTokens * kHidden);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t i = 0; i < kHidden; ++i) h[t * kHidden + i] = w.embedding[tokens[t] * kHidden + i];
  }
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    const auto apply = [&](int kind, const Numbers& x) {
      return linear(x, w.linear[layer][kind], w.bias[layer][kind], kShape[kind][0], kShape[kind][1]);
    };
    Numbers x = normed(h, w.norm[layer][0]);
    Numbers q = apply(kQ, x), k = apply(kK, x);
    turn(q, kHeads);
    turn(k, kKvHeads);
    const Numbers a = apply(kO, attention(q, k, apply(kV, x), layer == 1 ? kWindow : 0));
    for (size_t i = 0; i < h.size(); ++i) h[i] += a[i];
    x = normed(h, w.norm[layer][1]);
    Numbers gate = apply(kGate, x);
    const Numbers up = apply(kUp, x);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
    const Numbers down = apply(kDown, gate);
    for (size_t i = 0; i < h.size(); ++i) h[i] += down[i];
  }
  return linear(normed(h, w.final_norm), w.head, {}, kVocab, kHidden);
}

// ---- the same through the library
// ------------------------------------------------------------------------------------

struct Format {
  const char* name;
  int32_t weight, activation, dtype;
  double tolerance;  // of logits, relative to the largest; 0: only compared with itself
};

// Memory that the structs point at lives as long as this.
struct Model {
  std::vector<Odd<uint8_t>*> packed;
  std::vector<Odd<float>*> floats;
  Odd<uint16_t>* embedding16 = nullptr;
  LlmqBlock blocks[kLayers];
  LlmqLlama llama = {};
  int32_t isa;

  const float* vector(const Numbers& numbers) {
    floats.push_back(new Odd<float>(std::vector<float>(numbers.begin(), numbers.end())));
    return floats.back()->data();
  }

  LlmqLinear pack(const Format& format, const Numbers& w, const float* bias, int64_t n, int64_t k) {
    LlmqLinear linear = {};
    linear.n = n;
    linear.k = k;
    linear.group = k;
    linear.weight = format.weight;
    linear.activation = format.activation;
    const bool codes = format.weight == LLMQ_WEIGHT_INT8 || format.weight == LLMQ_WEIGHT_INT4;
    linear.scale = codes ? LLMQ_SCALE_F32 : LLMQ_SCALE_NONE;
    linear.eps = 1e-5f;
    linear.input_scale = format.activation == LLMQ_ACTIVATION_STATIC ? 0.02f + 0.001f * (n % 3) : 0;  // not all rows shared
    linear.bias = bias;
    std::vector<float> f32(w.begin(), w.end()), scale(n, 0.02f);
    std::vector<uint16_t> bf16(w.size());
    std::vector<uint8_t> bytes(w.size());
    for (size_t i = 0; i < w.size(); ++i) {
      bf16[i] = narrow(w[i]);
      const int code = static_cast<int>(w[i] * 400);
      bytes[i] = static_cast<uint8_t>(format.weight == LLMQ_WEIGHT_INT4 ? (code & 15) : code);
    }
    const void* const from = codes                               ? static_cast<const void*>(bytes.data())
                             : format.weight == LLMQ_WEIGHT_BF16 ? static_cast<const void*>(bf16.data())
                                                                 : f32.data();
    int64_t size = 0;
    expect(llmq_linear_packed_bytes(isa, &linear, &size) == 0, "packed_bytes");
    packed.push_back(new Odd<uint8_t>(size));
    expect(llmq_linear_pack(isa, &linear, from, codes ? scale.data() : nullptr, nullptr, packed.back()->data(), 1) == 0,
           "pack");
    linear.packed = packed.back()->data();
    return linear;
  }

  Model(int32_t isa_number, const Weights& w, const Format& format) : isa(isa_number) {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      LlmqBlock& block = blocks[layer];
      LlmqLinear* const linears[kKinds] = {&block.q, &block.k, &block.v, &block.o, &block.gate, &block.up, &block.down};
      for (int kind = 0; kind < kKinds; ++kind) {
        *linears[kind] =
            pack(format, w.linear[layer][kind], vector(w.bias[layer][kind]), kShape[kind][0], kShape[kind][1]);
      }
      block.attention_norm = vector(w.norm[layer][0]);
      block.mlp_norm = vector(w.norm[layer][1]);
      block.window = layer == 1 ? kWindow : 0;
    }
    std::vector<uint16_t> narrowed(w.embedding.size());
    for (size_t i = 0; i < narrowed.size(); ++i) narrowed[i] = narrow(w.embedding[i]);
    embedding16 = new Odd<uint16_t>(narrowed);
    llama.vocab = kVocab;
    llama.hidden = kHidden;
    llama.intermediate = kInner;
    llama.layers = kLayers;
    llama.heads = kHeads;
    llama.kv_heads = kKvHeads;
    llama.head_dim = kDim;
    llama.dtype = format.dtype;
    llama.norm_eps = kNormEps;
    llama.embedding =
        format.dtype == LLMQ_DTYPE_BF16 ? static_cast<const void*>(embedding16->data()) : vector(w.embedding);
    llama.final_norm = vector(w.final_norm);
    llama.blocks = blocks;
    llama.head = pack(format, w.head, nullptr, kVocab, kHidden);
  }
  ~Model() {
    for (Odd<uint8_t>* one : packed) delete one;
    for (Odd<float>* one : floats) delete one;
    delete embedding16;
  }
};

struct Cache {
  static constexpr int64_t kCount = kBatch * kKvHeads * kLength;
  std::vector<Odd<uint8_t>*> memory;
  void* keys[kLayers];
  void* values[kLayers];
  float* key_scales[kLayers];
  float* value_scales[kLayers];
  Odd<float> cosines{kLength * kDim}, sines{kLength * kDim};
  LlmqKVCache cache = {};

  template <class T>
  T* take(int64_t count) {
    memory.push_back(new Odd<uint8_t>(count * static_cast<int64_t>(sizeof(T))));
    return reinterpret_cast<T*>(memory.back()->data());
  }
  explicit Cache(int32_t dtype) {
    const int64_t element = dtype == LLMQ_CACHE_F32 ? 4 : dtype == LLMQ_CACHE_BF16 ? 2 : 1;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      keys[layer] = take<uint8_t>(kCount * kDim * element);
      values[layer] = take<uint8_t>(kCount * kDim * element);
      key_scales[layer] = take<float>(kCount);
      value_scales[layer] = take<float>(kCount);
    }
    for (int64_t position = 0; position < kLength; ++position) {
      for (int64_t i = 0; i < kDim; ++i) {
        const float c = static_cast<float>(cos(angle(position, i)));
        const float s = static_cast<float>((i < kDim / 2 ? -1 : 1) * sin(angle(position, i)));
        memcpy(cosines.data() + position * kDim + i, &c, 4);
        memcpy(sines.data() + position * kDim + i, &s, 4);
      }
    }
    cache = {kBatch, kLength, dtype, 0, keys, values, key_scales, value_scales, cosines.data(), sines.data()};
    if (dtype != LLMQ_CACHE_INT8) cache.key_scales = cache.value_scales = nullptr;
  }
  ~Cache() {
    for (Odd<uint8_t>* one : memory) delete one;
  }
};

// Logits [kBatch, kTokens, kVocab], the tokens read in pieces of `lengths`.
std::vector<double> logits(const Model& model, const Odd<int64_t>& tokens, int32_t kv,
                           const std::vector<int64_t>& lengths, int32_t threads) {
  Cache cache(kv);
  const bool bf16 = model.llama.dtype == LLMQ_DTYPE_BF16;
  std::vector<double> found(kBatch * kTokens * kVocab);
  int64_t start = 0;
  for (int64_t length : lengths) {
    std::vector<int64_t> part;
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t t = 0; t < length; ++t) part.push_back(tokens.get(b * kTokens + start + t));
    }
    const Odd<int64_t> ids(part);
    int64_t bytes = 0, head_bytes = 0;
    expect(llmq_llama_workspace_bytes(model.isa, &model.llama, kBatch, length, start, threads, &bytes) == 0, "bytes");
    const Odd<uint8_t> workspace(bytes);
    const int64_t element = bf16 ? 2 : 4, rows = kBatch * length;
    const Odd<uint8_t> all(rows * kVocab * element), hidden(rows * kHidden * element), again(rows * kVocab * element);
    const Odd<uint8_t> last(kBatch * kVocab * element);
    const auto run = [&](int32_t output, const Odd<uint8_t>& out) {
      expect(llmq_llama_forward(model.isa, &model.llama, &cache.cache, ids.data(), kBatch, length, start, output,
                                out.data(), workspace.data(), threads) == 0,
             "forward");
    };
    run(LLMQ_OUTPUT_HIDDEN, hidden);
    run(LLMQ_OUTPUT_LAST, last);
    run(LLMQ_OUTPUT_ALL, all);
    expect(llmq_llama_head_workspace_bytes(model.isa, &model.llama, rows, threads, &head_bytes) == 0, "head bytes");
    const Odd<uint8_t> scratch(head_bytes);
    expect(llmq_llama_head(model.isa, &model.llama, hidden.data(), again.data(), scratch.data(), rows, threads) == 0,
           "head");
    expect(again.same(all), "the head of the hidden state", static_cast<double>(length), threads);
    for (int64_t b = 0; b < kBatch; ++b) {
      const int64_t size = kVocab * element;
      expect(memcmp(last.data() + b * size, all.data() + ((b + 1) * length - 1) * size, size) == 0, "last logits");
    }
    for (int64_t i = 0; i < rows * kVocab; ++i) {
      const int64_t b = i / (length * kVocab), within = i % (length * kVocab);
      uint16_t half;
      float single;
      memcpy(&half, all.data() + i * 2, 2);
      if (!bf16) memcpy(&single, all.data() + i * 4, 4);
      found[(b * kTokens + start) * kVocab + within] = bf16 ? widen(half) : single;
    }
    start += length;
  }
  return found;
}

void check_format(int32_t isa, const Weights& weights, const Odd<int64_t>& tokens, const Format& format) {
  const Model model(isa, weights, format);
  std::vector<double> expected;
  for (int64_t b = 0; b < kBatch; ++b) {
    std::vector<int64_t> row;
    for (int64_t t = 0; t < kTokens; ++t) row.push_back(tokens.get(b * kTokens + t));
    const Numbers one = reference(weights, row.data());
    expected.insert(expected.end(), one.begin(), one.end());
  }
  double most = 0;
  for (double x : expected) most = fmax(most, fabs(x));
  for (int32_t kv : {LLMQ_CACHE_F32, LLMQ_CACHE_BF16, LLMQ_CACHE_INT8}) {
    const std::vector<int64_t> pieces = {7, 1, 1, 2, 12, 1};
    const std::vector<double> whole = logits(model, tokens, kv, {kTokens}, 1),
                              cut = logits(model, tokens, kv, pieces, 1);
    expect(logits(model, tokens, kv, {kTokens}, 3) == whole, "three threads at once", format.weight, kv);
    expect(logits(model, tokens, kv, pieces, 3) == cut, "three threads in pieces", format.weight, kv);
    // a cache of 8 significant bits, or of 1/127 of a head's largest, costs as much again as bf16 itself
    const double allowed = format.tolerance + (kv == LLMQ_CACHE_F32 ? 0 : 0.1);
    for (size_t i = 0; i < whole.size(); ++i) {
      expect(isfinite(whole[i]) && isfinite(cut[i]), "a finite logit", whole[i], cut[i]);
      if (format.tolerance == 0) continue;
      expect(fabs(whole[i] - expected[i]) <= allowed * most, format.name, whole[i], expected[i]);
      expect(fabs(cut[i] - expected[i]) <= allowed * most, format.name, cut[i], expected[i]);
    }
  }
}

void check_exp(int32_t isa) {
  std::vector<float> x;
  for (double at = -87.3; at < 88.7; at += 0.00171) x.push_back(static_cast<float>(at));
  const size_t finite = x.size();
  for (float one : {-INFINITY, -200.0f, -87.4f, 88.73f, 300.0f, INFINITY, NAN, 0.0f}) x.push_back(one);
  const Odd<float> in(x), out(static_cast<int64_t>(x.size()));
  expect(llmq_exp(isa, in.data(), out.data(), in.count()) == 0, "exp");
  for (size_t i = 0; i < finite; ++i) {
    const double truth = exp(static_cast<double>(x[i]));
    expect(fabs(out.get(i) - truth) <= truth * ldexp(1.0, -22), "exp within 2^-22", x[i], out.get(i));
  }
  for (size_t i = finite; i < finite + 3; ++i) expect(out.get(i) == 0, "exp far below", x[i], out.get(i));
  for (size_t i = finite + 3; i < finite + 6; ++i) expect(isinf(out.get(i)), "exp far above", x[i], out.get(i));
  expect(isnan(out.get(finite + 6)) && out.get(finite + 7) == 1, "exp of NaN and 0");
}

void check_refusals(int32_t isa, const Weights& weights) {
  Model model(isa, weights, {"refusals", LLMQ_WEIGHT_F32, LLMQ_ACTIVATION_FLOAT, LLMQ_DTYPE_F32, 0});
  Cache cache(LLMQ_CACHE_F32);
  int64_t tokens[kBatch] = {1, 2}, bytes = 0;
  float out[kBatch * kVocab] = {7};
  expect(llmq_llama_workspace_bytes(isa, &model.llama, kBatch, 1, 0, 1, &bytes) == 0, "bytes");
  std::vector<uint8_t> workspace(bytes);
  struct {
    const LlmqLlama* model;
    const LlmqKVCache* cache;
    int64_t b, t, start;
    int32_t output, threads;
  } call = {&model.llama, &cache.cache, kBatch, 1, 0, LLMQ_OUTPUT_LAST, 1};
  const auto is = [&](int32_t status, const char* what) {
    const int32_t found = llmq_llama_forward(isa, call.model, call.cache, tokens, call.b, call.t, call.start,
                                             call.output, out, workspace.data(), call.threads);
    expect(found == status && out[0] == 7, what, found, status);
    call = {&model.llama, &cache.cache, kBatch, 1, 0, LLMQ_OUTPUT_LAST, 1};
  };
  call.model = nullptr, is(LLMQ_STATUS_NULL, "no model");
  call.cache = nullptr, is(LLMQ_STATUS_NULL, "no cache");
  call.b = 0, is(LLMQ_STATUS_SHAPE, "no sequence");
  call.t = 0, is(LLMQ_STATUS_SHAPE, "no token");
  call.start = -1, is(LLMQ_STATUS_SHAPE, "a start below 0");
  call.start = kLength, is(LLMQ_STATUS_CACHE, "a full cache");
  call.b = 1, is(LLMQ_STATUS_CACHE, "a cache of another batch");
  call.output = 3, is(LLMQ_STATUS_FORMAT, "an unknown output");
  call.threads = 0, is(LLMQ_STATUS_THREADS, "no thread");
  tokens[1] = kVocab, is(LLMQ_STATUS_TOKEN, "a token past the vocabulary");
  tokens[1] = -1, is(LLMQ_STATUS_TOKEN, "a token below 0");
  tokens[1] = 2;
  cache.cache.dtype = 9, is(LLMQ_STATUS_CACHE, "an unknown cache");
  cache.cache.dtype = LLMQ_CACHE_INT8, is(LLMQ_STATUS_NULL, "int8 without scales");
  cache.cache.dtype = LLMQ_CACHE_F32;
  cache.keys[1] = nullptr, is(LLMQ_STATUS_NULL, "a layer without keys");
  cache.keys[1] = cache.values[1];
  model.llama.head_dim = 5, is(LLMQ_STATUS_MODEL, "an odd head_dim");
  model.llama.head_dim = kDim;
  model.llama.kv_heads = 4, is(LLMQ_STATUS_MODEL, "heads that do not divide");
  model.llama.kv_heads = kKvHeads;
  model.blocks[1].o.n = kHidden + 1, is(LLMQ_STATUS_MODEL, "a linear of another shape");
  model.blocks[1].o.n = kHidden;
  model.blocks[0].up.weight = 77, is(LLMQ_STATUS_FORMAT, "a linear of no format");
  model.blocks[0].up.weight = LLMQ_WEIGHT_F32;
  model.blocks[1].down.packed = nullptr, is(LLMQ_STATUS_NULL, "a linear without weight");
  expect(llmq_llama_workspace_bytes(isa, &model.llama, 1, 1, 0, 1, nullptr) == LLMQ_STATUS_NULL, "bytes to nowhere");
  expect(llmq_llama_head(isa, &model.llama, out, out, nullptr, 1, 1) == LLMQ_STATUS_NULL, "no workspace");
  expect(llmq_exp(isa, nullptr, out, 1) == LLMQ_STATUS_NULL && llmq_exp(-1, out, out, 1) == LLMQ_STATUS_ISA, "exp");
}

}  // namespace

int main() {
  const Weights weights;
  std::vector<int64_t> ids(kBatch * kTokens);
  for (int64_t& id : ids) id = static_cast<int64_t>((random_number() + 1) / 2 * kVocab);
  const Odd<int64_t> tokens(ids);
  // fp32: sums of at most 60 floats in 16 linears; bf16: 8 significant bits after each of some 30 roundings
  const Format formats[] = {{"fp32", LLMQ_WEIGHT_F32, LLMQ_ACTIVATION_FLOAT, LLMQ_DTYPE_F32, 2e-5},
                            {"bf16", LLMQ_WEIGHT_BF16, LLMQ_ACTIVATION_FLOAT, LLMQ_DTYPE_BF16, 0.1},
                            {"int8", LLMQ_WEIGHT_INT8, LLMQ_ACTIVATION_INT8, LLMQ_DTYPE_BF16, 0},
                            {"int8 static", LLMQ_WEIGHT_INT8, LLMQ_ACTIVATION_STATIC, LLMQ_DTYPE_BF16, 0},
                            {"int4", LLMQ_WEIGHT_INT4, LLMQ_ACTIVATION_FLOAT, LLMQ_DTYPE_BF16, 0}};
  for (int32_t isa = 0; isa < llmq_isa_count(); ++isa) {
    if (!llmq_isa_available(isa)) {
      printf("%s: not on this machine\n", llmq_isa_name(isa));
      continue;
    }
    checks = 0;
    check_exp(isa);
    check_refusals(isa, weights);
    for (const Format& format : formats) check_format(isa, weights, tokens, format);
    printf("%s: %ld checks\n", llmq_isa_name(isa), checks);
  }
  return 0;
}
