// Drives the C ABI without Python, for the sanitizers and for machines that are emulated. Every instruction set that
// runs here against a naive reference (int64 sums, float operations one at a time), with buffers that start one byte
// off any alignment and end where the allocation ends. Prints one line an instruction set; exits 1 at the first
// difference.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "llmq_cpu.h"

namespace {

constexpr float kEps = 1e-5f;
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

struct Float32 {
  using Element = float;
  static float to_float(float x) { return x; }
  static float from_float(float x) { return x; }
  static constexpr auto quantize = llmq_quantize_per_token_f32;
  static constexpr auto linear = llmq_int8_dynamic_linear_f32;
};
struct Bf16 {
  using Element = uint16_t;
  static float to_float(uint16_t x) { return widen(x); }
  static uint16_t from_float(float x) { return to_bf16(x); }
  static constexpr auto quantize = llmq_quantize_per_token_bf16;
  static constexpr auto linear = llmq_int8_dynamic_linear_bf16;
};

bool equal(float a, float b) { return bits_of(a) == bits_of(b) || (isnan(a) && isnan(b)); }

struct Reference {
  std::vector<int> q;
  std::vector<float> scale;
};

template <class Type>
Reference quantize(const std::vector<typename Type::Element>& x, int64_t m, int64_t k, int64_t stride) {
  Reference r{std::vector<int>(m * k), std::vector<float>(m)};
  for (int64_t row = 0; row < m; ++row) {
    float most = 0;
    bool nan = false;
    for (int64_t i = 0; i < k; ++i) {
      const float value = fabsf(Type::to_float(x[row * stride + i]));
      nan = nan || isnan(value);
      most = value > most ? value : most;
    }
    const volatile float by_range = most / 127.0f;
    r.scale[row] = nan ? NAN : isinf(most) ? INFINITY : by_range > kEps ? by_range : kEps;
    const volatile float inverse = 1.0f / r.scale[row];
    for (int64_t i = 0; i < k; ++i) {
      const volatile float scaled = Type::to_float(x[row * stride + i]) * inverse;
      const float rounded = nearbyintf(scaled);
      r.q[row * k + i] = nan || isinf(most) ? 0
                         : rounded < -127   ? -127
                         : rounded > 127    ? 127
                                            : static_cast<int>(rounded);
    }
  }
  return r;
}

enum class Fill { kRandom, kExtreme, kTies, kNotFinite };

template <class Type>
std::vector<typename Type::Element> make_x(int64_t m, int64_t k, int64_t stride, Fill fill) {
  std::vector<typename Type::Element> x(m ? (m - 1) * stride + k : 0, Type::from_float(1e30f));  // gaps are never read
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      float value = random_float() * ldexpf(1.0f, static_cast<int>(row % 40) - 20);
      if (row % 5 == 1) value = 0;
      if (fill == Fill::kExtreme) value = (row + i) & 1 ? -1.5f : 1.5f;
      if (fill == Fill::kTies)
        value = i == 0 ? 127.0f : static_cast<float>(static_cast<int>(random32() % 508) - 254) / 2;
      x[row * stride + i] = Type::from_float(value);
    }
    if (fill == Fill::kNotFinite && row % 3 == 0) x[row * stride + k / 2] = Type::from_float(row % 2 ? NAN : -INFINITY);
  }
  return x;
}

