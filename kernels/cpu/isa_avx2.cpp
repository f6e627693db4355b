// AVX2 and FMA. Compiled with -mavx2 -mfma, called only where `available` says so.
//
// int8 weights meet int16 codes: 16 products an instruction with vpmaddwd. vpmaddubsw makes 32, but its pairs of products
// saturate at int16, and 255 * 127 * 2 does not fit; with the signs moved they do (2 * 128 * 127 = 32512), but then 32
// products cost vpsignb, vpmaddubsw, vpmaddwd by ones and vpaddd: as many instructions as two vpmaddwd and two vpaddd, which
// need no such care. vpmaddwd cannot overflow here: |c0 w0 + c1 w1| <= 2 * 32639 * 128 in int32.
//
// The floor, on a core with four vector pipes of which two multiply (Zen 3): 32 products a cycle take 2 vpmaddwd and 2
// vpaddd, all four pipes. The largest micro kernel (6 planes, 16 outputs) does 192 products in 26 vector instructions, 24
// of them these: at most 29.5 a cycle, 92 % of that floor.
//
// int4 weights, 0..15 unsigned, meet int8 codes with vpmaddubsw: a pair is at most 2 * 15 * 128 = 3840, so eight of them fit
// into int16, and only every eighth sum is widened to int32 (vpmaddwd by ones). 32 products take a vpmaddubsw, a vpaddw and an
// eighth of a vpmaddwd and a vpaddd: at most 57 a cycle, and 28 where 16-bit codes are two planes.
#include <immintrin.h>

#include "float_tile.h"
#include "vector.h"

namespace llmq {
namespace {

constexpr int64_t kAhead = 1024;  // bytes prefetched ahead: the hardware's own prefetcher stops at each page

inline void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0); }
inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline void store256(void* at, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(at), value); }

struct __attribute__((packed, may_alias)) Lane {
  int32_t codes;
};

// low += w_low . codes, high += w_high . codes, in pairs of int16. In assembly, because with 12 sums in 16 registers the
// order of these five is the only one that needs no other, and GCC prefers others.
inline __attribute__((always_inline)) void add_products(const uint8_t* codes, __m256i w_low, __m256i w_high,
                                                        __m256i* low, __m256i* high) {
  __m256i four, product;
  asm("vpbroadcastd %[codes], %[four]\n\t"
      "vpmaddubsw %[four], %[w_low], %[product]\n\t"
      "vpaddw %[product], %[low], %[low]\n\t"
      "vpmaddubsw %[four], %[w_high], %[four]\n\t"
      "vpaddw %[four], %[high], %[high]"
      : [low] "+x"(*low), [high] "+x"(*high), [four] "=&x"(four), [product] "=&x"(product)
      : [codes] "m"(*reinterpret_cast<const Lane*>(codes)), [w_low] "x"(w_low), [w_high] "x"(w_high));
}

struct Isa {
  static constexpr int kUnit8 = 2;
  static constexpr uint8_t kFlip8 = 0;
  static constexpr bool kWide8 = true;
  static constexpr int kRows8 = 6;  // 12 sums, 2 weights, 1 pair of codes, 1 product: all 16 registers
  static constexpr int kPanels8 = 1;
  static constexpr int kRows4 = 6;  // the same
  static constexpr bool kExpand4 = true;
  static constexpr int kWide4Rows = 4;  // as fast as two planes of bytes, and cheaper to scale
  static constexpr int kRowsFloat = 6;  // 12 sums, 2 weights, 1 input
  static constexpr int kPanelsFloat = 4;

