// Attention over one key-value head, written once for every instruction set; see vector_ops.h.
//
// Decode: few queries, each key is used once for each, so that keys and values are widened in registers. Dot products
// of W lanes are folded W at a time. Prefill: many queries, so keys are transposed and values widened once for a block
// of queries, both products are then matrix products from the first-level cache, and the softmax runs along (Milakov
// and Gimelshein, arXiv:1805.02867).
#pragma once

#include "vector_ops.h"

namespace llmq {
namespace {

template <class Isa>
struct Attention {
  using V = Vector<Isa>;
  using Reg = typename V::Reg;
  static constexpr int W = Isa::kWidth;
  static constexpr int kTileColumns = Isa::kCols * W;
  static constexpr float kNone = -__builtin_inff();

  // ---- decode
  // --------------------------------------------------------------------------------------------------------

  static constexpr int kDots = W < 8 ? 8 : W;  // dot products at a time

  // W registers to one: lane i of the result is the sum of register i.
  static LLMQ_INLINE Reg fold(const Reg* dots) {
    Reg part[W];
    for (int i = 0; i < W; ++i) part[i] = dots[i];
    for (int count = W; count > 1; count /= 2) {
      for (int i = 0; i < count / 2; ++i) part[i] = pairs(part[2 * i], part[2 * i + 1]);
    }
    return part[0];
  }
  // Sums of neighbouring lanes: first those of a, then those of b.
  static LLMQ_INLINE Reg pairs(Reg a, Reg b) {
    typename V::Int even, odd;
    for (int i = 0; i < W; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  }

  // Scores of `Q` queries, [keys][Q]; the last tile repeats the last key.
  template <int Q, class KV>
  static void scores(const DecodeJob& job, const KV* keys, const float* q, int64_t q_stride, float* out) {
    constexpr int kKeys = kDots / Q;
    const int64_t d = job.head_dim, count = job.key_end - job.key_begin, whole = d / W * W;
    for (int64_t first = 0; first < count; first += kKeys) {
      const KV* key[kKeys];
      for (int k = 0; k < kKeys; ++k) key[k] = keys + (first + k < count ? first + k : count - 1) * d;
      Reg dots[kDots] = {};
      int64_t i = 0;
      for (; i < whole; i += W) {
        Reg query[Q];
        for (int j = 0; j < Q; ++j) query[j] = V::load(q + j * q_stride + i);
        for (int k = 0; k < kKeys; ++k) {
          const Reg x = V::load(key[k] + i);
          for (int j = 0; j < Q; ++j) dots[k * Q + j] = Isa::fma(x, query[j], dots[k * Q + j]);
        }
      }
      if (i < d) {
        for (int k = 0; k < kKeys; ++k) {
          const Reg x = V::load(key[k] + i, d - i);
          for (int j = 0; j < Q; ++j) dots[k * Q + j] = Isa::fma(x, V::load(q + j * q_stride + i), dots[k * Q + j]);
        }
      }
      for (int part = 0; part < kDots; part += W) V::store(out + first * Q + part, fold(dots + part));
    }
  }

  // out [Q][padded D] = sum over keys of p [keys][Q] * values [keys][D], columns [column, column + C * W).
  template <int Q, int C, class KV>
  static LLMQ_INLINE void weigh(const DecodeJob& job, const KV* values, const float* p, int64_t column, int64_t width,
                                float* out, int64_t out_stride) {
    const int64_t d = job.head_dim, count = job.key_end - job.key_begin;
    Reg sums[Q][C] = {};
    for (int64_t k = 0; k < count; ++k) {
      Reg x[C];
      for (int c = 0; c < C; ++c) x[c] = V::load(values + k * d + column + c * W, c + 1 < C ? W : width - c * W);
      for (int j = 0; j < Q; ++j) {
        const Reg weight = Isa::set1(p[k * Q + j]);
        for (int c = 0; c < C; ++c) sums[j][c] = Isa::fma(weight, x[c], sums[j][c]);
      }
    }
    for (int j = 0; j < Q; ++j) {
      for (int c = 0; c < C; ++c) V::store(out + j * out_stride + column + c * W, sums[j][c]);
    }
  }

  template <int Q, class KV>
  static void decode_some(const DecodeJob& job, int64_t first) {
    constexpr int kKeys = kDots / Q;
    const int64_t d = job.head_dim, stride = pad_to(d, kTileColumns), count = job.key_end - job.key_begin;
    const int64_t padded = pad_to(count, kKeys) * Q;  // a multiple of W
    float* p = job.scratch;
    float* scales = p + 4 * (kDecodeKeys + 16);
    const float* q = job.q + first * stride;
    scores<Q>(job, static_cast<const KV*>(job.cache.keys) + job.key_begin * d, q, stride, p);
    if (sizeof(KV) == 1) {
      spread<Q>(job.cache.key_scale + job.key_begin, count, padded, scales);
      for (int64_t i = 0; i < padded; i += W) V::store(p + i, V::load(p + i) * V::load(scales + i));
    }
    for (int64_t i = count * Q; i < padded; ++i) p[i] = kNone;

    // Lane i of a register belongs to query i % Q. W is a multiple of Q.
    Reg most = Isa::set1(kNone), total = {};
    for (int64_t i = 0; i < padded; i += W) most = Isa::max(most, V::load(p + i));
    float top[Q], lanes[W];
    V::fold(most, Q, top, [](float a, float b) { return a > b ? a : b; });
    for (int i = 0; i < W; ++i) lanes[i] = top[i % Q];
    most = V::load(lanes);
    for (int64_t i = 0; i < padded; i += W) {
      const Reg e = V::exp(V::load(p + i) - most);
      total = total + e;
      V::store(p + i, e);
    }
    float sums[Q];
    V::fold(total, Q, sums, [](float a, float b) { return a + b; });
    float* tops = job.partial + pad_to(job.queries, 4) * stride + first;
    for (int64_t j = 0; j < Q && first + j < job.queries; ++j) {
      tops[j] = top[j];
      tops[pad_to(job.queries, 4) + j] = sums[j];
    }
    if (sizeof(KV) == 1) {
      spread<Q>(job.cache.value_scale + job.key_begin, count, padded, scales);
      for (int64_t i = 0; i < padded; i += W) V::store(p + i, V::load(p + i) * V::load(scales + i));
    }
    const KV* values = static_cast<const KV*>(job.cache.values) + job.key_begin * d;
    constexpr int C = Q == 4 ? 2 : 4;
    float* out = job.partial + first * stride;
    int64_t column = 0;
    for (; column + C * W <= d; column += C * W) weigh<Q, C>(job, values, p, column, C * W, out, stride);
    for (; column < d; column += W) weigh<Q, 1>(job, values, p, column, d - column < W ? d - column : W, out, stride);
  }

  // A scale a key to one a score; 0 behind the last.
  template <int Q>
  static void spread(const F32* scales, int64_t count, int64_t padded, float* out) {
    for (int64_t k = 0; k < count; ++k) {
      for (int j = 0; j < Q; ++j) out[k * Q + j] = scales[k].value;
    }
    for (int64_t i = count * Q; i < padded; ++i) out[i] = 0.0f;
  }

  // Three are done as four; job.q and job.partial have room for them.
  template <class KV>
  static void decode_all(const DecodeJob& job) {
    int64_t first = 0;
    for (; job.queries - first > 2; first += 4) decode_some<4, KV>(job, first);
    if (job.queries - first == 2) decode_some<2, KV>(job, first);
    if (job.queries - first == 1) decode_some<1, KV>(job, first);
  }

  static void decode(const DecodeJob& job) {
    if (job.cache.dtype == KVDtype::kF32) return decode_all<F32>(job);
    if (job.cache.dtype == KVDtype::kBf16) return decode_all<Bf16>(job);
    decode_all<int8_t>(job);
  }

  static void combine(const float* partials, int64_t count, int64_t stride, int64_t queries, int64_t query, bool round,
                      int64_t d, float* y) {
    const int64_t columns = pad_to(d, kTileColumns), padded = pad_to(queries, 4);
    const float* tops = partials + padded * columns + query;
    float most = kNone;
    for (int64_t c = 0; c < count; ++c) most = tops[c * stride] > most ? tops[c * stride] : most;
    float total = 0;
    for (int64_t c = 0; c < count; ++c) total += weight_of(tops[c * stride], most) * tops[c * stride + padded];
    const Reg inverse = Isa::set1(1.0f / total);
    V::each(d, [&](int64_t i, int64_t lanes) {
      Reg sum = {};
      for (int64_t c = 0; c < count; ++c) {
        const Reg weight = Isa::set1(weight_of(tops[c * stride], most));
        sum = sum + weight * V::load(partials + c * stride + query * columns + i);
      }
      V::store(y + i, V::rounded(sum * inverse, round), lanes);
    });
  }
  static LLMQ_INLINE float weight_of(float top, float most) {
    return top == most ? 1.0f : V::exp(Isa::set1(top - most))[0];
  }

  // ---- prefill
  // -------------------------------------------------------------------------------------------------------

  // c [R][C * W] = (c +) a [R][k] b [k][C * W]
  template <int R, bool kAdd>
  static LLMQ_INLINE void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k, float* c,
                               int64_t c_stride) {
    constexpr int C = Isa::kCols;
    Reg sums[R][C];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < C; ++j) sums[r][j] = kAdd ? V::load(c + r * c_stride + j * W) : Reg{};
    }
    for (int64_t i = 0; i < k; ++i, b += b_stride) {
      Reg x[C];
      for (int j = 0; j < C; ++j) x[j] = V::load(b + j * W);
      for (int r = 0; r < R; ++r) {
        const Reg one = Isa::set1(a[r * a_stride + i]);
        for (int j = 0; j < C; ++j) sums[r][j] = Isa::fma(one, x[j], sums[r][j]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < C; ++j) V::store(c + r * c_stride + j * W, sums[r][j]);
    }
  }