template <class Type>
void check_linear(int32_t isa, int64_t m, int64_t n, int64_t k, int64_t gap, Fill fill, bool with_bias) {
  using Element = typename Type::Element;
  const int64_t stride = k + gap;
  const std::vector<Element> values = make_x<Type>(m, k, stride, fill);
  Odd<Element> x(static_cast<int64_t>(values.size()));
  x.fill(values);
  const Reference r = quantize<Type>(values, m, k, stride);

  Odd<int8_t> w(n * k), unpacked(n * k);
  for (int64_t i = 0; i < n * k; ++i) {
    w.set(i, static_cast<int8_t>(fill == Fill::kExtreme ? (i % 3 ? -128 : 127)
                                                        : static_cast<int>(random32() % 256) - 128));
  }
  Odd<float> w_scale(n), bias(n);
  for (int64_t j = 0; j < n; ++j) w_scale.set(j, 0.6f * random_float()), bias.set(j, random_float());

  int64_t bytes = -1;
  expect(llmq_int8_packed_bytes(isa, n, k, &bytes) == 0 && bytes >= n * k, "packed_bytes", n, k);
  Odd<uint8_t> packed(bytes), packed_by_two(bytes);
  expect(llmq_int8_pack(isa, w.data(), packed.data(), n, k, 1) == 0, "pack", n, k);
  expect(llmq_int8_pack(isa, w.data(), packed_by_two.data(), n, k, 2) == 0 && packed.same(packed_by_two), "pack by two",
         n, k);
  unpacked.poison();
  expect(llmq_int8_unpack(isa, packed.data(), unpacked.data(), n, k, 2) == 0 && unpacked.same(w), "unpack", n, k);

  Odd<int8_t> q(m * k);
  Odd<float> scale(m);
  expect(Type::quantize(isa, x.data(), q.data(), scale.data(), m, k, stride, kEps, 2) == 0, "quantize", m, k);
  for (int64_t row = 0; row < m; ++row) {
    expect(equal(scale.get(row), r.scale[row]), "scale of row", row, k);
    for (int64_t i = 0; i < k; ++i) expect(q.get(row * k + i) == r.q[row * k + i], "code", row, i);
  }

  expect(llmq_int8_dynamic_linear_workspace_bytes(isa, m, k, &bytes) == 0, "workspace_bytes", m, k);
  Odd<uint8_t> workspace(bytes);
  Odd<Element> y(m * n), y_by_two(m * n);
  y.poison();
  for (int32_t threads = 1; threads <= 2; ++threads) {
    workspace.poison();
    const int32_t status =
        Type::linear(isa, x.data(), packed.data(), w_scale.data(), with_bias ? bias.data() : nullptr,
                     (threads == 1 ? y : y_by_two).data(), workspace.data(), m, n, k, stride, kEps, threads);
    expect(status == 0, "linear", m, n);
  }
  expect(y.same(y_by_two), "one thread and two", m, n);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += static_cast<int64_t>(r.q[row * k + i]) * w.get(j * k + i);
      volatile float out = static_cast<float>(sum);
      out = out * r.scale[row];
      out = out * w_scale.get(j);
      if (with_bias) out = out + bias.get(j);
      expect(equal(Type::to_float(y.get(row * n + j)), Type::to_float(Type::from_float(out))), "output", row, j);
    }
  }
}

template <class Type>
void check_type(int32_t isa) {
  const int64_t rows[] = {0, 1, 2, 3, 7, 17}, outputs[] = {1, 48, 50, 256}, inputs[] = {1, 3, 63, 129};
  const Fill fills[] = {Fill::kRandom, Fill::kExtreme, Fill::kTies, Fill::kNotFinite};
  for (int64_t m : rows) {
    for (int64_t n : outputs) {
      for (int64_t k : inputs) {
        const Fill fill = fills[checks % 4];
        check_linear<Type>(isa, m, n, k, k % 5, fill, (m + n + k) % 2 == 0);
        check_linear<Type>(isa, m, n, k, 0, Fill::kRandom, (m + n + k) % 2 != 0);
      }
    }
  }
  for (Fill fill : fills) check_linear<Type>(isa, 6, 17, 65, 2, fill, true);
  check_linear<Type>(isa, 53, 20, 2051, 1, Fill::kRandom, true);  // several row tiles, several blocks of inputs
  check_linear<Type>(isa, 515, 3, 5, 0, Fill::kRandom, false);    // more rows than one chunk
  check_linear<Type>(isa, 1, 1, LLMQ_MAX_K, 0, Fill::kExtreme, false);
}

// Every product the most negative there is, over the longest sum: -128 * 127 * 2^17 is 2^24 away from the end of int32.
void check_longest_sum(int32_t isa) {
  const int64_t k = LLMQ_MAX_K;
  std::vector<float> x(k, 1.0f);
  std::vector<int8_t> w(k, -128);
  int64_t bytes = 0;
  llmq_int8_packed_bytes(isa, 1, k, &bytes);
  std::vector<uint8_t> packed(bytes);
  llmq_int8_pack(isa, w.data(), packed.data(), 1, k, 1);
  llmq_int8_dynamic_linear_workspace_bytes(isa, 1, k, &bytes);
  std::vector<uint8_t> workspace(bytes);
  const float one = 1.0f;
  float y = 0;
  llmq_int8_dynamic_linear_f32(isa, x.data(), packed.data(), &one, nullptr, &y, workspace.data(), 1, 1, k, k, kEps, 1);
  const volatile float scale = 1.0f / 127.0f;
  expect(y == -2130706432.0f * scale, "longest sum", static_cast<int64_t>(y));
}

