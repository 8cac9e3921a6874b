// Self-attention of short sequences and its backward. A unit is one head of one sequence, worked on in scratch memory
// that fits the caches, its scores as a whole; bfloat16 weights and their gradients are rounded before they are
// multiplied. No bit depends on how units are shared out, or on another sequence.
#include "../common/args.h"

#include "kernels.h"
#include "softmax.h"

namespace phmdiff {
namespace PHM_ISA {
namespace {

// Where the rows of a unit are.
struct Unit {
  int64_t sample, first, tokens, head;
};

Unit unit_of(const AttentionArgs& a, int64_t unit) {
  const int64_t sequence = unit / a.heads, head = unit % a.heads;
  if (!a.offsets) return {sequence, 0, a.longest, head};
  return {0, a.offsets[sequence], a.offsets[sequence + 1] - a.offsets[sequence], head};
}

template <typename T>
const T* row_of(const TokenRows& rows, const Unit& u) {
  return static_cast<const T*>(rows.data) + u.sample * rows.sample + u.first * rows.row;
}

// Ask for the rows of a unit, `parts` heads `apart` from each other, which the one before gives time to fetch.
template <typename T>
void ask_for(const TokenRows& rows, const Unit& u, int64_t parts, int64_t apart, int64_t dim) {
  const auto first = reinterpret_cast<uintptr_t>(row_of<T>(rows, u) + u.head * dim);
  for (int64_t r = 0; r < u.tokens; ++r)
    for (int64_t part = 0; part < parts; ++part) {
      const uintptr_t row = first + uintptr_t((r * rows.row + part * apart) * int64_t(sizeof(T)));
      for (int64_t at = 0; at < dim * int64_t(sizeof(T)); at += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(row + uintptr_t(at)), 0, 2);
    }
}

template <typename T>
void fill_nan(int64_t tokens, int64_t dim, T* out, int64_t apart) {
  for (int64_t r = 0; r < tokens; ++r)
    std::fill(out + r * apart, out + r * apart + dim, narrow<T>(std::numeric_limits<float>::quiet_NaN()));
}

// Scratch memory of a unit, as large as the longest sequence needs.
class Scratch {
 public:
  Scratch(const AttentionArgs& a, int vectors, int squares)
      : length_(rounded(a.longest)), wide_(rounded(a.dim)), vectors_(vectors),
        rows_(1, (vectors * wide_ + squares * length_) * length_) {}
  float* vectors(int number) const { return rows_[0] + number * wide_ * length_; }
  float* square(int number) const { return rows_[0] + (vectors_ * wide_ + number * length_) * length_; }
  int64_t wide() const { return wide_; }

