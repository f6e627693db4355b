// Plain C++, for the baseline of the architecture (x86-64-v1, armv8-a): what every machine can run.
#include "float_tile.h"
#include "vector.h"

namespace llmq {
namespace {

// Hides where a pointer comes from. GCC 12 otherwise vectorizes the loads of R rows as if there were a multiple of four of them,
// and reads rows that do not exist, behind the end of the buffer.
template <class T>
inline const T* opaque(const T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

struct Isa {
  static constexpr int kUnit8 = 2;
  static constexpr uint8_t kFlip8 = 0;
  static constexpr bool kWide8 = true;
  static constexpr int kRows8 = 4;
  static constexpr int kPanels8 = 1;
  static constexpr int kRows4 = 4;
  static constexpr bool kExpand4 = false;
  static constexpr int kWide4Rows = 0;
  static constexpr int kRowsFloat = 4;
  static constexpr int kPanelsFloat = 1;

  template <int R>
  static void start(const Micro& o, int32_t (*sums)[kPanel]) {
    if (o.add) {
      memcpy(sums, o.sums, R * sizeof(*sums));
    } else {
      memset(sums, 0, R * sizeof(*sums));
    }
  }

  template <int R, int P>
  static void micro8(const Micro& o) {
    int32_t sums[R][kPanel];
    start<R>(o, sums);
    const uint8_t* weights = o.weights;
    for (int64_t k = 0; k < o.size; k += kUnit8, weights += kPanel * kUnit8) {
      int16_t w[kPanel * kUnit8];  // widened once, used by every row
      for (int j = 0; j < kPanel * kUnit8; ++j) w[j] = static_cast<int8_t>(weights[j]);
      for (int r = 0; r < R; ++r) {
        const int16_t* codes = opaque(reinterpret_cast<const int16_t*>(o.codes + r * o.plane_bytes) + k);
        const int32_t c0 = codes[0], c1 = codes[1];
        for (int j = 0; j < kPanel; ++j) sums[r][j] += c0 * w[2 * j] + c1 * w[2 * j + 1];
      }
    }
    memcpy(o.sums, sums, sizeof(sums));
  }

  template <int R>
  static void micro4(const Micro& o) {
    int32_t sums[R][kPanel];
    start<R>(o, sums);
    const uint8_t* weights = o.weights;
    for (int64_t k = 0; k < o.size; k += kStep, weights += kPanel * kStep / 2) {
      for (int t = 0; t < kStep / 2; ++t) {
        int32_t first[kPanel], last[kPanel];
        for (int j = 0; j < kPanel; ++j) {
          first[j] = weights[4 * j + t] & 15;
          last[j] = weights[4 * j + t] >> 4;
        }
        for (int r = 0; r < R; ++r) {
          const int8_t* codes = opaque(reinterpret_cast<const int8_t*>(o.codes + r * o.plane_bytes) + k + t);
          const int32_t c0 = codes[0], c1 = codes[4];
          for (int j = 0; j < kPanel; ++j) sums[r][j] += c0 * first[j] + c1 * last[j];
        }
      }
    }
    memcpy(o.sums, sums, sizeof(sums));
  }

  template <int R>
  static inline void dot4(const uint8_t* weights, const uint8_t* const* planes, int64_t size, Words (*sums)[2]) {
    int32_t parts[R][kPanel];
    for (int r = 0; r < R; ++r) {
      Micro operands = {planes[r], 0, weights, 0, size, false, parts[r], 0};
      micro4<1>(operands);
    }
    memcpy(sums, parts, sizeof(parts));
  }

  template <int R, int P, bool kBf16>
  static void micro_float(const MicroFloat& o) {
    float sums[R][kPanel];
    if (o.add) {
      memcpy(sums, o.sums, sizeof(sums));
    } else {
      memset(sums, 0, sizeof(sums));
    }
    const uint8_t* weights = o.weights;
    for (int64_t k = 0; k < o.size; k += 2, weights += 2 * kPanel * (kBf16 ? 2 : 4)) {
      for (int half = 0; half < 2; ++half) {
        float w[kPanel];
        for (int j = 0; j < kPanel; ++j) {
          w[j] = kBf16 ? float_of(bits_of(reinterpret_cast<const Bf16*>(weights)[2 * j + half]))
                       : reinterpret_cast<const F32*>(weights)[half * kPanel + j].value;
        }
        for (int r = 0; r < R; ++r) {
          const float x = *opaque(o.rows + r * o.row_floats + k + half);
          for (int j = 0; j < kPanel; ++j) sums[r][j] += x * w[j];
        }
      }
    }
    memcpy(o.sums, sums, sizeof(sums));
  }
};

bool available() { return true; }

}  // namespace

const IsaKernels kGeneric = isa_table<Isa>("generic", "int8-n16k2", available, &kVectorGeneric);

}  // namespace llmq