  template <bool kAdd, int R = Isa::kRows>
  static LLMQ_INLINE void tile_rows(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                    int64_t k, float* c, int64_t c_stride) {
    if (rows >= R) {
      tile<R, kAdd>(a, a_stride, b, b_stride, k, c, c_stride);
    } else if constexpr (R > 1) {
      tile_rows<kAdd, R - 1>(rows, a, a_stride, b, b_stride, k, c, c_stride);
    }
  }

  template <bool kAdd>
  static void product(int64_t rows, int64_t columns, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                      int64_t k, float* c, int64_t c_stride) {
    for (int64_t row = 0; row < rows; row += Isa::kRows) {
      for (int64_t column = 0; column < columns; column += kTileColumns) {
        tile_rows<kAdd>(rows - row, a + row * a_stride, a_stride, b + column, b_stride, k, c + row * c_stride + column,
                        c_stride);
      }
    }
  }

  // Keys [count][D] to [D][kKeyBlock], values to [count][padded D]; zeros where there is nothing.
  template <class KV>
  static void pack(const HeadCache& cache, int64_t d, int64_t begin, int64_t count, float* keys, float* values) {
    const int64_t columns = pad_to(d, kTileColumns);
    const KV* key = static_cast<const KV*>(cache.keys) + begin * d;
    const KV* value = static_cast<const KV*>(cache.values) + begin * d;
    for (int64_t first = 0; first < kKeyBlock; first += W) {
      for (int64_t i = 0; i < d; i += W) {
        const int64_t lanes = d - i < W ? d - i : W;
        Reg rows[W];
        for (int k = 0; k < W; ++k) {
          rows[k] = first + k < count ? V::load(key + (first + k) * d + i, lanes) : Reg{};
          if (sizeof(KV) == 1 && first + k < count) rows[k] = rows[k] * cache.key_scale[begin + first + k].value;
        }
        transpose(rows);
        for (int64_t j = 0; j < lanes; ++j) V::store(keys + (i + j) * kKeyBlock + first, rows[j]);
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t i = 0; i < columns; i += W) {
        const int64_t lanes = d - i < W ? (d > i ? d - i : 0) : W;
        Reg x = lanes ? V::load(value + k * d + i, lanes) : Reg{};
        if (sizeof(KV) == 1) x = x * cache.value_scale[begin + k].value;
        V::store(values + k * columns + i, x);
      }
    }
  }

