// Vector arithmetic, written once for every instruction set with the compiler's vector types. Each vector_*.cpp defines
// a struct `Isa` with what differs, and instantiates this:
//
// struct Isa {
//   static constexpr int kWidth;    // floats of a register
//   static constexpr int kRows;     // rows and
//   static constexpr int kCols;     // registers of columns of the largest tile of a matrix product
//   static Reg set1(float);         // Reg = Wide<kWidth>::Reg
//   static Reg fma(Reg a, Reg b, Reg c);  // a * b + c
//   static Reg max(Reg a, Reg b);   // b where one is a NaN
//   static Reg bf16(const void*);   // kWidth bf16 numbers, and
//   static Reg int8(const void*);   // int8 codes, at any address
// };
//
// All of it is in an anonymous namespace: nothing here may be shared between objects of different flags.
#pragma once

#include <string.h>

#include "vector.h"

#define LLMQ_INLINE inline __attribute__((always_inline))

namespace llmq {
namespace {

template <int W>
struct Wide {
  typedef float Reg __attribute__((vector_size(W * 4)));
  typedef int32_t Int __attribute__((vector_size(W * 4)));
  typedef uint32_t Bits __attribute__((vector_size(W * 4)));
  typedef uint16_t Half __attribute__((vector_size(W * 2)));
  typedef int8_t Byte __attribute__((vector_size(W)));
};

template <class Isa>
struct Vector {
  static constexpr int W = Isa::kWidth;
  using Reg = typename Wide<W>::Reg;
  using Int = typename Wide<W>::Int;
  using Bits = typename Wide<W>::Bits;
  using Half = typename Wide<W>::Half;
  using Byte = typename Wide<W>::Byte;

  // The first `count` of W elements at any address; zeros for the rest.
  template <class Packed>
  static LLMQ_INLINE Packed raw(const void* at, int64_t count) {
    constexpr int64_t kElement = static_cast<int64_t>(sizeof(Packed)) / W;
    Packed x;
    if (count == W) {
      memcpy(&x, at, sizeof(x));
    } else {
      x = Packed{};
      memcpy(&x, at, static_cast<size_t>(count * kElement));
    }
    return x;
  }
  static LLMQ_INLINE Reg load(const F32* at, int64_t count = W) { return raw<Reg>(at, count); }
  static LLMQ_INLINE Reg load(const float* at, int64_t count = W) { return raw<Reg>(at, count); }
  static LLMQ_INLINE Reg load(const Bf16* at, int64_t count = W) {
    if (count == W) return Isa::bf16(at);
    const Half part = raw<Half>(at, count);
    return Isa::bf16(&part);
  }
  static LLMQ_INLINE Reg load(const int8_t* at, int64_t count = W) {
    if (count == W) return Isa::int8(at);
    const Byte part = raw<Byte>(at, count);
    return Isa::int8(&part);
  }
  template <class Element, class Packed>
  static LLMQ_INLINE void put(Element* at, Packed x, int64_t count) {
    if (count == W) {
      memcpy(at, &x, sizeof(x));
    } else {
      memcpy(at, &x, static_cast<size_t>(count) * sizeof(Element));
    }
  }
  static LLMQ_INLINE void store(float* at, Reg x, int64_t count = W) { put(at, x, count); }
  static LLMQ_INLINE void store(F32* at, Reg x, int64_t count = W) { put(at, x, count); }
  static LLMQ_INLINE void store(Bf16* at, Reg x, int64_t count = W) {
    put(at, __builtin_convertvector(reinterpret_cast<Bits>(round_bf16(x)) >> 16, Half), count);
  }

  static LLMQ_INLINE Reg bits(uint32_t value) {
    float x;
    memcpy(&x, &value, sizeof(x));
    return Isa::set1(x);
  }

  // To the nearest number of bf16, ties to even. The carry out of the fraction goes where it belongs: into the
  // exponent.
  static LLMQ_INLINE Reg round_bf16(Reg x) {
    const Bits b = reinterpret_cast<Bits>(x);
    const Bits rounded = (b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u;
    return x == x ? reinterpret_cast<Reg>(rounded) : bits(0x7fc00000u);
  }
  static LLMQ_INLINE Reg rounded(Reg x, bool round) { return round ? round_bf16(x) : x; }

  static LLMQ_INLINE Reg abs(Reg x) { return reinterpret_cast<Reg>(reinterpret_cast<Bits>(x) & 0x7fffffffu); }

  // 2^n e^r with n = rint(x / ln 2) and |r| <= ln 2 / 2; e^r by a polynomial of degree 6 (Cephes' coefficients), ln 2
  // in two parts of which the first times n is exact. Adding n to the exponent's bits is exact while the result is
  // normal: the two ends are where it would not be.
  static LLMQ_INLINE Reg exp(Reg x) {
    const Reg magic = Isa::set1(12582912.0f);  // 1.5 * 2^23: adding it leaves no room for a fraction
    const Reg shifted = x * Isa::set1(1.44269504088896341f) + magic;
    const Reg n = shifted - magic;
    Reg r = Isa::fma(n, Isa::set1(-0.693359375f), x);
    r = Isa::fma(n, Isa::set1(2.12194440e-4f), r);
    Reg p = Isa::set1(1.9875691500e-4f);
    p = Isa::fma(p, r, Isa::set1(1.3981999507e-3f));
    p = Isa::fma(p, r, Isa::set1(8.3334519073e-3f));
    p = Isa::fma(p, r, Isa::set1(4.1665795894e-2f));
    p = Isa::fma(p, r, Isa::set1(1.6666665459e-1f));
    p = Isa::fma(p, r, Isa::set1(5.0000001201e-1f));
    p = Isa::fma(p, r * r, r) + 1.0f;
    const Bits power = (reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(magic)) << 23;
    Reg y = reinterpret_cast<Reg>(reinterpret_cast<Bits>(p) + power);
    y = x < -87.33654f ? Reg{} : y;
    y = x > 88.722835f ? bits(0x7f800000u) : y;
    return x == x ? y : x;
  }

  // Lanes folded pairwise, the upper half onto the lower, until `lanes` are left.
  template <class Fold>
  static LLMQ_INLINE void fold(Reg x, int lanes, float* out, const Fold& fold) {
    float all[W];
    store(all, x);
    for (int half = W / 2; half >= lanes; half /= 2) {
      for (int i = 0; i < half; ++i) all[i] = fold(all[i], all[i + half]);
    }
    for (int i = 0; i < lanes; ++i) out[i] = all[i];
  }
  static LLMQ_INLINE float sum(Reg x) {
    float total;
    fold(x, 1, &total, [](float a, float b) { return a + b; });
    return total;
  }
  static LLMQ_INLINE float most(Reg x) {
    float most;
    fold(x, 1, &most, [](float a, float b) { return a > b ? a : b; });
    return most;
  }

  // Calls f(i, count) for each register's worth of n elements.
  template <class F>
  static LLMQ_INLINE void each(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(i, static_cast<int64_t>(W));
    if (i < n) f(i, n - i);
  }
};

template <class Isa>
struct Elementwise {
  using V = Vector<Isa>;
  using Reg = typename V::Reg;
  static constexpr int W = Isa::kWidth;