 private:
  int64_t length_, wide_, vectors_;
  Rows<float> rows_;
};

// softmax(scale q k) into `weights`, rows of `length`.
template <typename T>
void find_weights(const AttentionArgs& a, const T* q, const T* k, int64_t n, const Tail& tail, const Scratch& scratch,
                  float* weights) {
  const int64_t row = a.qkv.row, length = rounded(n), depth = words<T>(a.dim), wide = scratch.wide();
  const Left keys = words_of(k, row, n, a.dim, scratch.vectors(0), wide);
  transpose(keys.data, keys.row, n, depth, scratch.vectors(1), length);
  const Left queries = words_of(q, row, n, a.dim, scratch.vectors(0), wide);
  multiply<T>(queries, {scratch.vectors(1), length}, n, depth, length, weights);
  with_blocks(length, [&](auto blocks) {
    for (int64_t r = 0; r < n; ++r) softmax<decltype(blocks)::value>(weights + r * length, length, tail, a.scale2);
  });
}

}  // namespace

template <typename T>
void attention_forward(const AttentionArgs& a, int64_t begin, int64_t end) {
  const Scratch scratch(a, 3, 1);
  const int64_t all = a.heads * a.dim, wide = scratch.wide();
  float *weights = scratch.square(0), *result = scratch.vectors(2);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit u = unit_of(a, unit);
    const int64_t n = u.tokens, length = rounded(n);
    T* out = static_cast<T*>(a.out) + (u.sample * a.longest + u.first) * all + u.head * a.dim;
    if (n > a.longest) fill_nan(n, a.dim, out, all);
    if (n == 0 || n > a.longest) continue;
    if (unit + 1 < end) ask_for<T>(a.qkv, unit_of(a, unit + 1), 3, all, a.dim);
    const T* q = row_of<T>(a.qkv, u) + u.head * a.dim;
    find_weights(a, q, q + all, n, Tail(n), scratch, weights);
    const Matrix values = terms<T>(q + 2 * all, a.qkv.row, n, a.dim, wide, scratch.vectors(0));
    multiply<T>(as_left<T>(weights, n, length), values, n, words<T>(n), wide, result);
    write(result, wide, 1.0f, n, a.dim, out, all);
  }
}

template <typename T>
void attention_backward(const AttentionArgs& a, int64_t begin, int64_t end) {
  const Scratch scratch(a, 3, 3);
  const int64_t all = a.heads * a.dim, wide = scratch.wide(), row = a.qkv.row, depth = words<T>(a.dim);
  float *weights = scratch.square(0), *dscores = scratch.square(1), *paired = scratch.square(2);
  float *copied = scratch.vectors(0), *flipped = scratch.vectors(1), *result = scratch.vectors(2);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit u = unit_of(a, unit);
    const int64_t n = u.tokens, length = rounded(n);
    T* out = static_cast<T*>(a.dqkv) + (u.sample * a.longest + u.first) * 3 * all + u.head * a.dim;
    if (n > a.longest)
      for (int part = 0; part < 3; ++part) fill_nan(n, a.dim, out + part * all, 3 * all);
    if (n == 0 || n > a.longest) continue;
    if (unit + 1 < end) {
      ask_for<T>(a.qkv, unit_of(a, unit + 1), 3, all, a.dim);
      ask_for<T>(a.dout, unit_of(a, unit + 1), 1, all, a.dim);
    }
    const T *q = row_of<T>(a.qkv, u) + u.head * a.dim, *k = q + all, *v = k + all;
    const T* dout = row_of<T>(a.dout, u) + u.head * a.dim;
    const Tail tail(n);
    // The left side of a product with a transpose: columns of these, a column of words for each row of the result.
    const auto columns = [&](const float* rows) {
      const Matrix m = terms<T>(rows, length, n, length, length, paired);
      return Left{m.data, 1, m.row};
    };

    find_weights(a, q, k, n, tail, scratch, weights);
    // dV = P^T dO
    multiply<T>(columns(weights), terms<T>(dout, a.dout.row, n, a.dim, wide, copied), n, words<T>(n), wide, result);
    write(result, wide, 1.0f, n, a.dim, out + 2 * all, 3 * all);
    // dS = P (dP - sum of P dP), dP = dO V^T
    const Left values = words_of(v, row, n, a.dim, copied, wide);
    transpose(values.data, values.row, n, depth, flipped, length);
    multiply<T>(words_of(dout, a.dout.row, n, a.dim, copied, wide), {flipped, length}, n, depth, length, dscores);
    with_blocks(length, [&](auto blocks) {
      for (int64_t r = 0; r < n; ++r)
        softmax_backward<decltype(blocks)::value>(weights + r * length, dscores + r * length, length, tail);
    });
    // dK = dS^T Q, dQ = dS K
    multiply<T>(columns(dscores), terms<T>(q, row, n, a.dim, wide, copied), n, words<T>(n), wide, result);
    write(result, wide, a.scale, n, a.dim, out + all, 3 * all);
    const Matrix keys = terms<T>(k, row, n, a.dim, wide, copied);
    multiply<T>(as_left<T>(dscores, n, length), keys, n, words<T>(n), wide, result);
    write(result, wide, a.scale, n, a.dim, out, 3 * all);
  }
}

template void attention_forward<float>(const AttentionArgs&, int64_t, int64_t);
template void attention_forward<bfloat16>(const AttentionArgs&, int64_t, int64_t);
template void attention_backward<float>(const AttentionArgs&, int64_t, int64_t);
template void attention_backward<bfloat16>(const AttentionArgs&, int64_t, int64_t);

}  // namespace PHM_ISA
}  // namespace phmdiff