void check_refusals(int32_t isa) {
  float x[4] = {1, 2, 3, 4}, scale[4] = {1, 1, 1, 1}, y[4] = {7, 7, 7, 7};
  int8_t q[4] = {1, 2, 3, 4};
  uint8_t packed[256] = {0}, workspace[1024];
  int64_t bytes = 0;
  auto linear = [&](int32_t set, const float* in, int64_t m, int64_t k, int64_t stride, float eps, int32_t threads) {
    return llmq_int8_dynamic_linear_f32(set, in, packed, scale, nullptr, y, workspace, m, 1, k, stride, eps, threads);
  };
  expect(linear(isa, nullptr, 1, 2, 2, kEps, 1) == LLMQ_STATUS_NULL, "null x");
  expect(linear(isa, x, -1, 2, 2, kEps, 1) == LLMQ_STATUS_SHAPE, "negative m");
  expect(linear(isa, x, 1, 0, 2, kEps, 1) == LLMQ_STATUS_SHAPE, "no k");
  expect(linear(isa, x, 1, LLMQ_MAX_K + 1, LLMQ_MAX_K + 1, kEps, 1) == LLMQ_STATUS_SHAPE, "long k");
  expect(linear(isa, x, 1, 2, 1, kEps, 1) == LLMQ_STATUS_SHAPE, "short stride");
  expect(linear(isa, x, 1, 2, 2, 0.0f, 1) == LLMQ_STATUS_EPS, "eps 0");
  expect(linear(isa, x, 1, 2, 2, NAN, 1) == LLMQ_STATUS_EPS, "eps NaN");
  expect(linear(isa, x, 1, 2, 2, 1e-40f, 1) == LLMQ_STATUS_EPS, "eps subnormal");
  expect(linear(isa, x, 1, 2, 2, INFINITY, 1) == LLMQ_STATUS_EPS, "eps infinite");
  expect(linear(isa, x, 1, 2, 2, kEps, 0) == LLMQ_STATUS_THREADS, "no thread");
  expect(linear(llmq_isa_count(), x, 1, 2, 2, kEps, 1) == LLMQ_STATUS_ISA, "isa past the end");
  expect(linear(-1, x, 1, 2, 2, kEps, 1) == LLMQ_STATUS_ISA, "negative isa");
  expect(linear(isa, nullptr, 0, 2, 2, kEps, 1) == LLMQ_STATUS_OK, "no rows need no x");
  expect(y[0] == 7 && y[3] == 7, "refusals write nothing");
  expect(llmq_quantize_per_token_f32(isa, x, q, nullptr, 1, 4, 4, kEps, 1) == LLMQ_STATUS_NULL, "null scale");
  expect(llmq_quantize_per_token_f32(isa, x, q, scale, 1, 4, 3, kEps, 1) == LLMQ_STATUS_SHAPE, "short stride");
  expect(llmq_int8_pack(isa, q, packed, 0, 4, 1) == LLMQ_STATUS_SHAPE, "pack of no rows");
  expect(llmq_int8_unpack(isa, packed, nullptr, 1, 4, 1) == LLMQ_STATUS_NULL, "unpack to nowhere");
  expect(llmq_int8_packed_bytes(isa, 1, 4, nullptr) == LLMQ_STATUS_NULL, "size to nowhere");
  expect(llmq_int8_dynamic_linear_workspace_bytes(isa, -1, 4, &bytes) == LLMQ_STATUS_SHAPE, "workspace of negative m");
  expect(llmq_isa_name(llmq_isa_count()) == nullptr && llmq_int8_layout(-1) == nullptr, "names past the ends");
  for (int32_t status = 0; status <= LLMQ_STATUS_THREADS; ++status) {
    expect(strcmp(llmq_status_message(status), llmq_status_message(99)) != 0, "a message for each status", status);
  }
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
    check_refusals(isa);
    check_longest_sum(isa);
    check_type<Float32>(isa);
    check_type<Bf16>(isa);
    printf("%s: %ld checks, layout %s\n", llmq_isa_name(isa), checks, llmq_int8_layout(isa));
  }
  printf("threading: %s\n", llmq_threading());
  return 0;
}
