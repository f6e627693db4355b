// Drives the C ABI's linears without Python, for the sanitizers and for machines that are emulated. Every instruction
// set that runs here against a naive reference (int64 sums, float operations one at a time; fp64 for float weights),
// with buffers that start one byte off any alignment and end where the allocation ends. Prints one line an instruction
// set; exits 1 at the first difference.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "llmq_cpu.h"

namespace {

constexpr float kEps = 1e-5f;
constexpr float kInputScale = 0.0073f;  // of static activations
long checks = 0;

void expect(bool ok, const char* what, int64_t a = 0, int64_t b = 0) {
  ++checks;
  if (ok) return;
  fprintf(stderr, "FAILED: %s (%lld, %lld)\n", what, static_cast<long long>(a), static_cast<long long>(b));
  exit(1);
}

// A buffer of `count` T that starts at an odd address; AddressSanitizer guards its end.
template <class T>
class Odd {
 public:
  explicit Odd(int64_t count) : raw_(static_cast<uint8_t*>(malloc(count * sizeof(T) + 1))), count_(count) {}
  ~Odd() { free(raw_); }
  Odd(const Odd&) = delete;
  Odd& operator=(const Odd&) = delete;
  T* data() const { return reinterpret_cast<T*>(raw_ + 1); }
  T get(int64_t i) const {
    T value;
    memcpy(&value, raw_ + 1 + i * sizeof(T), sizeof(T));
    return value;
  }
  void set(int64_t i, T value) { memcpy(raw_ + 1 + i * sizeof(T), &value, sizeof(T)); }
  void fill(const std::vector<T>& values) {
    if (!values.empty()) memcpy(raw_ + 1, values.data(), values.size() * sizeof(T));
  }
  void poison() { memset(raw_ + 1, 0xa5, count_ * sizeof(T)); }
  bool same(const Odd& other) const { return memcmp(raw_ + 1, other.raw_ + 1, count_ * sizeof(T)) == 0; }

 private:
  uint8_t* raw_;
  int64_t count_;
};

uint64_t state = 1;
uint32_t random32() {  // Knuth's MMIX generator, high half
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}
float random_float() { return static_cast<float>(static_cast<int32_t>(random32())) / 2147483648.0f; }

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
float widen(uint16_t bf16) { return float_of(static_cast<uint32_t>(bf16) << 16); }

// By distance, not by the carry trick that the library uses: the nearer neighbour, the even one when both are as near.
uint16_t to_bf16(float x) {
  if (isnan(x)) return 0x7fc0;
  const uint16_t low = static_cast<uint16_t>(bits_of(x) >> 16);
  if (isinf(x) || widen(low) == x) return low;
  const uint16_t high = static_cast<uint16_t>(low + 1);
  const double next = isinf(widen(high)) ? ldexp(x < 0 ? -1.0 : 1.0, 128) : widen(high);
  const double below = fabs(static_cast<double>(x) - widen(low)), above = fabs(next - x);
  if (below != above) return below < above ? low : high;
  return low & 1 ? high : low;
}

bool equal(float a, float b) { return bits_of(a) == bits_of(b) || (isnan(a) && isnan(b)) || (a == 0 && b == 0); }

// A kind of linear, and the dtype of x and y.
struct Kind {
  int32_t weight, zero, scale, activation, dtype;
  bool integer() const { return weight == LLMQ_WEIGHT_INT8 || weight == LLMQ_WEIGHT_INT4; }
  int64_t weight_bytes() const { return weight == LLMQ_WEIGHT_F32 ? 4 : weight == LLMQ_WEIGHT_BF16 ? 2 : 1; }
  int64_t element_bytes() const { return dtype == LLMQ_DTYPE_BF16 ? 2 : 4; }
  float stored(float number) const { return scale == LLMQ_SCALE_BF16 ? widen(to_bf16(number)) : number; }
};

enum class Fill { kRandom, kExtreme, kTies, kNotFinite };

// x as numbers that the dtype has; gaps between rows hold what must never be read.
std::vector<float> make_x(const Kind& kind, int64_t m, int64_t k, int64_t stride, Fill fill) {
  std::vector<float> x(m ? (m - 1) * stride + k : 0, 1e30f);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      float value = random_float() * ldexpf(1.0f, static_cast<int>(row % 40) - 20);
      if (row % 5 == 1) value = 0;
      if (row % 5 == 2 && i % 37 == 0) value *= 4096;              // beside which the others nearly vanish
      if (row % 7 == 3) value *= ldexpf(1.0f, -120);               // subnormals
      if (row % 7 == 4 && i % 8 == 0) value = float_of(0x3ffefefeu + random32() % 4);  // the edge of a block's step
      if (fill == Fill::kExtreme) value = (row + i) & 1 ? -32639.0f : 32639.0f;
      if (fill == Fill::kTies) value = i == 0 ? 127.0f : static_cast<float>(random32() % 508) / 2 - 127.0f;
      x[row * stride + i] = value;
    }
    if (fill == Fill::kNotFinite && row % 3 == 0) x[row * stride + k / 2] = row % 2 ? NAN : -INFINITY;
  }
  for (float& value : x) value = kind.dtype == LLMQ_DTYPE_BF16 ? widen(to_bf16(value)) : value;
  return x;
}

