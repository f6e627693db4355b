// Preparing rows of x, written once for every instruction set (isa.h says why everything here is static or a template).
#pragma once

#include <string.h>

#include "layout.h"

namespace llmq {

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
constexpr uint32_t kInfBits = 0x7f800000u;
constexpr int32_t kMost16 = 32639;  // 127 * 256 + 127: the most that a high and a low byte, both signed, can mean

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
static inline uint32_t bits_of(F32 x) { return bits_of(x.value); }
static inline uint32_t bits_of(Bf16 x) {
  return static_cast<uint32_t>(x.bits) << 16;
}  // a bf16 is the upper half of a float
static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The four bytes, or two int16, that one lane multiplies, as its 32 bits.
static inline int32_t load_lane(const void* codes) {
  int32_t lane;
  memcpy(&lane, codes, sizeof(lane));
  return lane;
}

// Round to nearest, ties to even. Exact for |x| < 2^22, and the same in every instruction set, SSE2 included.
static inline float round_even(float x) { return (x + kRoundMagic) - kRoundMagic; }

static inline uint16_t bf16_bits(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > kInfBits ? 0x7fc0u : rounded);
}

// The largest |x| as bits. As integers, the bits of non-negative floats are ordered like the floats, with the infinity
// and then the NaNs above all numbers: one integer maximum finds the largest magnitude and anything not finite.
template <class Isa, class In>
static int32_t absmax_bits(const In* x, int64_t k) {
  int32_t most = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(x[i]) & 0x7fffffffu);
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

// `most` as absmax_bits returns it.
static inline bool finite_bits(int32_t most) { return static_cast<uint32_t>(most) < kInfBits; }

// The scale of a row that is not finite: +inf when it holds no NaN.
static inline float scale_of_nonfinite(int32_t most) {
  return static_cast<uint32_t>(most) == kInfBits ? float_of(kInfBits) : float_of(0x7fc00000u);
}

// The power of two by which a block's 16-bit codes are multiplied: the least, within the normal floats, with
// rint(most / scale) <= kMost16.
static inline float block_scale(int32_t most_bits) {
  const uint32_t bits = static_cast<uint32_t>(most_bits);
  int32_t exponent = static_cast<int32_t>(bits >> 23) - 14;      // codes of [2^14, 2^15)
  if ((bits & 0x7fffffu) >= 0x7eff00u) ++exponent;              // 1.9921265 * 2^14 = 32639 is the last that fits
  return float_of(static_cast<uint32_t>(exponent < 1 ? 1 : exponent) << 23);
}

template <class Isa>
struct RowMaker {
  // Symmetric int8 codes of one row; the scale is returned. Codes of a row that is not finite are 0.
  template <class In, class Code>
  static float quantize_row(const In* x, int64_t k, float eps, Code* q) {
    const int32_t most = absmax_bits<Isa>(x, k);
    if (!finite_bits(most)) {
      memset(q, 0, static_cast<size_t>(k) * sizeof(Code));
      return scale_of_nonfinite(most);
    }
    const float by_range = float_of(static_cast<uint32_t>(most)) / 127.0f;
    const float scale = by_range > eps ? by_range : eps;
    const float inverse = 1.0f / scale;
    for (int64_t i = 0; i < k; ++i) {
      const float rounded = round_even(float_of(bits_of(x[i])) * inverse);
      const float low = rounded < -127.0f ? -127.0f : rounded;
      q[i] = static_cast<Code>(static_cast<int32_t>(low > 127.0f ? 127.0f : low));
    }
    return scale;
  }

  // The same with a scale that is given, in one pass. It is returned, unless the row is not finite: that is seen as well.
  template <class In, class Code>
  static float quantize_row_static(const In* x, int64_t k, float scale, Code* q) {
    const float inverse = 1.0f / scale;
    int32_t most = 0;
    for (int64_t i = 0; i < k; ++i) {
      const int32_t magnitude = static_cast<int32_t>(bits_of(x[i]) & 0x7fffffffu);
      most = magnitude > most ? magnitude : most;
      const float rounded = round_even(float_of(bits_of(x[i])) * inverse);
      const float low = rounded > -127.0f ? rounded : -127.0f;  // so that a NaN, too, becomes a number to convert
      q[i] = static_cast<Code>(static_cast<int32_t>(low < 127.0f ? low : 127.0f));
    }
    if (finite_bits(most)) return scale;
    memset(q, 0, static_cast<size_t>(k) * sizeof(Code));
    return scale_of_nonfinite(most);
  }