  static void widen(const void* x, Dtype dtype, int64_t n, float* y) {
    if (dtype == Dtype::kBf16) {
      const Bf16* from = static_cast<const Bf16*>(x);
      V::each(n, [&](int64_t i, int64_t count) { V::store(y + i, V::load(from + i, count), count); });
    } else {
      memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
    }
  }

  static void narrow(const float* x, Dtype dtype, int64_t n, void* y) {
    if (dtype == Dtype::kBf16) {
      Bf16* to = static_cast<Bf16*>(y);
      V::each(n, [&](int64_t i, int64_t count) { V::store(to + i, V::load(x + i, count), count); });
    } else {
      memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
    }
  }

  static void exp(const F32* x, F32* y, int64_t n) {
    V::each(n, [&](int64_t i, int64_t count) { V::store(y + i, V::exp(V::load(x + i, count)), count); });
  }

  static void norm(float* h, const float* add, const F32* weight, float eps, bool round, int64_t n, float* y) {
    Reg squares[4] = {};
    const auto square = [&](int64_t i, int64_t count, Reg& to) {
      Reg x = V::load(h + i, count);
      if (add) {
        x = V::rounded(x + V::load(add + i, count), round);
        V::store(h + i, x, count);
      }
      to = to + x * x;
    };
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
      for (int j = 0; j < 4; ++j) square(i + j * W, W, squares[j]);
    }
    for (; i < n; i += W) square(i, n - i < W ? n - i : W, squares[0]);
    const float mean = V::sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(n);
    const Reg scale = Isa::set1(1.0f / __builtin_sqrtf(mean + eps));
    V::each(n, [&](int64_t at, int64_t count) {
      const Reg x = V::load(h + at, count) * scale * V::load(weight + at, count);
      V::store(y + at, V::rounded(x, round), count);
    });
  }

  static void silu_mul(const float* gate, const float* up, bool round, int64_t n, float* y) {
    V::each(n, [&](int64_t i, int64_t count) {
      const Reg g = V::load(gate + i, count);
      const Reg silu = V::rounded(g / (V::exp(-g) + 1.0f), round);
      V::store(y + i, V::rounded(silu * V::load(up + i, count), round), count);
    });
  }

  static void rotate(const float* x, const F32* cosines, const F32* sines, bool round, float scale, int64_t d,
                     float* y) {
    const int64_t half = d / 2;
    const Reg factor = Isa::set1(scale);
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t mine = side * half, other = half - mine;
      V::each(half, [&](int64_t i, int64_t count) {
        const Reg kept = V::load(x + mine + i, count) * V::load(cosines + mine + i, count);
        const Reg turned = kept + V::load(x + other + i, count) * V::load(sines + mine + i, count);
        V::store(y + mine + i, V::rounded(turned, round) * factor, count);
      });
    }
  }

  static void quantize(const float* x, int64_t n, int8_t* codes, F32* scale) {
    Reg most = {}, poison = {};  // poison: 0, or NaN where an x is not finite, which the scale then is too
    V::each(n, [&](int64_t i, int64_t count) {
      const Reg value = V::load(x + i, count);
      most = Isa::max(most, V::abs(value));
      poison = poison + value * 0.0f;
    });
    const float range = V::most(most) / 127.0f;
    const float step = (range > 1e-8f ? range : 1e-8f) + V::sum(poison);
    scale->value = step;
    const Reg inverse = Isa::set1(1.0f / step), magic = Isa::set1(12582912.0f);
    V::each(n, [&](int64_t i, int64_t count) {
      Reg c = (V::load(x + i, count) * inverse + magic) - magic;
      c = c > 127.0f ? Isa::set1(127.0f) : c;
      c = c < -127.0f ? Isa::set1(-127.0f) : c;
      const typename V::Int whole = __builtin_convertvector(c, typename V::Int);
      V::put(codes + i, __builtin_convertvector(whole, typename V::Byte), count);
    });
  }
};

}  // namespace
}  // namespace llmq
