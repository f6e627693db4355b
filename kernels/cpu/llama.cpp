#include "llama.h"

#include <string.h>

#include "layout.h"

namespace llmq {
namespace {

// Rows that pass through a block together. More would not make the products faster, and their results leave the cache.
constexpr int64_t kSlabRows = 512;
// Numbers of a phase over rows that each thread does for itself, because sharing them out would cost a barrier.
constexpr int64_t kSoloElements = 4096;
// Numbers of one task of a phase over rows.
constexpr int64_t kTaskElements = 8192;

// Memory given out piece by piece, each at a multiple of 64 bytes; without memory only the size is found.
class Memory {
 public:
  explicit Memory(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kLine);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

// How the rows of a call are cut into slabs: whole sequences, or one sequence in equal parts.
struct Slabs {
  explicit Slabs(const LlamaCall& call) : call(call) {
    parts = ceil_div(call.length, kSlabRows);
    length = ceil_div(call.length, parts);
    batch = parts > 1 ? 1 : max_of(1, kSlabRows / call.length);
    count = parts * ceil_div(call.batch, batch);
  }
  Slab at(int64_t index) const {
    const int64_t b = index / parts * batch, t = index % parts * length;
    return {b, min_of(batch, call.batch - b), t, min_of(length, call.length - t)};
  }
  int64_t rows() const { return min_of(batch, call.batch) * length; }
  const LlamaCall& call;
  int64_t parts, length, batch, count;
};

int64_t widest(const LlmqLlama& model) {
  return max_of(max_of(model.hidden, model.intermediate), model.heads * model.head_dim);
}

bool is_solo(const LlamaCall& call) {
  const int64_t rows = call.batch * call.length;
  return rows == 1 || rows * call.model->hidden <= kSoloElements;
}

bool attends_bf16(const LlamaCall& call) {
  if (!call.cache) return false;
  return call.cache->dtype == LLMQ_CACHE_BF16 ||
         (call.cache->dtype == LLMQ_CACHE_INT8 && call.model->dtype == LLMQ_DTYPE_BF16);
}

}  // namespace

LlamaForward::LlamaForward(const IsaKernels& isa, const LlamaCall& call, int32_t n_threads)
    : isa_(isa),
      vector_(*isa.vector),
      call_(call),
      model_(*call.model),
      n_threads_(n_threads),
      rows_(call.batch * call.length),
      slab_rows_(Slabs(call).rows()),
      solo_(is_solo(call)),
      round_(call.model->dtype == LLMQ_DTYPE_BF16),
      round_q_(attends_bf16(call)),
      round_result_(round_ || round_q_),
      dtype_(round_ ? Dtype::kBf16 : Dtype::kF32),
      kept_(round_ ? Dtype::kF32OfBf16 : Dtype::kF32),
      q_width_(model_.heads * model_.head_dim),
      kv_width_(model_.kv_heads * model_.head_dim),
      queries_(model_.heads / model_.kv_heads),
      padded_d_(padded_dim(vector_, model_.head_dim)),
      partial_floats_(llmq::partial_floats(vector_, queries_, model_.head_dim)) {}

int64_t LlamaForward::lay_out(uint8_t* workspace) {
  Memory memory(workspace);
  // The most that any group of linears takes, as if none of a group shared rows.
  int64_t prepared = rows_bytes(isa_, model_.head, slab_rows_);
  const bool blocks = !call_.head_only;
  for (int64_t layer = 0; blocks && layer < model_.layers; ++layer) {
    const LlmqBlock& block = model_.blocks[layer];
    const auto bytes = [&](const LlmqLinear& linear) { return rows_bytes(isa_, linear, slab_rows_); };
    prepared = max_of(prepared, bytes(block.q) + bytes(block.k) + bytes(block.v));
    prepared = max_of(prepared, max_of(bytes(block.o), bytes(block.down)));
    prepared = max_of(prepared, bytes(block.gate) + bytes(block.up));
  }
  const bool steps = call_.length == 1;
  const int64_t task_rows = steps ? round_up(queries_, 4) : block_rows(queries_);
  private_ = memory.take<Private>(n_threads_);
  for (int32_t rank = 0; rank < n_threads_; ++rank) {
    Private mine = {};
    mine.x = memory.take<float>(widest(model_));
    mine.h = memory.take<float>(solo_ ? rows_ * model_.hidden : 0);
    mine.rows = memory.take<uint8_t>(solo_ ? prepared : 0);
    if (blocks) {
      mine.key = memory.take<float>(model_.head_dim);
      mine.q = memory.take<float>(task_rows * padded_d_);
      mine.out = memory.take<float>(steps ? 0 : task_rows * padded_d_);
      mine.attention = memory.take<float>(steps ? decode_floats() : block_floats(vector_, task_rows, model_.head_dim));
    }
    if (workspace) private_[rank] = mine;
  }
  h_ = memory.take<float>(solo_ ? 0 : rows_ * model_.hidden);
  prepared_ = memory.take<uint8_t>(solo_ ? 0 : prepared);
  if (!blocks) return memory.used();
  a_ = memory.take<float>(rows_ * model_.hidden);
  qkv_ = memory.take<float>(slab_rows_ * (q_width_ + 2 * kv_width_));
  attention_ = memory.take<float>(steps ? 0 : slab_rows_ * q_width_);
  gate_ = memory.take<float>(slab_rows_ * model_.intermediate);
  up_ = memory.take<float>(slab_rows_ * model_.intermediate);
  const int64_t chunks = call_.start / kDecodeKeys + 1;
  partials_ = memory.take<float>(steps ? slab_rows_ * model_.kv_heads * chunks * partial_floats_ : 0);
  return memory.used();
}

// f(row, rank) for rows of `width` numbers: shared out, or done by each thread for itself.
template <class F>
void LlamaForward::each_row(Team& team, int64_t count, int64_t width, const F& f) {
  if (solo_) {
    for (int64_t row = 0; row < count; ++row) f(row, team.rank());
    return;
  }
  const int64_t per_task = max_of(1, kTaskElements / width);
  team.share(ceil_div(count, per_task), [&](int64_t task, int32_t rank) {
    for (int64_t row = task * per_task; row < min_of((task + 1) * per_task, count); ++row) f(row, rank);
  });
}

LinearGroup LlamaForward::group_of(const LlmqLinear* const* linears, int32_t count, int32_t rank, int64_t rows) const {
  LinearGroup group = {};
  uint8_t* memory = solo_ ? private_[rank].rows : prepared_;
  group.count = count;
  for (int32_t i = 0; i < count; ++i) {
    group.linear[i] = linears[i];
    group.source[i] = i;
    for (int32_t j = i - 1; j >= 0; --j) {
      if (group.source[j] == j && same_rows(isa_, *linears[j], *linears[i])) group.source[i] = j;
    }
    if (group.source[i] == i) {
      group.rows[i] = rows_in(isa_, *linears[i], rows, memory);
      memory += rows_bytes(isa_, *linears[i], rows);
    } else {
      group.rows[i] = group.rows[group.source[i]];
    }
  }
  return group;
}

void LlamaForward::prepare(const LinearGroup& group, const float* x, int64_t row) const {
  for (int32_t i = 0; i < group.count; ++i) {
    // a stride of 0: every row is at x
    if (group.source[i] == i) prepare_rows(isa_, *group.linear[i], x, Dtype::kF32, 0, group.rows[i], row, row + 1);
  }
}

void LlamaForward::multiply(Team& team, const LinearGroup& group, int64_t rows, void* const* y, const int64_t* stride,
                            Dtype dtype) {
  const int32_t n_threads = team.size();
  Product products[3];
  int64_t end[3], tasks = 0;
  for (int32_t i = 0; i < group.count; ++i) {
    products[i] = {group.linear[i], group.rows[i], rows, y[i], dtype, stride[i]};
    end[i] = tasks += tile_count(isa_, products[i], n_threads);
  }
  team.share(tasks, [&](int64_t task, int32_t) {
    int32_t i = 0;
    while (task >= end[i]) ++i;
    multiply_tile(isa_, products[i], n_threads, i ? task - end[i - 1] : task);
  });
}

void LlamaForward::run(Team& team) {
  if (call_.head_only) return head(team, {0, 1, rows_}, static_cast<uint8_t*>(call_.out));
  embed(team);
  const Slabs slabs(call_);
  for (int64_t layer = 0; layer < model_.layers; ++layer) {
    for (int64_t i = 0; i < slabs.count; ++i) block(team, layer, slabs.at(i));
  }
  const int64_t last = call_.length - 1;
  if (call_.output == LLMQ_OUTPUT_HIDDEN) {
    hidden_out(team);
  } else if (call_.output == LLMQ_OUTPUT_LAST) {
    head(team, {last, call_.length, call_.batch}, static_cast<uint8_t*>(call_.out));
  } else {
    head(team, {0, 1, rows_}, static_cast<uint8_t*>(call_.out));
  }
}

void LlamaForward::embed(Team& team) {
  const int64_t bytes = model_.hidden * (round_ ? 2 : 4);
  each_row(team, rows_, model_.hidden, [&](int64_t row, int32_t rank) {
    int64_t token;
    memcpy(&token, reinterpret_cast<const uint8_t*>(call_.tokens) + row * 8, sizeof(token));
    vector_.widen(static_cast<const uint8_t*>(model_.embedding) + token * bytes, dtype_, model_.hidden,
                  h_row(rank, row));
  });
}

// `a` holds what the block before has not yet added to the residual stream; at the end it holds what this one has not.
void LlamaForward::block(Team& team, int64_t layer, const Slab& slab) {
  const LlmqBlock& weights = model_.blocks[layer];
  const int64_t hidden = model_.hidden, width = q_width_ + 2 * kv_width_, rows = slab.batch * slab.length;
  const int64_t first = slab.b * call_.length + slab.t;
  const LlmqLinear* const linears[] = {&weights.q, &weights.k, &weights.v};
  const LinearGroup qkv = group_of(linears, 3, team.rank(), rows);
  each_row(team, rows, hidden, [&](int64_t row, int32_t rank) {
    float* x = private_[rank].x;
    vector_.norm(h_row(rank, first + row), layer ? a_ + (first + row) * hidden : nullptr,
                 reinterpret_cast<const F32*>(weights.attention_norm), model_.norm_eps, round_, hidden, x);
    prepare(qkv, x, row);
  });
  void* const y[] = {qkv_, qkv_ + q_width_, qkv_ + q_width_ + kv_width_};
  const int64_t strides[] = {width, width, width};
  multiply(team, qkv, rows, y, strides, kept_);

  View view = {first, 1, rows};
  if (call_.length == 1) {
    decode(team, layer, slab);
  } else {
    each_row(team, rows, 2 * kv_width_, [&](int64_t row, int32_t rank) {
      if (solo_ && rank != 0) return;
      for (int64_t head = 0; head < model_.kv_heads; ++head) {
        write_key(layer, slab.b + row / slab.length, head, call_.start + slab.t + row % slab.length, qkv_ + row * width,
                  private_[rank].key);
      }
    });
    if (solo_) team.barrier();
    // Of the last block only the last token's numbers are needed, where only its logits are.
    int64_t from = 0;
    if (layer + 1 == model_.layers && call_.output == LLMQ_OUTPUT_LAST) {
      if (slab.t + slab.length < call_.length) return;
      from = slab.length - 1;
      view = {first + from, call_.length, slab.batch};
    }
    attend(team, layer, slab, from);
  }

  const LlmqLinear* const o[] = {&weights.o};
  const LinearGroup output = group_of(o, 1, team.rank(), view.count);
  const Chunks chunks = chunks_of(layer);
  each_row(team, view.count, q_width_, [&](int64_t row, int32_t rank) {
    if (call_.length > 1) return prepare(output, attention_ + row * q_width_, row);
    float* x = private_[rank].x;
    for (int64_t head = 0; head < model_.heads; ++head) {
      const float* partials = partials_ + (row * model_.kv_heads + head / queries_) * chunks.count * partial_floats_;
      vector_.combine(partials, chunks.count, partial_floats_, queries_, head % queries_, round_result_,
                      model_.head_dim, x + head * model_.head_dim);
    }
    prepare(output, x, row);
  });
  void* const a[] = {a_ + view.first * hidden};
  const int64_t stride[] = {view.step * hidden};
  multiply(team, output, view.count, a, stride, kept_);
  mlp(team, weights, view);
}

void LlamaForward::mlp(Team& team, const LlmqBlock& weights, const View& view) {
  const int64_t hidden = model_.hidden, inner = model_.intermediate;
  const LlmqLinear* const linears[] = {&weights.gate, &weights.up};
  const LinearGroup gate_up = group_of(linears, 2, team.rank(), view.count);
  each_row(team, view.count, hidden, [&](int64_t row, int32_t rank) {
    const int64_t at = view.first + row * view.step;
    float* x = private_[rank].x;
    vector_.norm(h_row(rank, at), a_ + at * hidden, reinterpret_cast<const F32*>(weights.mlp_norm), model_.norm_eps,
                 round_, hidden, x);
    prepare(gate_up, x, row);
  });
  void* const y[] = {gate_, up_};
  const int64_t strides[] = {inner, inner};
  multiply(team, gate_up, view.count, y, strides, kept_);

  const LlmqLinear* const down[] = {&weights.down};
  const LinearGroup output = group_of(down, 1, team.rank(), view.count);
  each_row(team, view.count, inner, [&](int64_t row, int32_t rank) {
    float* x = private_[rank].x;
    vector_.silu_mul(gate_ + row * inner, up_ + row * inner, round_, inner, x);
    prepare(output, x, row);
  });
  void* const a[] = {a_ + view.first * hidden};
  const int64_t stride[] = {view.step * hidden};
  multiply(team, output, view.count, a, stride, kept_);
}

HeadCache LlamaForward::head_cache(int64_t layer, int64_t b, int64_t head) const {
  const LlmqKVCache& cache = *call_.cache;
  const int64_t index = b * model_.kv_heads + head;
  const int64_t element = cache.dtype == LLMQ_CACHE_F32 ? 4 : cache.dtype == LLMQ_CACHE_BF16 ? 2 : 1;
  const int64_t offset = index * cache.length * model_.head_dim * element;
  HeadCache found = {};
  found.keys = static_cast<const uint8_t*>(cache.keys[layer]) + offset;
  found.values = static_cast<const uint8_t*>(cache.values[layer]) + offset;
  found.dtype = cache.dtype == LLMQ_CACHE_F32    ? KVDtype::kF32
                : cache.dtype == LLMQ_CACHE_BF16 ? KVDtype::kBf16
                                                 : KVDtype::kInt8;
  if (cache.dtype == LLMQ_CACHE_INT8) {
    found.key_scale = reinterpret_cast<const F32*>(cache.key_scales[layer]) + index * cache.length;
    found.value_scale = reinterpret_cast<const F32*>(cache.value_scales[layer]) + index * cache.length;
  }
  return found;
}

const F32* LlamaForward::angles(const float* table, int64_t position) const {
  return reinterpret_cast<const F32*>(table) + position * model_.head_dim;
}

// One token's key and value of one head, from its row of q, k and v, to the cache.
void LlamaForward::write_key(int64_t layer, int64_t b, int64_t head, int64_t position, const float* qkv,
                             float* key) const {
  const int64_t d = model_.head_dim;
  const HeadCache cache = head_cache(layer, b, head);
  const bool int8 = cache.dtype == KVDtype::kInt8;
  const float* value = qkv + q_width_ + kv_width_ + head * d;
  vector_.rotate(qkv + q_width_ + head * d, angles(call_.cache->cosines, position),
                 angles(call_.cache->sines, position), int8 && round_, 1.0f, d, key);
  const int64_t at = position * d;
  const float* const from[] = {key, value};
  void* const to[] = {const_cast<void*>(cache.keys), const_cast<void*>(cache.values)};
  F32* const scales[] = {const_cast<F32*>(cache.key_scale), const_cast<F32*>(cache.value_scale)};
  for (int i = 0; i < 2; ++i) {
    if (int8) {
      vector_.quantize(from[i], d, static_cast<int8_t*>(to[i]) + at, scales[i] + position);
    } else if (cache.dtype == KVDtype::kBf16) {
      vector_.narrow(from[i], Dtype::kBf16, d, static_cast<Bf16*>(to[i]) + at);
    } else {
      vector_.narrow(from[i], Dtype::kF32, d, static_cast<F32*>(to[i]) + at);
    }
  }
}

LlamaForward::Chunks LlamaForward::chunks_of(int64_t layer) const {
  const int64_t window = model_.blocks[layer].window, end = call_.start + 1;
  const int64_t begin = window ? max_of(0, end - window) : 0, first = begin / kDecodeKeys;
  return {begin, end, first, ceil_div(end, kDecodeKeys) - first};
}

// One token of each sequence. The task of the last keys writes the token's own before it reads them.
void LlamaForward::decode(Team& team, int64_t layer, const Slab& slab) {
  const int64_t d = model_.head_dim, width = q_width_ + 2 * kv_width_;
  const Chunks chunks = chunks_of(layer);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
  team.share(slab.batch * model_.kv_heads * chunks.count, [&](int64_t task, int32_t rank) {
    const int64_t chunk = task % chunks.count, head = task / chunks.count % model_.kv_heads;
    const int64_t row = task / chunks.count / model_.kv_heads, position = call_.start;
    const Private& mine = private_[rank];
    const float* qkv = qkv_ + row * width;
    if (chunk + 1 == chunks.count) write_key(layer, slab.b + row, head, position, qkv, mine.key);
    memset(mine.q, 0, static_cast<size_t>(round_up(queries_, 4) * padded_d_) * sizeof(float));
    for (int64_t i = 0; i < queries_; ++i) {
      vector_.rotate(qkv + (head * queries_ + i) * d, angles(call_.cache->cosines, position),
                     angles(call_.cache->sines, position), round_q_, scale, d, mine.q + i * padded_d_);
    }
    DecodeJob job = {};
    job.cache = head_cache(layer, slab.b + row, head);
    job.head_dim = d;
    job.queries = queries_;
    job.key_begin = max_of(chunks.begin, (chunks.first + chunk) * kDecodeKeys);
    job.key_end = min_of(chunks.end, (chunks.first + chunk + 1) * kDecodeKeys);
    job.q = mine.q;
    job.scratch = mine.attention;
    job.partial = partials_ + task * partial_floats_;
    vector_.decode(job);
  });
}

// Tokens [from, slab.length) of each sequence; the keys of the slab are in the cache. The results' rows have no gaps.
void LlamaForward::attend(Team& team, int64_t layer, const Slab& slab, int64_t from) {
  const int64_t d = model_.head_dim, width = q_width_ + 2 * kv_width_, length = slab.length - from;
  const int64_t per_task = block_rows(queries_) / queries_, blocks = ceil_div(length, per_task);
  const int64_t heads = slab.batch * model_.kv_heads;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
  team.share(heads * blocks, [&](int64_t task, int32_t rank) {
    // The last tokens see most keys: they go first, so that no thread begins a long task when the others end.
    const int64_t part = blocks - 1 - task / heads, head = task % model_.kv_heads, b = task % heads / model_.kv_heads;
    const int64_t begin = part * per_task, count = min_of(per_task, length - begin);
    const Private& mine = private_[rank];
    if (padded_d_ != d) memset(mine.q, 0, static_cast<size_t>(count * queries_ * padded_d_) * sizeof(float));
    for (int64_t t = 0; t < count; ++t) {
      const int64_t position = call_.start + slab.t + from + begin + t;
      const float* q = qkv_ + (b * slab.length + from + begin + t) * width + head * queries_ * d;
      for (int64_t i = 0; i < queries_; ++i) {
        vector_.rotate(q + i * d, angles(call_.cache->cosines, position), angles(call_.cache->sines, position),
                       round_q_, scale, d, mine.q + (t * queries_ + i) * padded_d_);
      }
    }
    BlockJob job = {};
    job.cache = head_cache(layer, slab.b + b, head);
    job.head_dim = d;
    job.rows = count * queries_;
    job.group = queries_;
    job.position = call_.start + slab.t + from + begin;
    job.window = model_.blocks[layer].window;
    job.round = round_result_;
    job.q = mine.q;
    job.scratch = mine.attention;
    job.out = mine.out;
    vector_.block(job);
    for (int64_t t = 0; t < count; ++t) {
      float* result = attention_ + (b * length + begin + t) * q_width_ + head * queries_ * d;
      for (int64_t i = 0; i < queries_; ++i) {
        memcpy(result + i * d, mine.out + (t * queries_ + i) * padded_d_, static_cast<size_t>(d) * sizeof(float));
      }
    }
  });
}

// Final norm and head of some rows, a slab's worth at a time.
void LlamaForward::head(Team& team, const View& view, uint8_t* out) {
  const int64_t hidden = model_.hidden, element = round_ ? 2 : 4;
  const LlmqLinear* const linears[] = {&model_.head};
  for (int64_t begin = 0; begin < view.count; begin += slab_rows_) {
    const int64_t rows = min_of(slab_rows_, view.count - begin);
    const LinearGroup group = group_of(linears, 1, team.rank(), rows);
    each_row(team, rows, hidden, [&](int64_t row, int32_t rank) {
      const int64_t at = view.first + (begin + row) * view.step;
      float* h = h_row(rank, at);
      if (call_.head_only) {
        vector_.widen(static_cast<const uint8_t*>(call_.hidden) + at * hidden * element, dtype_, hidden, h);
      }
      float* x = private_[rank].x;
      vector_.norm(h, call_.head_only ? nullptr : a_ + at * hidden, reinterpret_cast<const F32*>(model_.final_norm),
                   model_.norm_eps, round_, hidden, x);
      prepare(group, x, row);
    });
    void* const y[] = {out + begin * model_.vocab * element};
    const int64_t stride[] = {model_.vocab};
    multiply(team, group, rows, y, stride, dtype_);
  }
}

// The residual stream of all rows.
void LlamaForward::hidden_out(Team& team) {
  const int64_t hidden = model_.hidden;
  each_row(team, rows_, hidden, [&](int64_t row, int32_t rank) {
    float* h = h_row(rank, row);
    // for the sum alone: what norm makes of it is not used
    vector_.norm(h, a_ + row * hidden, reinterpret_cast<const F32*>(model_.final_norm), model_.norm_eps, round_, hidden,
                 private_[rank].x);
    if (solo_ && rank != 0) return;
    vector_.narrow(h, dtype_, hidden, static_cast<uint8_t*>(call_.out) + row * hidden * (round_ ? 2 : 4));
  });
}

}  // namespace llmq