// The least power of two with rint(most / step) <= 32639, tried one by one.
double block_step(double most) {
  double step = ldexp(1.0, -126);
  while (nearbyint(most / step) > 32639) step *= 2;
  return step;
}

// Codes of one row, zero points subtracted, and what each block's, or the whole row's, sums are multiplied with.
struct Codes {
  std::vector<int> code;
  std::vector<float> step;  // one a block, or one
};

Codes block_codes(const float* x, int64_t k, int64_t group) {
  Codes codes{std::vector<int>(k), {}};
  for (int64_t begin = 0; begin < k;) {
    const int64_t left = group - begin % group, end = begin + (left < 256 ? left : 256);
    double most = 0;
    bool finite = true;
    for (int64_t i = begin; i < end; ++i) {
      finite = finite && isfinite(x[i]);
      most = fabs(x[i]) > most ? fabs(x[i]) : most;
    }
    const double step = finite ? block_step(most) : NAN;
    for (int64_t i = begin; i < end; ++i) codes.code[i] = finite ? static_cast<int>(nearbyint(x[i] / step)) : 0;
    codes.step.push_back(static_cast<float>(step));
    begin = end;
  }
  return codes;
}

Codes static_codes(const float* x, int64_t k) {
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) finite = finite && isfinite(x[i]);
  Codes codes{std::vector<int>(k), {finite ? kInputScale : NAN}};
  const volatile float inverse = 1.0f / kInputScale;
  for (int64_t i = 0; finite && i < k; ++i) {
    const volatile float scaled = x[i] * inverse;
    codes.code[i] = static_cast<int>(fminf(fmaxf(nearbyintf(scaled), -127), 127));
  }
  return codes;
}

Codes row_codes(const float* x, int64_t k, bool symmetric) {
  float least = 0, most = 0;
  bool nan = false, infinite = false;
  for (int64_t i = 0; i < k; ++i) {
    nan = nan || isnan(x[i]);
    infinite = infinite || isinf(x[i]);
    most = x[i] > most ? x[i] : most;
    least = x[i] < least ? x[i] : least;
  }
  const volatile float range = symmetric ? (most > -least ? most : -least) : most - least;
  const volatile float by_range = range / (symmetric ? 127.0f : 255.0f);
  const volatile float scale = nan ? NAN : infinite ? INFINITY : by_range > kEps ? by_range : kEps;
  Codes codes{std::vector<int>(k), {scale}};
  if (nan || isinf(scale)) return codes;
  const float low = symmetric ? -127 : -128;
  float zero = 0;
  if (!symmetric) {
    const volatile float at = least / scale;
    zero = fminf(fmaxf(-128 - nearbyintf(at), -128), 127);
  }
  const volatile float inverse = 1.0f / scale;
  for (int64_t i = 0; i < k; ++i) {
    const volatile float scaled = x[i] * inverse;
    codes.code[i] = static_cast<int>(fminf(fmaxf(nearbyintf(scaled) + zero, low), 127) - zero);
  }
  return codes;
}

