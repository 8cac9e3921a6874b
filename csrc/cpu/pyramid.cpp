// build_pyramid for alpha = 0.5 and its backward. A unit is one row of the coarsest level and all the rows
// above it that it is made of: the input is read once, whatever the number of levels, and every row of a
// level is combined while it is still in the first cache.
#include "../common/pyramid.h"
#include "kernels.h"
#include "rows.h"

namespace phmdiff {
namespace PHM_ISA {
namespace {

struct Sides {
  int64_t height[MAX_LEVELS + 1], width[MAX_LEVELS + 1];
  explicit Sides(const PyramidArgs& a) {
    height[0] = a.shape.height, width[0] = a.shape.width;
    for (int n = 1; n <= a.levels; ++n) height[n] = half_of(height[n - 1]), width[n] = half_of(width[n - 1]);
  }
};

// One row from the two above it; `bottom` is null where the upper level ends.
template <typename A>
void halve_rows(const A* __restrict top, const A* __restrict bottom, int64_t width, A* __restrict out) {
  const int rows = bottom ? 2 : 1;
  const int64_t pairs = width / 2;
  const A weight = block_weight<A>(rows, 2), last = block_weight<A>(rows, 1);
  if (bottom) {
    PHM_VECTOR
    for (int64_t j = 0; j < pairs; ++j)
      out[j] = mean_of(top[2 * j] + bottom[2 * j], top[2 * j + 1] + bottom[2 * j + 1], weight);
    if (width % 2) out[pairs] = (top[width - 1] + bottom[width - 1]) * last;
  } else {
    PHM_VECTOR
    for (int64_t j = 0; j < pairs; ++j) out[j] = mean_of(top[2 * j], top[2 * j + 1], weight);
    if (width % 2) out[pairs] = top[width - 1] * last;
  }
}

template <typename T>
struct Forward {
  using A = wide_t<T>;
  const PyramidArgs& a;
  const Sides& sides;
  const Rows<A>& scratch;
  const Writer<T>& writer;
  int64_t plane;  // of the outputs
  const T* x;     // this plane of the input

  // Row i of level n in the wide type; `which` (0 or 1) tells the two rows of a pair apart.
  const A* row(int n, int64_t i, int which) const {
    const int64_t width = sides.width[n];
    if (n == 0) {
      prefetch_ahead(x + i * a.x.row, width, a.x.row);
      return read_row(x + i * a.x.row, width, scratch[which]);
    }
    const A* top = row(n - 1, 2 * i, 0);
    const A* bottom = 2 * i + 1 < sides.height[n - 1] ? row(n - 1, 2 * i + 1, 1) : nullptr;
    T* out = static_cast<T*>(a.level[n - 1]) + (plane * sides.height[n] + i) * width;
    A* wide = writer.place(out, 2 * (n - 1) + which);
    halve_rows(top, bottom, sides.width[n - 1], wide);
    writer.written(out, width, 2 * (n - 1) + which);
    return wide;
  }
};

// add + what each pixel of a finer row gets from the coarser row below it.
template <typename A>
void spread_row(const A* __restrict coarse, const A* __restrict add, int rows, int64_t width, A* __restrict out) {
  const int64_t pairs = width / 2;
  const A weight = block_weight<A>(rows, 2), last = block_weight<A>(rows, 1);
  if (add) {
    PHM_VECTOR
    for (int64_t j = 0; j < pairs; ++j) {
      const A part = weight * coarse[j];
      out[2 * j] = add[2 * j] + part;
      out[2 * j + 1] = add[2 * j + 1] + part;
    }
    if (width % 2) out[width - 1] = add[width - 1] + last * coarse[pairs];
  } else {
    PHM_VECTOR
    for (int64_t j = 0; j < pairs; ++j) {
      const A part = weight * coarse[j];
      out[2 * j] = part;
      out[2 * j + 1] = part;
    }
    if (width % 2) out[width - 1] = last * coarse[pairs];
  }
}

template <typename T>
struct Backward {
  using A = wide_t<T>;
  const PyramidArgs& a;
  const Sides& sides;
  const Rows<A>& scratch;
  const Writer<T>& writer;
  int64_t plane;
  T* x;

  // The rows of level n - 1 under row i of level n, whose whole gradient is `coarse`; then those under them.
  void down(int n, int64_t i, const A* coarse) const {
    const int64_t height = sides.height[n - 1], width = sides.width[n - 1];
    const int rows = 2 * i + 1 < height ? 2 : 1;
    for (int64_t r = 2 * i; r < 2 * i + rows; ++r) {
      if (n == 1) {
        T* out = x + r * width;
        spread_row<A>(coarse, nullptr, rows, width, writer.place(out));
        writer.written(out, width);
        continue;
      }
      const A* add = gradient(n - 1, r, scratch[2 * n - 2]);
      spread_row(coarse, add, rows, width, scratch[2 * n - 1]);
      down(n - 1, r, scratch[2 * n - 1]);
    }
  }

  const A* gradient(int n, int64_t i, A* into) const {
    const T* level = static_cast<const T*>(a.level[n - 1]);
    return read_row(level + (plane * sides.height[n] + i) * sides.width[n], sides.width[n], into);
  }
};

}  // namespace

template <typename T>
void pyramid_forward(const PyramidArgs& a, int64_t begin, int64_t end) {
  const Sides sides(a);
  const Rows<wide_t<T>> scratch(2, a.shape.width);
  const int64_t elements = a.shape.batch * a.shape.channels * a.shape.height * a.shape.width;
  const Writer<T> writer(2 * a.levels, sides.width[1], elements * int64_t(sizeof(T)));
  const int64_t rows = sides.height[a.levels];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / rows, b = plane / a.shape.channels, c = plane % a.shape.channels;
    const T* x = static_cast<const T*>(a.x.data) + b * a.x.batch + c * a.x.channel;
    Forward<T>{a, sides, scratch, writer, plane, x}.row(a.levels, unit % rows, 0);
  }
}

template <typename T>
void pyramid_backward(const PyramidArgs& a, int64_t begin, int64_t end) {
  const Sides sides(a);
  const Rows<wide_t<T>> scratch(2 * (a.levels + 1), a.shape.width);
  const int64_t rows = sides.height[a.levels], plane_size = a.shape.height * a.shape.width;
  const Writer<T> writer(1, a.shape.width, a.shape.batch * a.shape.channels * plane_size * int64_t(sizeof(T)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / rows, i = unit % rows;
    T* x = static_cast<T*>(a.x.data) + plane * plane_size;
    const Backward<T> backward{a, sides, scratch, writer, plane, x};
    backward.down(a.levels, i, backward.gradient(a.levels, i, scratch[2 * a.levels]));
  }
}

#define PHM_INSTANTIATE(T)                                                \
  template void pyramid_forward<T>(const PyramidArgs&, int64_t, int64_t); \
  template void pyramid_backward<T>(const PyramidArgs&, int64_t, int64_t);
PHM_INSTANTIATE(float)
PHM_INSTANTIATE(double)
PHM_INSTANTIATE(bfloat16)
PHM_INSTANTIATE(float16)

}  // namespace PHM_ISA
}  // namespace phmdiff