  // In place: rows[i][j] to rows[j][i], swapping squares of 1, 2, 4 … lanes.
  static LLMQ_INLINE void transpose(Reg* rows) {
    for (int size = 1; size < W; size *= 2) {
      for (int i = 0; i < W; ++i) {
        if (i & size) continue;
        typename V::Int low, high;
        for (int j = 0; j < W; ++j) {
          low[j] = j & size ? W + j - size : j;
          high[j] = j & size ? W + j : j + size;
        }
        const Reg a = rows[i], b = rows[i + size];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + size] = __builtin_shuffle(a, b, high);
      }
    }
  }

  // Scores of a row to weights exp(score - most): columns outside [begin, end) get 0. `out` and `total` so far are
  // scaled to the new maximum.
  static LLMQ_INLINE void soften(float* scores, int64_t width, int64_t begin, int64_t end, float* most, float* total,
                                 float* out, int64_t columns) {
    for (int64_t i = 0; i < begin; ++i) scores[i] = kNone;
    for (int64_t i = end; i < width; ++i) scores[i] = kNone;
    Reg top = Isa::set1(*most), sum = {};
    for (int64_t i = 0; i < width; i += W) top = Isa::max(top, V::load(scores + i));
    const float now = V::most(top);
    const Reg base = Isa::set1(now);
    for (int64_t i = 0; i < width; i += W) {
      const Reg e = V::exp(V::load(scores + i) - base);
      sum = sum + e;
      V::store(scores + i, e);
    }
    if (now != *most) {
      const Reg shrink = V::exp(Isa::set1(*most) - base);
      for (int64_t i = 0; i < columns; i += W) V::store(out + i, V::load(out + i) * shrink);
      *total *= shrink[0];
      *most = now;
    }
    *total += V::sum(sum);
  }