// A linear in its canonical form.
struct Weight {
  Kind kind;
  int64_t n, k, group;
  Odd<uint8_t> stored;  // [N, K] of the weight's type
  Odd<float> scale, zero, bias;
  std::vector<double> meant;  // [N, K]: codes less their zero points, or the float weights

  Weight(const Kind& kind, int64_t n, int64_t k, int64_t group, bool extreme)
      : kind(kind), n(n), k(k), group(group), stored(n * k * kind.weight_bytes()), scale(n * (k / group)),
        zero(n * (k / group)), bias(n) {
    for (int64_t i = 0; i < n * k; ++i) {
      const bool int8 = kind.weight == LLMQ_WEIGHT_INT8;
      const uint32_t code = extreme ? (i % 3 ? (int8 ? 128 : 0) : (int8 ? 127 : 15)) : random32() % (int8 ? 256 : 16);
      if (kind.integer()) stored.set(i, static_cast<uint8_t>(code));
      const float number = random_float();
      const uint16_t bf16 = to_bf16(number);
      if (kind.weight == LLMQ_WEIGHT_BF16) memcpy(stored.data() + 2 * i, &bf16, 2);
      if (kind.weight == LLMQ_WEIGHT_F32) memcpy(stored.data() + 4 * i, &number, 4);
    }
    for (int64_t i = 0; i < n * (k / group); ++i) {
      scale.set(i, kind.stored(0.6f * random_float()));
      zero.set(i, kind.zero == LLMQ_ZERO_INT ? static_cast<float>(random32() % 16) : kind.stored(random_float()));
    }
    for (int64_t j = 0; j < n; ++j) bias.set(j, random_float());
    for (int64_t i = 0; i < n * k; ++i) meant.push_back(meaning(i));
  }

  LlmqLinear linear(const uint8_t* packed, bool with_bias) const {
    return {n, k, group, kind.weight, kind.zero, kind.scale, kind.activation, kEps, kInputScale, packed,
            with_bias ? bias.data() : nullptr};
  }

  double meaning(int64_t index) const {
    if (kind.weight == LLMQ_WEIGHT_INT8) return static_cast<int8_t>(stored.get(index));
    if (kind.weight == LLMQ_WEIGHT_INT4) {
      return stored.get(index) - (kind.zero == LLMQ_ZERO_INT ? zero.get(index / group) : 8);
    }
    float number;
    uint16_t bf16;
    memcpy(&bf16, stored.data() + index * 2, 2);
    if (kind.weight == LLMQ_WEIGHT_BF16) return widen(bf16);
    memcpy(&number, stored.data() + index * 4, 4);
    return number;
  }
};

float integer_output(const Weight& w, const Codes& codes, int64_t j, bool with_bias) {
  const bool quantized = w.kind.activation != LLMQ_ACTIVATION_FLOAT;
  const bool one_sum = quantized && w.kind.weight == LLMQ_WEIGHT_INT8 && w.group == w.k;
  const double* weights = &w.meant[j * w.k];
  volatile float y = 0;
  int64_t block = 0;
  for (int64_t begin = 0; begin < w.k; ++block) {
    const int64_t left = w.group - begin % w.group, end = begin + (left < 256 || one_sum ? left : 256);
    int64_t sum = 0, all = 0;
    for (int64_t i = begin; i < end; ++i) {
      sum += codes.code[i] * static_cast<int64_t>(weights[i]);
      all += codes.code[i];
    }
    const int64_t header = j * (w.k / w.group) + begin / w.group;
    const volatile float scale = quantized ? w.scale.get(header) : w.scale.get(header) * codes.step[block];
    const volatile float term = static_cast<float>(sum) * scale;
    y = y + term;
    if (w.kind.zero == LLMQ_ZERO_FLOAT) {
      const volatile float scaled = static_cast<float>(all) * codes.step[block];
      const volatile float shift = w.zero.get(header) * scaled;
      y = y + shift;
    }
    begin = end;
  }
  if (quantized) y = y * codes.step[0];
  if (with_bias) y = y + w.bias.get(j);
  return w.kind.dtype == LLMQ_DTYPE_BF16 ? widen(to_bf16(y)) : y;
}

