// One function for both directions: what visits every code and every number knows where each lies, and only the last step,
// to or from the packed form, differs.
#include "pack.h"

#include <string.h>

#include "layout.h"

namespace llmq {
namespace {

// fp32 number <-> its stored form, fp32 or bf16. Packing a number that bf16 has is exact.
template <bool kPack>
void move_number(uint8_t* stored, float* number, int32_t kind) {
  if (kind == LLMQ_SCALE_F32) {
    if (kPack) {
      memcpy(stored, number, 4);
    } else {
      memcpy(number, stored, 4);
    }
  } else if (kPack) {
    memcpy(stored, reinterpret_cast<const uint8_t*>(number) + 2, 2);  // little endian: the upper half
  } else {
    memset(number, 0, 2);
    memcpy(reinterpret_cast<uint8_t*>(number) + 2, stored, 2);
  }
}

template <bool kPack>
void move_header(const PackJob& job, const Layout& layout, uint8_t* header, int64_t output, int64_t group) {
  const LlmqLinear& linear = *job.linear;
  const int64_t at = output * layout.groups + group, j = output % kPanel;
  const int64_t bytes = linear.scale == LLMQ_SCALE_F32 ? 4 : 2;
  move_number<kPack>(header + j * bytes, job.scale + at, linear.scale);
  if (linear.zero == LLMQ_ZERO_FLOAT) {
    move_number<kPack>(header + layout.zero_offset + j * bytes, job.zero + at, linear.scale);
  } else if (linear.zero == LLMQ_ZERO_INT) {
    uint8_t* stored = header + layout.zero_offset + j;
    F32* number = reinterpret_cast<F32*>(job.zero + at);
    if (kPack) {
      *stored = static_cast<uint8_t>(static_cast<int32_t>(number->value));
    } else {
      number->value = static_cast<float>(*stored);
    }
  }
}

template <bool kPack>
void move_int8(uint8_t* codes, int64_t j, int8_t* row, int64_t size, int32_t unit, uint8_t flip) {
  for (int64_t k = 0; k < size; ++k) {
    uint8_t* stored = codes + (k / unit * kPanel + j) * unit + k % unit;
    if (kPack) {
      *stored = static_cast<uint8_t>(row[k]) ^ flip;
    } else {
      row[k] = static_cast<int8_t>(*stored ^ flip);
    }
  }
}

// Byte t of an output's four in a step of 8 inputs: input t in the low nibble, input t + 4 in the high one.
template <bool kPack>
void move_int4(uint8_t* codes, int64_t j, uint8_t* row, int64_t size) {
  for (int64_t k = 0; k < size; ++k) {
    uint8_t* stored = codes + (k / kStep * kPanel + j) * 4 + k % 4;
    const int shift = k % kStep < 4 ? 0 : 4;
    if (kPack) {
      *stored = static_cast<uint8_t>(*stored | (row[k] & 15) << shift);
    } else {
      row[k] = static_cast<uint8_t>(*stored >> shift & 15);
    }
  }
}

// `bytes` of each number, `unit` inputs of an output side by side.
template <bool kPack>
void move_float(uint8_t* codes, int64_t j, uint8_t* row, int64_t size, int64_t unit, size_t bytes) {
  for (int64_t k = 0; k < size; ++k) {
    uint8_t* stored = codes + ((k / unit * kPanel + j) * unit + k % unit) * static_cast<int64_t>(bytes);
    uint8_t* plain = row + k * static_cast<int64_t>(bytes);
    memcpy(kPack ? stored : plain, kPack ? plain : stored, bytes);
  }
}

template <bool kPack>
void move_panel(const PackJob& job, int64_t panel) {
  const LlmqLinear& linear = *job.linear;
  const Layout layout = layout_of(linear);
  uint8_t* base = job.packed + panel * layout.panel_bytes;
  const uint8_t flip = linear.weight == LLMQ_WEIGHT_INT8 ? job.isa->flip8 : 0;
  if (kPack) {
    memset(base, 0, static_cast<size_t>(layout.panel_bytes));
    // Where there is no code, 0 is stored as int8: the kernels take the offset of all of them out again.
    for (int64_t g = 0; g < layout.groups && flip; ++g) {
      uint8_t* codes = base + g * layout.group_bytes + layout.header_bytes;
      memset(codes, flip, static_cast<size_t>(layout.group_bytes - layout.header_bytes));
    }
  }
  for (int64_t output = panel * kPanel; output < min_of((panel + 1) * kPanel, linear.n); ++output) {
    for (int64_t group = 0; group < layout.groups; ++group) {
      uint8_t* header = base + group * layout.group_bytes;
      uint8_t* codes = header + layout.header_bytes;
      const int64_t at = output * linear.k + group * layout.group, j = output % kPanel;
      if (is_integer(linear)) move_header<kPack>(job, layout, header, output, group);
      switch (linear.weight) {
        case LLMQ_WEIGHT_INT8:
          move_int8<kPack>(codes, j, static_cast<int8_t*>(job.weight) + at, layout.group, job.isa->unit8, flip);
          break;
        case LLMQ_WEIGHT_INT4:
          move_int4<kPack>(codes, j, static_cast<uint8_t*>(job.weight) + at, layout.group);
          break;
        case LLMQ_WEIGHT_BF16:
          move_float<kPack>(codes, j, static_cast<uint8_t*>(job.weight) + at * 2, layout.group, 2, 2);
          break;
        default:
          move_float<kPack>(codes, j, static_cast<uint8_t*>(job.weight) + at * 4, layout.group, 1, 4);
      }
    }
  }
}

}  // namespace

void pack_panel(const PackJob& job, int64_t panel) { move_panel<true>(job, panel); }
void unpack_panel(const PackJob& job, int64_t panel) { move_panel<false>(job, panel); }

}  // namespace llmq