  template <class KV>
  static void block_of(const BlockJob& job) {
    const int64_t d = job.head_dim, columns = pad_to(d, kTileColumns);
    float* most = job.scratch;
    float* total = most + pad_to(job.rows, 16);
    float* scores = total + pad_to(job.rows, 16);
    float* keys = scores + job.rows * kKeyBlock;
    float* values = keys + kKeyBlock * columns;
    for (int64_t r = 0; r < job.rows; ++r) most[r] = kNone, total[r] = 0;
    memset(job.out, 0, static_cast<size_t>(job.rows * columns) * sizeof(float));

    const auto first_seen = [&](int64_t row) {
      const int64_t first = job.position + row / job.group + 1 - job.window;
      return job.window && first > 0 ? first : 0;
    };
    const auto end_seen = [&](int64_t row) { return job.position + row / job.group + 1; };
    const int64_t end = end_seen(job.rows - 1);
    int64_t row_end = 0, row_begin = 0;
    for (int64_t begin = first_seen(0) / kKeyBlock * kKeyBlock; begin < end; begin += kKeyBlock) {
      const int64_t count = end - begin < kKeyBlock ? end - begin : kKeyBlock;
      // Both limits of what is seen rise with the row, so those that see a part of this block are neighbours.
      while (row_begin < job.rows && end_seen(row_begin) <= begin) ++row_begin;
      for (row_end = job.rows; first_seen(row_end - 1) >= begin + count; --row_end) {
      }
      pack<KV>(job.cache, d, begin, count, keys, values);
      const int64_t rows = row_end - row_begin, width = pad_to(count, kTileColumns);
      float* block_scores = scores + row_begin * kKeyBlock;
      product<false>(rows, width, job.q + row_begin * columns, columns, keys, kKeyBlock, d, block_scores, kKeyBlock);
      for (int64_t r = row_begin; r < row_end; ++r) {
        const int64_t from = first_seen(r) - begin, to = end_seen(r) - begin;
        soften(scores + r * kKeyBlock, width, from > 0 ? from : 0, to < count ? to : count, most + r, total + r,
               job.out + r * columns, columns);
      }
      product<true>(rows, columns, block_scores, kKeyBlock, values, columns, count, job.out + row_begin * columns,
                    columns);
    }
    for (int64_t r = 0; r < job.rows; ++r) {
      const Reg inverse = Isa::set1(1.0f / total[r]);
      for (int64_t i = 0; i < columns; i += W) {
        V::store(job.out + r * columns + i, V::rounded(V::load(job.out + r * columns + i) * inverse, job.round));
      }
    }
  }

  static void block(const BlockJob& job) {
    if (job.cache.dtype == KVDtype::kF32) return block_of<F32>(job);
    if (job.cache.dtype == KVDtype::kBf16) return block_of<Bf16>(job);
    block_of<int8_t>(job);
  }
};

template <class Isa>
constexpr VectorKernels vector_table(const char* name) {
  using E = Elementwise<Isa>;
  using A = Attention<Isa>;
  return {name,        Isa::kCols * Isa::kWidth,
          E::widen,    E::narrow,
          E::exp,      E::norm,
          E::silu_mul, E::rotate,
          E::quantize, A::decode,
          A::combine,  A::block};
}

}  // namespace
}  // namespace llmq
