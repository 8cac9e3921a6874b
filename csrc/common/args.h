// What the kernels of either device are called with: plain pointers (of that device) and sizes, no torch.
#pragma once

#include "merge.h"
#include "philox.h"

namespace phmdiff {

constexpr int MAX_LEVELS = 24;

// (B, C, H, W), last stride 1; the others in elements, 0 where expanded.
struct Image {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0;
};

struct Shape {
  int64_t batch, channels, height, width;
};

struct PyramidArgs {
  Image x;  // the input; of backward its gradient, contiguous
  Shape shape;
  int levels;                // those below x
  void* level[MAX_LEVELS];   // level[n] is contiguous and half of level[n - 1]; of backward, the gradients
};

// Antialiased levels for alpha other than 0.5: one level from the one above it, or (transposed) its backward.
struct ResampleArgs {
  const void* in;   // (planes, in_height, in_width), contiguous
  const void* add;  // added to the result, shaped like out, or null
  void* out;        // contiguous
  int64_t planes, in_height, in_width, out_height, out_width;
  bool transposed;  // out is the larger one
};

// Noise drawn in the kernel; seed and step are read where seed_at and step_at point, if they do.
struct Normals {
  const int64_t* sample_ids = nullptr;  // (B,)
  int64_t seed = 0, step = 0, stream = 0;
  const int64_t *seed_at = nullptr, *step_at = nullptr;
};

PHM_HD Stream stream_of(const Normals& n, int64_t b) {
  return stream_of(n.sample_ids[b], n.stream, n.seed_at ? *n.seed_at : n.seed, n.step_at ? *n.step_at : n.step);
}

// out = f.y y + f.eps eps + f.coarse up(coarse), each term where its image is given.
template <typename A>
struct MergeArgs {
  Image y, eps, coarse;
  Normals normals;  // eps drawn here, if sample_ids is set
  Shape shape;      // of y and out
  FactorsOf<A> factors;
  bool absolute;  // |out|
  void* out;      // contiguous
};

// Gradients of the above from that of out, each where asked for.
template <typename A>
struct MergeBackwardArgs {
  Image grad;
  Shape shape;
  FactorsOf<A> factors;
  void *y, *eps, *coarse;  // contiguous, or null
};

struct HaarArgs {
  const void* in;
  void* out;
  int64_t batch, channels, x, y, z;  // of the volume; the bands are half, rounded up; both contiguous
};

// Rows of tokens: row r of sample s lies at data + s sample + r row, in elements. Packed rows are numbered over all
// samples: sample is 0.
struct TokenRows {
  const void* data = nullptr;
  int64_t sample = 0, row = 0;
};

// A vector of each sample, `row` elements apart.
struct SampleVectors {
  const void* data = nullptr;
  int64_t row = 0;
};

// Consecutive rows of one sample, of the `parts` that the sample is cut into.
struct Stretch {
  int64_t sample, first, count, parts;
};

// Modulated LayerNorm (kernels/adaln.py) and its backward; what is not given or not asked for is null.
struct AdalnArgs {
  TokenRows x, h;              // x is of the backward what was normalised
  TokenRows dy, dnew;          // gradients of y and x'
  SampleVectors gate, shift, scale;
  void *new_x, *y, *dx, *dh;   // contiguous; sample s begins at row s rows
  void *dgate, *dshift, *dscale;  // (S, D), contiguous
  float* partial;              // (stretches, 3, D): sums of stretches whose sample has several
  const Stretch* stretches;
  const int64_t* first_stretch;  // (S + 1,), of each sample
  int64_t width, rows;
  float eps;
};

// Types of the residual and of everything else.
template <typename X, typename V>
struct AdalnTypes {
  using Residual = X;
  using Branch = V;
};

// Self-attention of short sequences (kernels/short_attention.py) and its backward; qkv's rows are (3, heads, dim).
struct AttentionArgs {
  TokenRows qkv, dout;     // dout: the gradient of out
  void *out, *dqkv;        // contiguous
  const int64_t* offsets;  // (sequences + 1,), the first row of each packed sequence, or null
  int64_t heads, dim;
  int64_t longest;         // tokens of every sequence, of packed ones the most
  float scale, scale2;     // dim^-1/2, and that over ln 2
};

// `count` numbers of each of `batch` samples, from the first of the stream on: (batch, count), contiguous.
struct DrawArgs {
  Normals normals;
  int64_t batch, count;
  void* out;  // float normals or int64 integers
};

}  // namespace phmdiff