// Float weights: fp32 sums in an unknown order, within Higham's bound of the exact one.
void check_float_output(const Weight& w, const float* x, float got, int64_t row, int64_t j, bool with_bias) {
  double sum = with_bias ? w.bias.get(j) : 0, terms = fabs(sum);
  for (int64_t i = 0; i < w.k; ++i) {
    sum += x[i] * w.meant[j * w.k + i];
    terms += fabs(x[i] * w.meant[j * w.k + i]);
  }
  const double unit = ldexp(1.0, -24), bound = (w.k + 4) * unit / (1 - (w.k + 4) * unit) * terms;
  const double rounding = w.kind.dtype == LLMQ_DTYPE_BF16 ? ldexp(fabs(sum) + bound, -8) : 0;
  const bool finite = isfinite(sum);
  expect(finite ? fabs(got - sum) <= bound + rounding + 1e-38 : !isfinite(got), "output of float weights", row, j);
}

void check_linear(int32_t isa, const Kind& kind, int64_t m, int64_t n, int64_t k, int64_t group, Fill fill) {
  const int64_t stride = k + (m + n) % 4;
  const bool with_bias = (m + n + k) % 2;
  const Weight w(kind, n, k, group, fill == Fill::kExtreme);
  const std::vector<float> x = make_x(kind, m, k, stride, fill);
  Odd<uint8_t> x_stored(static_cast<int64_t>(x.size()) * kind.element_bytes());
  for (size_t i = 0; i < x.size(); ++i) {
    const uint16_t bf16 = to_bf16(x[i]);
    const void* element = kind.dtype == LLMQ_DTYPE_BF16 ? static_cast<const void*>(&bf16) : &x[i];
    memcpy(x_stored.data() + i * kind.element_bytes(), element, kind.element_bytes());
  }

  const LlmqLinear unpacked = w.linear(nullptr, false);
  int64_t bytes = -1;
  expect(llmq_linear_packed_bytes(isa, &unpacked, &bytes) == 0 && bytes >= n * k / 2, "packed_bytes", n, k);
  Odd<uint8_t> packed(bytes), packed_by_two(bytes);
  packed.poison();
  const float* scale = kind.integer() ? w.scale.data() : nullptr;
  const float* zero = kind.zero ? w.zero.data() : nullptr;
  expect(llmq_linear_pack(isa, &unpacked, w.stored.data(), scale, zero, packed.data(), 1) == 0, "pack", n, k);
  expect(llmq_linear_pack(isa, &unpacked, w.stored.data(), scale, zero, packed_by_two.data(), 2) == 0 &&
             packed.same(packed_by_two), "pack by two", n, k);
  Odd<uint8_t> stored_again(n * k * kind.weight_bytes());
  Odd<float> scale_again(n * (k / group)), zero_again(n * (k / group));
  stored_again.poison();
  const int32_t status =
      llmq_linear_unpack(isa, &unpacked, packed.data(), stored_again.data(), scale ? scale_again.data() : nullptr,
                         zero ? zero_again.data() : nullptr, 2);
  expect(status == 0 && stored_again.same(w.stored), "unpack", n, k);
  expect(!scale || scale_again.same(w.scale), "unpack scales", n, k);
  expect(!zero || zero_again.same(w.zero), "unpack zero points", n, k);

  const LlmqLinear linear = w.linear(packed.data(), with_bias);
  expect(llmq_linear_workspace_bytes(isa, &linear, m, &bytes) == 0, "workspace_bytes", m, k);
  Odd<uint8_t> workspace(bytes), y(m * n * kind.element_bytes()), y_by_two(m * n * kind.element_bytes());
  for (int32_t threads = 1; threads <= 2; ++threads) {
    workspace.poison();
    uint8_t* out = (threads == 1 ? y : y_by_two).data();
    const int32_t done =
        llmq_linear(isa, &linear, x_stored.data(), out, workspace.data(), m, stride, kind.dtype, threads);
    expect(done == 0, "linear", m, n);
  }
  expect(y.same(y_by_two), "one thread and two", m, n);

  for (int64_t row = 0; row < m; ++row) {
    const float* at = x.data() + row * stride;
    const Codes codes = !kind.integer() ? Codes{}
                        : kind.activation == LLMQ_ACTIVATION_FLOAT
                            ? block_codes(at, k, group)
                        : kind.activation == LLMQ_ACTIVATION_STATIC
                            ? static_codes(at, k)
                            : row_codes(at, k, kind.activation == LLMQ_ACTIVATION_INT8);
    for (int64_t j = 0; j < n; ++j) {
      float got;
      memcpy(&got, y.data() + (row * n + j) * kind.element_bytes(), kind.element_bytes());
      if (kind.dtype == LLMQ_DTYPE_BF16) {
        uint16_t bf16;
        memcpy(&bf16, y.data() + (row * n + j) * 2, 2);
        got = widen(bf16);
      }
      if (kind.integer()) {
        expect(equal(got, integer_output(w, codes, j, with_bias)), "output", row, j);
      } else {
        check_float_output(w, at, got, row, j, with_bias);
      }
    }
  }
}

