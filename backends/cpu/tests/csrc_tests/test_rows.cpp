// rms_norm, layer_norm, gate and rope against the same in double: odd sizes, rows apart, unaligned.
//
// Every array ends at a page that nobody may touch, so that rows of an odd size begin anywhere.
#include <algorithm>

#include "check.h"

using namespace vc_test;

namespace {

const float NOT_READ = std::nanf("");

struct Shape {
  int64_t rows, size, gap;  // numbers between rows of x, and as many and two between those of out
};

// A sum of `count` rounded numbers, relative to the sum of their sizes.
double noise(int64_t count) { return (4 + 2 * std::sqrt(static_cast<double>(count))) * unit<float>(); }

template <class T>
double rounded(double wanted, double allowed) {
  return allowed + 1.01 * unit<T>() * (std::fabs(wanted) + allowed) + 1e-30;
}

// Rows `stride` apart, NaN in between.
template <class T>
struct Table {
  int64_t rows, size, stride;
  Guarded<T> at;

  Table(int64_t rows_, int64_t size_, int64_t gap)
      : rows(rows_), size(size_), stride(size_ + gap), at((rows_ - 1) * (size_ + gap) + size_, narrow<T>(NOT_READ)) {}
  T& operator()(int64_t row, int64_t i) { return at[row * stride + i]; }
  double value(int64_t row, int64_t i) const { return widen(at[row * stride + i]); }