  // Asymmetric int8 codes in [-128, 127] of one row; the zero point lies on the grid, and so does 0.
  template <class In>
  static float quantize_row_asymmetric(const In* x, int64_t k, float eps, int8_t* q, int32_t* zero) {
    const int32_t most = absmax_bits<Isa>(x, k);
    *zero = 0;
    if (!finite_bits(most)) {
      memset(q, 0, static_cast<size_t>(k));
      return scale_of_nonfinite(most);
    }
    int32_t above = 0, below = 0;  // bits again: as integers, those of negative floats lie below 0, and the other way round
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t bits = bits_of(x[i]);
      const int32_t up = static_cast<int32_t>(bits), down = static_cast<int32_t>(bits ^ 0x80000000u);
      above = up > above ? up : above;
      below = down > below ? down : below;
    }
    const float highest = float_of(static_cast<uint32_t>(above)), lowest = -float_of(static_cast<uint32_t>(below));
    const float by_range = (highest - lowest) / 255.0f;
    const float scale = by_range > eps ? by_range : eps;
    if (!(scale < float_of(kInfBits))) {  // the range of finite numbers may itself be infinite
      memset(q, 0, static_cast<size_t>(k));
      return float_of(kInfBits);
    }
    float at = -128.0f - round_even(lowest / scale);
    at = at < -128.0f ? -128.0f : at > 127.0f ? 127.0f : at;
    const float inverse = 1.0f / scale;
    for (int64_t i = 0; i < k; ++i) {
      const float code = round_even(float_of(bits_of(x[i])) * inverse) + at;
      const float low = code < -128.0f ? -128.0f : code;
      q[i] = static_cast<int8_t>(static_cast<int32_t>(low > 127.0f ? 127.0f : low));
    }
    *zero = static_cast<int32_t>(at);
    return scale;
  }

  template <class Code>
  static int32_t sum_of(const Code* q, int64_t k) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += q[i];
    return sum;
  }

  // 16-bit codes of one block, in two planes of bytes (low != null) or one of int16.
  template <class In>
  static void block_codes(const In* x, int64_t k, int8_t* high, int8_t* low, int16_t* whole, float* scale,
                          int32_t* sum) {
    const int32_t most = absmax_bits<Isa>(x, k);
    if (!finite_bits(most)) {
      if (whole) memset(whole, 0, static_cast<size_t>(k) * sizeof(int16_t));
      if (high) memset(high, 0, static_cast<size_t>(k));
      if (low) memset(low, 0, static_cast<size_t>(k));
      *scale = float_of(0x7fc00000u);
      *sum = 0;
      return;
    }
    const float step = block_scale(most);
    const float inverse = 1.0f / step;
    int32_t total = 0;
    if (whole) {
      for (int64_t i = 0; i < k; ++i) {
        const int32_t code = static_cast<int32_t>(round_even(float_of(bits_of(x[i])) * inverse));
        whole[i] = static_cast<int16_t>(code);
        total += code;
      }
    } else {
      for (int64_t i = 0; i < k; ++i) {
        const int32_t code = static_cast<int32_t>(round_even(float_of(bits_of(x[i])) * inverse));
        low[i] = static_cast<int8_t>(code);
        high[i] = static_cast<int8_t>((code + 128) >> 8);  // the low byte is signed, so round, not truncate
        total += code;
      }
    }
    *scale = step;
    *sum = total;
  }

  template <class In>
  static void float_row(const In* x, int64_t k, float* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = float_of(bits_of(x[i]));
  }

  template <class In>
  static void prepare(const LlmqLinear& linear, const Layout& layout, const In* x, const Rows& rows, int64_t row) {
    const int64_t k = linear.k;
    uint8_t* codes = rows.codes + row * rows.planes * rows.plane_bytes;
    const int64_t code_bytes = rows.code_bytes;
    for (int32_t p = 0; p < rows.planes; ++p) {
      memset(codes + p * rows.plane_bytes + k * code_bytes, 0, static_cast<size_t>((layout.padded_k - k) * code_bytes));
    }
    if (!is_integer(linear)) {
      float_row(x, k, reinterpret_cast<float*>(codes));
      return;
    }
    int8_t* bytes = reinterpret_cast<int8_t*>(codes);
    int16_t* words = reinterpret_cast<int16_t*>(codes);
    if (linear.activation == LLMQ_ACTIVATION_FLOAT) {
      float* scale = rows.scale + row * layout.blocks;
      int32_t* sum = rows.sum + row * layout.blocks;
      const bool wide = code_bytes == 2;
      for (int64_t b = 0; b < layout.blocks; ++b) {
        const Block at = block_at(layout, b);
        block_codes(x + at.begin, at.size, wide ? nullptr : bytes + at.begin,
                    wide ? nullptr : bytes + rows.plane_bytes + at.begin, wide ? words + at.begin : nullptr, scale + b,
                    sum + b);
      }
      return;
    }
    if (linear.activation == LLMQ_ACTIVATION_UINT8) {
      rows.scale[row] = quantize_row_asymmetric(x, k, linear.eps, bytes, rows.zero + row);
    } else if (linear.activation == LLMQ_ACTIVATION_STATIC) {
      rows.scale[row] = code_bytes == 2 ? quantize_row_static(x, k, linear.input_scale, words)
                                        : quantize_row_static(x, k, linear.input_scale, bytes);
    } else {
      rows.scale[row] = code_bytes == 2 ? quantize_row(x, k, linear.eps, words) : quantize_row(x, k, linear.eps, bytes);
    }
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const Block at = block_at(layout, b);
      rows.sum[row * layout.blocks + b] =
          code_bytes == 2 ? sum_of(words + at.begin, at.size) : sum_of(bytes + at.begin, at.size);
    }
  }

  static void prepare_row(const LlmqLinear& linear, const Layout& layout, const void* x, Dtype dtype, const Rows& rows,
                          int64_t row) {
    if (dtype == Dtype::kBf16) {
      prepare(linear, layout, static_cast<const Bf16*>(x), rows, row);
    } else {
      prepare(linear, layout, static_cast<const F32*>(x), rows, row);
    }
  }

  static void quantize(const void* x, Dtype dtype, int64_t k, float eps, int8_t* q, F32* scale) {
    scale->value = dtype == Dtype::kBf16 ? quantize_row(static_cast<const Bf16*>(x), k, eps, q)
                                         : quantize_row(static_cast<const F32*>(x), k, eps, q);
  }
};

}  // namespace llmq
