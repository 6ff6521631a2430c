// pack, unpack_rows and linear against sums in double, over odd shapes, strides, biases and gates.
#include "check.h"

using namespace vc_test;

namespace {

const float NOT_READ = std::nanf("");

struct Shape {
  int64_t m, n, k;
};

// weight [rows, k] and x [m, k], both with rows further apart than k, and NaN in between.
template <class T>
struct Case {
  Shape shape;
  bool gated;
  int64_t rows, w_stride, x_stride;
  Guarded<T> weight, x;
  Guarded<float> bias;
  Guarded<char> packed;
  std::vector<double> sums, sizes;  // [m][rows]: x @ weight.T, and the same of absolute values

  Case(Shape s, bool gated_, uint64_t seed)
      : shape(s),
        gated(gated_),
        rows(gated_ ? 2 * s.n : s.n),
        w_stride(s.k + 3),
        x_stride(s.k + 1),
        weight((rows - 1) * w_stride + s.k, narrow<T>(NOT_READ)),
        x((s.m - 1) * x_stride + s.k, narrow<T>(NOT_READ)),
        bias(rows),
        packed(kernels->packed_bytes(dtype_of<T>(), rows, s.k)) {
    Random random(seed);
    const float scale = 1 / std::sqrt(static_cast<float>(s.k));
    for (int64_t r = 0; r < rows; r++) {
      bias[r] = random.normal();
      for (int64_t c = 0; c < s.k; c++) weight[r * w_stride + c] = narrow<T>(random.normal() * scale);
    }
    for (int64_t r = 0; r < s.m; r++)
      for (int64_t c = 0; c < s.k; c++) x[r * x_stride + c] = narrow<T>(random.normal());
    for (int64_t i = 0; i < s.m; i++)
      for (int64_t r = 0; r < rows; r++) {
        double sum = 0, size = 0;
        for (int64_t c = 0; c < s.k; c++) {
          double term = static_cast<double>(widen(x[i * x_stride + c])) * widen(weight[r * w_stride + c]);
          sum += term;
          size += std::fabs(term);
        }
        sums.push_back(sum);
        sizes.push_back(size);
      }
  }

  void pack() {
    std::memset(packed.data(), 0xff, static_cast<size_t>(packed.size()));
    kernels->pack(dtype_of<T>(), weight.data(), w_stride, rows, shape.k, packed.data());
  }
};

template <class T>
void check_unpack(const Case<T>& c) {
  const int64_t k = c.shape.k;
  std::vector<int32_t> some = {static_cast<int32_t>(c.rows - 1), 0, static_cast<int32_t>(c.rows / 2), 0};
  for (bool all : {true, false}) {
    int64_t count = all ? c.rows : static_cast<int64_t>(some.size());
    Guarded<T> out(count * k);
    vc::Linear weight = {};
    weight.packed = c.packed.data(), weight.n = c.rows, weight.k = k, weight.dtype = dtype_of<T>();
    kernels->unpack_rows(&weight, all ? nullptr : some.data(), count, out.data());
    for (int64_t i = 0; i < count; i++) {
      int64_t row = all ? i : some[static_cast<size_t>(i)];
      check(!std::memcmp(&out[i * k], &c.weight[row * c.w_stride], static_cast<size_t>(k) * sizeof(T)),
            "unpack_rows: n %ld k %ld dtype %d row %ld", c.rows, k, dtype_of<T>(), row);
    }
  }
}

double activated(double gate, int epilogue) {
  if (epilogue == 1) return gate / (1 + std::exp(-gate));
  return 0.5 * gate * (1 + std::tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)));
}

template <class T, class Out>
void check_linear(const Case<T>& c, bool biased, int epilogue) {
  const Shape s = c.shape;
  Guarded<Out> out(s.m * s.n, narrow<Out>(NOT_READ));
  vc::Linear weight = {};
  weight.packed = c.packed.data(), weight.bias = biased ? c.bias.data() : nullptr;
  weight.n = weight.out_stride = s.n, weight.k = s.k;
  weight.dtype = dtype_of<T>(), weight.out_dtype = dtype_of<Out>(), weight.epilogue = epilogue;
  kernels->linear(&weight, c.x.data(), c.x_stride, out.data(), s.m);
  // A sum of k products in any order, each rounded: sqrt(k) roundings are usual, all k possible.
  const double noise = (4 + 2 * std::sqrt(static_cast<double>(s.k))) * unit<float>();
  for (int64_t i = 0; i < s.m; i++)
    for (int64_t j = 0; j < s.n; j++) {
      int64_t up = i * c.rows + j + (epilogue ? s.n : 0), gate = i * c.rows + j;
      double wanted = c.sums[up] + (biased ? c.bias[j + (epilogue ? s.n : 0)] : 0);
      double allowed = noise * (c.sizes[up] + std::fabs(wanted));
      if (epilogue) {
        double g = c.sums[gate] + (biased ? c.bias[j] : 0);
        double factor = activated(g, epilogue), g_noise = noise * (c.sizes[gate] + std::fabs(g));
        // both activations rise by at most 1.13 per unit; e^x is exact to about one unit
        allowed = allowed * std::fabs(factor) +
                  (1.2 * g_noise + 16 * unit<float>() * (std::fabs(factor) + 1)) * std::fabs(wanted);
        wanted *= factor;
      }
      allowed += unit<Out>() * 1.01 * (std::fabs(wanted) + allowed) + 1e-30;
      double got = widen(out[i * s.n + j]);
      check(std::fabs(got - wanted) <= allowed,
            "linear: m %ld n %ld k %ld dtype %d -> %d bias %d epilogue %d [%ld, %ld]: %.9g, "
            "not %.9g +- %.2g",
            s.m, s.n, s.k, dtype_of<T>(), dtype_of<Out>(), biased, epilogue, i, j, got, wanted, allowed);
    }
}

void check_all(const Case<float>& c, bool biased, int epilogue) {
  check_linear<float, float>(c, biased, epilogue);
}
void check_all(const Case<bf16>& c, bool biased, int epilogue) {
  check_linear<bf16, float>(c, biased, epilogue);
  check_linear<bf16, bf16>(c, biased, epilogue);
}

template <class T>
void check_shape(Shape shape, uint64_t seed) {
  for (bool gated : {false, true}) {
    if (gated && shape.n % 64) continue;
    Case<T> c(shape, gated, seed);
    with_teams([&] {
      c.pack();
      check_unpack(c);
      for (bool biased : {false, true})
        for (int epilogue : gated ? std::vector<int>{1, 2} : std::vector<int>{0})
          check_all(c, biased, epilogue);
    });
  }
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    std::vector<Shape> shapes;
    for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 97})
      for (int64_t n : {1, 63, 64, 65, 130})
        for (int64_t k : {1, 2, 71, 896})
          if (m < 14 ? !few || (m * n + k) % 5 == 0 : k == 71) shapes.push_back({m, n, k});
    shapes.push_back({7, 128, 5121});  // K is cut
    shapes.push_back({3, 320, 70});    // more panels than threads
    for (size_t i = 0; i < shapes.size(); i++) {
      check_shape<float>(shapes[i], i);
      check_shape<bf16>(shapes[i], i);
    }
  });
}