  // Rows of very different size, and of one mean or another; every seventh is zeros.
  void fill(Random& random) {
    for (int64_t r = 0; r < rows; r++) {
      const float size_of_row = r % 7 == 6 ? 0 : std::pow(10.0f, static_cast<float>(r % 5 - 3));
      const float mean = static_cast<float>(r % 3) * 2;
      for (int64_t i = 0; i < size; i++) (*this)(r, i) = narrow<T>(size_of_row * (random.normal() + mean));
    }
  }
  void check_gaps(const char* name) const {
    const T poison = narrow<T>(NOT_READ);
    for (int64_t i = 0; i < at.size(); i++)
      check(i % stride < size || !std::memcmp(&at[i], &poison, sizeof(T)), "%s: wrote between rows, at %ld", name, i);
  }
};

void fill(Guarded<float>& to, Random& random) {
  for (int64_t i = 0; i < to.size(); i++) to[i] = random.normal();
}

template <class T>
vc::Rows record(const Shape& s, const Table<T>& x, Table<T>& out, const Guarded<float>& weight) {
  vc::Rows rows = {};
  rows.x = x.at.data(), rows.out = out.at.data(), rows.weight = weight.data();
  rows.rows = s.rows, rows.size = s.size, rows.x_stride = x.stride, rows.out_stride = out.stride;
  rows.eps = 1e-5f, rows.dtype = dtype_of<T>();
  return rows;
}

template <class T>
void check_number(double got, double wanted, double allowed, const char* name, const Shape& s, int64_t row, int64_t i) {
  allowed = rounded<T>(wanted, allowed);
  check(std::fabs(got - wanted) <= allowed, "%s: dtype %d, %ld rows of %ld, [%ld, %ld]: %.9g, not %.9g +- %.2g", name,
        dtype_of<T>(), s.rows, s.size, row, i, got, wanted, allowed);
}

template <class T>
void check_rms_norm(const Shape& s, bool add, uint64_t seed) {
  Random random(seed);
  Table<T> x(s.rows, s.size, s.gap), out(s.rows, s.size, s.gap + 2);
  Table<T> residual(s.rows, s.size, 0), total(s.rows, s.size, 0);
  Guarded<float> weight(s.size);
  x.fill(random), residual.fill(random), fill(weight, random);
  vc::Rows rows = record(s, x, out, weight);
  if (add) rows.residual = residual.at.data(), rows.total = total.at.data();
  const char* name = add ? "rms_norm of a sum" : "rms_norm";
  kernels->rms_norm(&rows);
  out.check_gaps(name);
  for (int64_t r = 0; r < s.rows; r++) {
    double squares = 0;
    std::vector<double> y;
    for (int64_t i = 0; i < s.size; i++) {
      T kept = add ? narrow<T>(widen(x(r, i)) + widen(residual(r, i))) : x(r, i);
      check(!add || !std::memcmp(&kept, &total(r, i), sizeof(T)),
            "rms_norm: dtype %d, %ld rows of %ld: total [%ld, %ld]", dtype_of<T>(), s.rows, s.size, r, i);
      y.push_back(widen(kept));
      squares += y.back() * y.back();
    }
    const double scale = 1 / std::sqrt(squares / static_cast<double>(s.size) + static_cast<double>(rows.eps));
    for (int64_t i = 0; i < s.size; i++) {
      double wanted = y[static_cast<size_t>(i)] * scale * static_cast<double>(weight[i]);
      check_number<T>(out.value(r, i), wanted, noise(s.size) * std::fabs(wanted), name, s, r, i);
    }
  }
}

template <class T>
void check_layer_norm(const Shape& s, bool biased, uint64_t seed) {
  Random random(seed);
  Table<T> x(s.rows, s.size, s.gap), out(s.rows, s.size, s.gap + 2);
  Guarded<float> weight(s.size), bias(s.size);
  x.fill(random), fill(weight, random), fill(bias, random);
  vc::Rows rows = record(s, x, out, weight);
  rows.bias = biased ? bias.data() : nullptr;
  kernels->layer_norm(&rows);
  out.check_gaps("layer_norm");
  const double n = static_cast<double>(s.size), part = noise(s.size);
  for (int64_t r = 0; r < s.rows; r++) {
    double mean = 0, size = 0, squares = 0;
    for (int64_t i = 0; i < s.size; i++) mean += x.value(r, i) / n, size += std::fabs(x.value(r, i)) / n;
    for (int64_t i = 0; i < s.size; i++) squares += std::pow(x.value(r, i) - mean, 2);
    const double scale = 1 / std::sqrt(squares / n + static_cast<double>(rows.eps)), mean_wrong = part * size;
    for (int64_t i = 0; i < s.size; i++) {
      double y = (x.value(r, i) - mean) * scale;
      double wrong = (mean_wrong + unit<float>() * std::fabs(x.value(r, i))) * scale;
      double wanted = y * static_cast<double>(weight[i]) + (biased ? static_cast<double>(bias[i]) : 0);
      double allowed = (wrong + std::fabs(y) * (part + mean_wrong * scale)) * std::fabs(weight[i]);
      allowed += part * (std::fabs(wanted) + std::fabs(bias[i]));
      check_number<T>(out.value(r, i), wanted, allowed, "layer_norm", s, r, i);
    }
  }
}

double activated(double x, int kind) {
  if (kind == 1) return x / (1 + std::exp(-x));
  // 0.5 x (1 + tanh(u)), without the difference that leaves nothing where tanh(u) is near -1
  return x / (1 + std::exp(-2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

template <class T>
void check_gate(const Shape& s, int kind, uint64_t seed) {
  Random random(seed);
  Table<T> x(s.rows, 2 * s.size, s.gap), out(s.rows, s.size, s.gap + 2);
  Guarded<float> none(0);
  x.fill(random);
  const float far[] = {0.0f, 20.0f, -20.0f, 95.0f, -95.0f, 1e4f, -1e4f, -3.0f};
  for (int64_t r = 0; r < s.rows; r++) x(r, r % s.size) = narrow<T>(far[r % 8]);
  vc::Rows rows = record(s, x, out, none);
  const char* name = kind == 1 ? "silu gate" : "gelu gate";
  kernels->gate(&rows, kind);
  out.check_gaps(name);
  for (int64_t r = 0; r < s.rows; r++)
    for (int64_t i = 0; i < s.size; i++) {
      const double gate = x.value(r, i), up = x.value(r, s.size + i), factor = activated(gate, kind);
      // e^-2u is as wrong as u is, times 2u; it ends at e^88, which leaves something of a far gate
      const double size = std::fabs(gate);
      const double twice_u = kind == 1 ? 0 : std::min(1.6 * size + 0.072 * size * size * size, 90.0);
      const double wrong = (6 + 4 * twice_u) * unit<float>() * std::fabs(factor) + 1e-34;
      check_number<T>(out.value(r, i), factor * up, wrong * std::fabs(up), name, s, r, i);
    }
}

struct Heads {
  int64_t tokens, heads, dim, half, gap;
};

template <class T>
void check_rope(const Heads& h, uint64_t seed) {
  Random random(seed);
  const Shape s = {h.tokens, h.heads * h.dim, h.gap};
  Table<T> x(s.rows, s.size, s.gap), out(s.rows, s.size, 0);
  Guarded<float> cos(h.tokens * h.half), sin(h.tokens * h.half);
  x.fill(random);
  for (int64_t i = 0; i < cos.size(); i++) {
    const float angle = 3 * random.normal();
    cos[i] = std::cos(angle), sin[i] = std::sin(angle);
  }
  vc::Rope rope = {x.at.data(), cos.data(), sin.data(), out.at.data(), h.tokens, h.heads, h.dim, h.half, x.stride,
                   dtype_of<T>()};
  kernels->rope(&rope);
  for (int64_t t = 0; t < h.tokens; t++)
    for (int64_t i = 0; i < s.size; i++) {
      const int64_t d = i % h.dim;
      if (d >= 2 * h.half) {
        check(!std::memcmp(&out(t, i), &x(t, i), sizeof(T)), "rope: dim %ld, half %ld: [%ld, %ld] has changed",
              h.dim, h.half, t, i);
        continue;
      }
      const bool second = d >= h.half;
      const int64_t angle = t * h.half + d % h.half;
      const double mine = x.value(t, i) * static_cast<double>(cos[angle]);
      const double other = x.value(t, second ? i - h.half : i + h.half) * static_cast<double>(sin[angle]);
      check_number<T>(out.value(t, i), second ? mine + other : mine - other,
                      3 * unit<float>() * (std::fabs(mine) + std::fabs(other)), "rope", s, t, i);
    }
}

template <class T>
void check_all(const Shape& s, uint64_t seed) {
  for (bool either : {false, true}) {
    check_rms_norm<T>(s, either, seed);
    check_layer_norm<T>(s, either, seed);
    check_gate<T>(s, either ? 1 : 2, seed);
  }
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    std::vector<Shape> shapes;
    for (int64_t size : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 71, 80, 257, 896})
      for (int64_t rows : {1, 3, 15})
        for (int64_t gap : {0, 5})
          if (!few || (rows == 15 && size < 896)) shapes.push_back({rows, size, gap});
    shapes.push_back({37, 911, 3});  // shared among threads
    shapes.push_back({2, 20001, 0});
    const std::vector<Heads> heads = {{1, 1, 64, 32, 0}, {13, 7, 64, 32, 31}, {5, 3, 80, 16, 0},   {5, 2, 72, 36, 72},
                                      {9, 4, 2, 1, 0},   {6, 1, 96, 24, 11},  {3, 5, 5, 2, 1},     {4, 2, 37, 7, 0},
                                      {2, 3, 130, 65, 2}, {131, 8, 63, 31, 9}};
    with_teams([&] {
      uint64_t seed = 0;
      for (const Shape& shape : shapes) {
        check_all<float>(shape, ++seed);
        check_all<bf16>(shape, seed);
      }
      for (const Heads& h : heads) {
        check_rope<float>(h, ++seed);
        check_rope<bf16>(h, seed);
      }
    });
  });
}