  template <int R, int P>
  LLMQ_ALONE static void micro8(const Micro& o) {
    __m256i low[R], high[R];  // sums of outputs 0..7 and 8..15
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      low[r] = o.add ? load(o.sums + r * kPanel) : _mm256_setzero_si256();
      high[r] = o.add ? load(o.sums + r * kPanel + 8) : _mm256_setzero_si256();
    }
    const uint8_t *weights = o.weights, *codes = o.codes;
    const int64_t size = o.size, plane_bytes = o.plane_bytes;
    for (int64_t k = 0; k < size; k += kUnit8, weights += kPanel * kUnit8, codes += 2 * kUnit8) {
      prefetch(weights);
      const __m128i* w = reinterpret_cast<const __m128i*>(weights);
      const __m256i w_low = _mm256_cvtepi8_epi16(_mm_loadu_si128(w));
      const __m256i w_high = _mm256_cvtepi8_epi16(_mm_loadu_si128(w + 1));
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        LLMQ_IN_ORDER;
        const __m256i pair = _mm256_set1_epi32(load_lane(codes + r * plane_bytes));
        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(pair, w_low));
        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(pair, w_high));
      }
    }
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      store256(o.sums + r * kPanel, low[r]);
      store256(o.sums + r * kPanel + 8, high[r]);
    }
  }

  // kSteps steps of 8 inputs, at most 4, into int16 sums. Unrolled: they begin and end here, and a loop would cost them their
  // registers.
  template <int R, int kSteps>
  static inline __attribute__((always_inline)) void products4(const uint8_t* weights, const uint8_t* const* planes,
                                                              int64_t k, __m256i* low, __m256i* high) {
    const __m256i nibble = _mm256_set1_epi8(15);
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm256_setzero_si256();
    LLMQ_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      prefetch(weights + 64 * s);
      const __m256i w_low = load(weights + 64 * s), w_high = load(weights + 64 * s + 32);
      const __m256i first_low = _mm256_and_si256(w_low, nibble), first_high = _mm256_and_si256(w_high, nibble);
      const __m256i last_low = _mm256_and_si256(_mm256_srli_epi16(w_low, 4), nibble);
      const __m256i last_high = _mm256_and_si256(_mm256_srli_epi16(w_high, 4), nibble);
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        add_products(planes[r] + k + 8 * s, first_low, first_high, &low[r], &high[r]);
        add_products(planes[r] + k + 8 * s + 4, last_low, last_high, &low[r], &high[r]);
      }
    }
  }

  template <int R>
  static inline __attribute__((always_inline)) void dot4(const uint8_t* weights, const uint8_t* const* planes,
                                                         int64_t size, Words (*sums)[2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i low[R], high[R], low32[R], high32[R];
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) low32[r] = high32[r] = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + 32 <= size; k += 32, weights += 256) {
      products4<R, 4>(weights, planes, k, low, high);
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        low32[r] = _mm256_add_epi32(low32[r], _mm256_madd_epi16(low[r], ones));
        high32[r] = _mm256_add_epi32(high32[r], _mm256_madd_epi16(high[r], ones));
      }
    }
    for (; k < size; k += 8, weights += 64) {
      products4<R, 1>(weights, planes, k, low, high);
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        low32[r] = _mm256_add_epi32(low32[r], _mm256_madd_epi16(low[r], ones));
        high32[r] = _mm256_add_epi32(high32[r], _mm256_madd_epi16(high[r], ones));
      }
    }
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      sums[r][0] = reinterpret_cast<Words>(low32[r]);
      sums[r][1] = reinterpret_cast<Words>(high32[r]);
    }
  }

  // Adds int16 pairs to the int32 sums in memory, or sets them.
  template <int R>
  static inline __attribute__((always_inline)) void widen(int32_t* sums, const __m256i* low, const __m256i* high,
                                                          bool add) {
    const __m256i ones = _mm256_set1_epi16(1);
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m256i l = _mm256_madd_epi16(low[r], ones), h = _mm256_madd_epi16(high[r], ones);
      int32_t* at = sums + r * kPanel;
      store256(at, add ? _mm256_add_epi32(load(at), l) : l);
      store256(at + 8, add ? _mm256_add_epi32(load(at + 8), h) : h);
    }
  }

  // Nibbles are taken apart for each use: for the few rows of a decode step, where that hides behind memory.
  template <int R>
  LLMQ_ALONE static void micro4(const Micro& o) {
    const uint8_t *weights = o.weights, *codes = o.codes;
    const uint8_t* planes[R];
    for (int r = 0; r < R; ++r) planes[r] = codes + r * o.plane_bytes;
    __m256i low[R], high[R];
    int64_t k = 0;
    for (; k + 32 <= o.size; k += 32, weights += 256) {
      products4<R, 4>(weights, planes, k, low, high);
      widen<R>(o.sums, low, high, k > 0);
    }
    for (; k < o.size; k += 8, weights += 64) {
      products4<R, 1>(weights, planes, k, low, high);
      widen<R>(o.sums, low, high, k > 0);
    }
  }

  // Nibbles [size / 8][16][4] to bytes [size / 4][16][4], each of which is then used by many rows.
  static void expand4(const uint8_t* packed, uint8_t* bytes, int64_t size) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int64_t k = 0; k < size; k += kStep, packed += kPanel * kStep / 2, bytes += kPanel * kStep) {
      prefetch(packed);
      const __m256i low = load(packed), high = load(packed + 32);
      store256(bytes, _mm256_and_si256(low, nibble));
      store256(bytes + 32, _mm256_and_si256(high, nibble));
      store256(bytes + 64, _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble));
      store256(bytes + 96, _mm256_and_si256(_mm256_srli_epi16(high, 4), nibble));
    }
  }

  // Nibbles [size / 8][16][4] to bytes [size / 2][16][2], as int8 weights lie.
  static void expand4_for_micro8(const uint8_t* packed, uint8_t* bytes, int64_t size) {
    const __m256i nibble = _mm256_set1_epi8(15), low16 = _mm256_set1_epi32(0xffff);
    for (int64_t k = 0; k < size; k += kStep, packed += kPanel * kStep / 2, bytes += kPanel * kStep) {
      prefetch(packed);
      const __m256i low = load(packed), high = load(packed + 32);  // outputs 0..7 and 8..15
      for (int half = 0; half < 2; ++half) {
        const __m256i l = _mm256_and_si256(half ? _mm256_srli_epi16(low, 4) : low, nibble);
        const __m256i h = _mm256_and_si256(half ? _mm256_srli_epi16(high, 4) : high, nibble);
        // Of each lane's four bytes the first two, then the last two; packing takes 128-bit halves in turns.
        const __m256i first = _mm256_packus_epi32(_mm256_and_si256(l, low16), _mm256_and_si256(h, low16));
        const __m256i last = _mm256_packus_epi32(_mm256_srli_epi32(l, 16), _mm256_srli_epi32(h, 16));
        store256(bytes + 64 * half, _mm256_permute4x64_epi64(first, 0xd8));
        store256(bytes + 64 * half + 32, _mm256_permute4x64_epi64(last, 0xd8));
      }
    }
  }

  // kSteps steps of 4 inputs, at most 8.
  template <int R, int kSteps>
  static inline __attribute__((always_inline)) void part4_bytes(const uint8_t* weights, const uint8_t* codes,
                                                                int64_t plane_bytes, int32_t* sums, bool add) {
    __m256i low[R], high[R];
    LLMQ_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const __m256i w_low = load(weights + 64 * s), w_high = load(weights + 64 * s + 32);
      LLMQ_UNROLL
      for (int r = 0; r < R; ++r) {
        if (s == 0) low[r] = high[r] = _mm256_setzero_si256();
        add_products(codes + r * plane_bytes + 4 * s, w_low, w_high, &low[r], &high[r]);
      }
    }
    widen<R>(sums, low, high, add);
  }

  template <int R>
  LLMQ_ALONE static void micro4_bytes(const Micro& o) {
    const uint8_t *weights = o.weights, *codes = o.codes;
    int64_t k = 0;
    for (; k + 32 <= o.size; k += 32, weights += 512, codes += 32) {
      part4_bytes<R, 8>(weights, codes, o.plane_bytes, o.sums, k > 0);
    }
    for (; k < o.size; k += 8, weights += 128, codes += 8) {
      part4_bytes<R, 2>(weights, codes, o.plane_bytes, o.sums, k > 0);
    }
  }

  template <int R, int P, bool kBf16>
  LLMQ_ALONE static void micro_float(const MicroFloat& o) {
    __m256 low[R][P], high[R][P];
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int p = 0; p < P; ++p) {
        const float* sums = o.sums + p * o.panel_sums + r * kPanel;
        low[r][p] = o.add ? _mm256_loadu_ps(sums) : _mm256_setzero_ps();
        high[r][p] = o.add ? _mm256_loadu_ps(sums + 8) : _mm256_setzero_ps();
      }
    }
    const uint8_t* weights = o.weights;
    const float* rows = o.rows;
    const int64_t size = o.size, row_floats = o.row_floats, panel_bytes = o.panel_bytes;
    constexpr int kBytes = kBf16 ? 2 : 4;
    const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
    for (int64_t k = 0; k < size; k += 2, weights += 2 * kPanel * kBytes, rows += 2) {
      LLMQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        LLMQ_UNROLL
        for (int p = 0; p < P; ++p) {
          const uint8_t* at = weights + p * panel_bytes;
          if (half == 0) prefetch(at);
          __m256 w_low, w_high;
          if constexpr (kBf16) {  // the even input in the lower half of a lane, the odd in the upper
            const __m256i l = load(at), h = load(at + 32);
            w_low = _mm256_castsi256_ps(half ? _mm256_and_si256(l, upper) : _mm256_slli_epi32(l, 16));
            w_high = _mm256_castsi256_ps(half ? _mm256_and_si256(h, upper) : _mm256_slli_epi32(h, 16));
          } else {
            w_low = _mm256_castsi256_ps(load(at + half * 64));
            w_high = _mm256_castsi256_ps(load(at + half * 64 + 32));
          }
          LLMQ_UNROLL
          for (int r = 0; r < R; ++r) {
            LLMQ_IN_ORDER;
            const __m256 x = _mm256_broadcast_ss(rows + r * row_floats + half);
            low[r][p] = _mm256_fmadd_ps(x, w_low, low[r][p]);
            high[r][p] = _mm256_fmadd_ps(x, w_high, high[r][p]);
          }
        }
      }
    }
    LLMQ_UNROLL
    for (int r = 0; r < R; ++r) {
      LLMQ_UNROLL
      for (int p = 0; p < P; ++p) {
        float* sums = o.sums + p * o.panel_sums + r * kPanel;
        _mm256_storeu_ps(sums, low[r][p]);
        _mm256_storeu_ps(sums + 8, high[r][p]);
      }
    }
  }
};

bool available() {
  // libgcc and compiler-rt count a feature only when XGETBV says that the operating system saves its registers.
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace

const IsaKernels kAvx2 = isa_table<Isa>("avx2", "int8-n16k2", available, &kVectorAvx2);

}  // namespace llmq