// Panels, tiles, chunks and micro kernels of every size, for one kind.
void check_kind(int32_t isa, const Kind& kind) {
  const int64_t rows[] = {0, 1, 2, 3, 7, 49}, outputs[] = {1, 17, 70};
  const Fill fills[] = {Fill::kRandom, Fill::kExtreme, Fill::kTies, Fill::kNotFinite};
  const int64_t inputs[][2] = {{8, 8}, {100, 100}, {96, 32}, {512, 256}, {528, 264}, {1, 1}};
  int64_t turn = 0;
  for (int64_t m : rows) {
    for (int64_t n : outputs) {
      const int64_t* shape = inputs[turn % 6];
      check_linear(isa, kind, m, n, shape[0], shape[1], fills[turn % 4]);
      ++turn;
    }
  }
  for (Fill fill : fills) check_linear(isa, kind, 6, 17, 264, 88, fill);
  check_linear(isa, kind, 96, 3, 5128, 5128, Fill::kRandom);  // several tiles of rows, several spans of inputs
  check_linear(isa, kind, 513, 3, 16, 8, Fill::kRandom);       // one row more than a chunk
  check_linear(isa, kind, 337, 3, 16, 8, Fill::kRandom);       // one row more than whole tiles
  check_linear(isa, kind, 5, 300, 40, 8, Fill::kRandom);       // several tiles of outputs
}

void check_kinds(int32_t isa) {
  for (int32_t dtype : {LLMQ_DTYPE_F32, LLMQ_DTYPE_BF16}) {
    check_kind(isa, {LLMQ_WEIGHT_BF16, LLMQ_ZERO_NONE, LLMQ_SCALE_NONE, LLMQ_ACTIVATION_FLOAT, dtype});
    check_kind(isa, {LLMQ_WEIGHT_F32, LLMQ_ZERO_NONE, LLMQ_SCALE_NONE, LLMQ_ACTIVATION_FLOAT, dtype});
    for (int32_t scale : {LLMQ_SCALE_F32, LLMQ_SCALE_BF16}) {
      check_kind(isa, {LLMQ_WEIGHT_INT8, LLMQ_ZERO_NONE, scale, LLMQ_ACTIVATION_FLOAT, dtype});
      check_kind(isa, {LLMQ_WEIGHT_INT8, LLMQ_ZERO_NONE, scale, LLMQ_ACTIVATION_INT8, dtype});
      check_kind(isa, {LLMQ_WEIGHT_INT8, LLMQ_ZERO_NONE, scale, LLMQ_ACTIVATION_STATIC, dtype});
      check_kind(isa, {LLMQ_WEIGHT_INT4, LLMQ_ZERO_FLOAT, scale, LLMQ_ACTIVATION_FLOAT, dtype});
      for (int32_t zero : {LLMQ_ZERO_NONE, LLMQ_ZERO_INT}) {
        for (int32_t activation :
             {LLMQ_ACTIVATION_FLOAT, LLMQ_ACTIVATION_INT8, LLMQ_ACTIVATION_UINT8, LLMQ_ACTIVATION_STATIC}) {
          check_kind(isa, {LLMQ_WEIGHT_INT4, zero, scale, activation, dtype});
        }
      }
    }
  }
}

