// A forward pass of a Llama as phases of one team of threads.
#pragma once

#include "isa.h"
#include "linear.h"
#include "parallel.h"
#include "vector.h"

namespace llmq {

// Linears that read one input, and the rows that are prepared for them: those of linear i serve every j with source[j]
// = i.
struct LinearGroup {
  const LlmqLinear* linear[3];
  Rows rows[3];
  int32_t source[3];
  int32_t count;
};

// The rows of the residual stream that some phases are about: first, first + step, first + 2 step …
struct View {
  int64_t first, step, count;
};

// Some rows that pass through a block together: tokens [t, t + length) of sequences [b, b + batch).
struct Slab {
  int64_t b, batch, t, length;
};

struct LlamaCall {
  const LlmqLlama* model;
  const LlmqKVCache* cache;
  const int64_t* tokens;
  int64_t batch, length, start;
  int32_t output;
  void* out;
  bool head_only;  // final norm and head of the rows `hidden`; `length` is 1
  const void* hidden;
};

class LlamaForward {
 public:
  LlamaForward(const IsaKernels& isa, const LlamaCall& call, int32_t n_threads);

  // Lays out the memory at `workspace`, a multiple of 64; returns the bytes it takes. null: only that.
  int64_t lay_out(uint8_t* workspace);
  // What each thread of the team calls.
  void run(Team& team);

 private:
  // What belongs to one thread.
  struct Private {
    float* x;          // one row on its way from one linear to the next
    float* q;          // queries of an attention task
    float* out;        // its results
    float* attention;  // its scratch
    float* key;        // a key on its way to the cache
    float* h;          // solo: the residual stream [rows, hidden]
    uint8_t* rows;     // solo: prepared rows
  };

  template <class F>
  void each_row(Team& team, int64_t count, int64_t width, const F& f);
  LinearGroup group_of(const LlmqLinear* const* linears, int32_t count, int32_t rank, int64_t rows) const;
  void prepare(const LinearGroup& group, const float* x, int64_t row) const;
  void multiply(Team& team, const LinearGroup& group, int64_t rows, void* const* y, const int64_t* stride, Dtype dtype);

  void embed(Team& team);
  void block(Team& team, int64_t layer, const Slab& slab);
  void mlp(Team& team, const LlmqBlock& block, const View& view);
  void write_key(int64_t layer, int64_t b, int64_t head, int64_t position, const float* qkv, float* key) const;
  void decode(Team& team, int64_t layer, const Slab& slab);
  void attend(Team& team, int64_t layer, const Slab& slab, int64_t from);
  void head(Team& team, const View& view, uint8_t* out);
  void hidden_out(Team& team);

  // The keys that a token at `position` sees in a decode step of this layer, in tasks of kDecodeKeys.
  struct Chunks {
    int64_t begin, end, first, count;
  };
  Chunks chunks_of(int64_t layer) const;
  HeadCache head_cache(int64_t layer, int64_t b, int64_t head) const;
  const F32* angles(const float* table, int64_t position) const;
  float* h_row(int32_t rank, int64_t row) const { return (solo_ ? private_[rank].h : h_) + row * model_.hidden; }

  const IsaKernels& isa_;
  const VectorKernels& vector_;
  const LlamaCall call_;
  const LlmqLlama& model_;
  const int32_t n_threads_;
  const int64_t rows_;       // of the call
  const int64_t slab_rows_;  // most of a slab
  const bool solo_;          // so few numbers that each thread keeps its own residual stream
  const bool round_;         // the model's numbers are bf16
  const bool round_q_;       // queries are bf16 numbers
  const bool round_result_;  // results of attention are
  const Dtype dtype_;        // of the model
  const Dtype kept_;         // of numbers between the linears
  const int64_t q_width_, kv_width_;
  const int64_t queries_;  // heads that share a key-value head
  const int64_t padded_d_;
  const int64_t partial_floats_;

  float *h_ = nullptr, *a_ = nullptr, *qkv_ = nullptr, *attention_ = nullptr, *gate_ = nullptr, *up_ = nullptr;
  float* partials_ = nullptr;
  uint8_t* prepared_ = nullptr;
  Private* private_ = nullptr;
};

}  // namespace llmq