void check_quantize(int32_t isa) {
  for (int32_t dtype : {LLMQ_DTYPE_F32, LLMQ_DTYPE_BF16}) {
    for (Fill fill : {Fill::kRandom, Fill::kTies, Fill::kNotFinite}) {
      const Kind kind = {LLMQ_WEIGHT_INT8, LLMQ_ZERO_NONE, LLMQ_SCALE_F32, LLMQ_ACTIVATION_INT8, dtype};
      const int64_t m = 9, k = 133, stride = 135;
      const std::vector<float> x = make_x(kind, m, k, stride, fill);
      Odd<float> as_f32(static_cast<int64_t>(x.size()));
      Odd<uint16_t> as_bf16(static_cast<int64_t>(x.size()));
      for (size_t i = 0; i < x.size(); ++i) as_f32.set(i, x[i]), as_bf16.set(i, to_bf16(x[i]));
      Odd<int8_t> q(m * k);
      Odd<float> scale(m);
      const void* source = dtype == LLMQ_DTYPE_BF16 ? static_cast<const void*>(as_bf16.data()) : as_f32.data();
      const int32_t status =
          llmq_quantize_per_token(isa, source, q.data(), scale.data(), m, k, stride, dtype, kEps, 2);
      expect(status == 0, "quantize", m, k);
      for (int64_t row = 0; row < m; ++row) {
        const Codes codes = row_codes(x.data() + row * stride, k, true);
        expect(equal(scale.get(row), codes.step[0]), "scale of row", row, k);
        for (int64_t i = 0; i < k; ++i) expect(q.get(row * k + i) == codes.code[i], "code", row, i);
      }
    }
  }
}

// Every product the most negative there is, over the longest sum: -128 * 127 * 2^17 is 2^24 away from the end of int32.
void check_longest_sum(int32_t isa) {
  const int64_t k = LLMQ_MAX_K;
  const std::vector<float> x(k, 1.0f);
  const std::vector<int8_t> w(k, -128);
  const float one = 1.0f;
  LlmqLinear linear = {1,    k, k,       LLMQ_WEIGHT_INT8, LLMQ_ZERO_NONE, LLMQ_SCALE_F32, LLMQ_ACTIVATION_INT8,
                       kEps, 0, nullptr, nullptr};
  int64_t bytes = 0;
  llmq_linear_packed_bytes(isa, &linear, &bytes);
  std::vector<uint8_t> packed(bytes);
  llmq_linear_pack(isa, &linear, w.data(), &one, nullptr, packed.data(), 1);
  linear.packed = packed.data();
  llmq_linear_workspace_bytes(isa, &linear, 1, &bytes);
  std::vector<uint8_t> workspace(bytes);
  float y = 0;
  llmq_linear(isa, &linear, x.data(), &y, workspace.data(), 1, k, LLMQ_DTYPE_F32, 1);
  const volatile float scale = 1.0f / 127.0f;
  expect(y == -2130706432.0f * scale, "longest sum", static_cast<int64_t>(y));
}

}  // namespace

int main() {
  expect(llmq_abi_version() == LLMQ_ABI_VERSION, "abi version", llmq_abi_version());
  expect(llmq_isa_available(0) && llmq_isa_available(llmq_isa_best()), "generic and best are available");
  for (int32_t isa = 0; isa < llmq_isa_count(); ++isa) {
    if (!llmq_isa_available(isa)) {
      printf("%s: not on this machine\n", llmq_isa_name(isa));
      continue;
    }
    state = 1;
    checks = 0;
    check_longest_sum(isa);
    check_quantize(isa);
    check_kinds(isa);
    printf("%s: %ld checks, layout %s\n", llmq_isa_name(isa), checks, llmq_linear_layout(isa, LLMQ_WEIGHT_INT8));
  }
  printf("threading: %s\n", llmq_threading());
  return 0;
}
