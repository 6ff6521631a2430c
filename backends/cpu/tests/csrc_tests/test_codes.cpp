// quantize, pack_codes, unpack_rows and linear of weights in codes against sums in double: groups,
// mins, both kinds of inputs, gates.
#include "check.h"

using namespace vc_test;

namespace {

struct Shape {
  int64_t m, n, k, group;
  int bits;
  bool mins;
};

template <class T>
struct Case {
  Shape s;
  int64_t groups, rows;
  Guarded<uint8_t> codes;
  Guarded<float> scales, mins, bias;
  Guarded<T> x;
  std::vector<float> values;  // [rows][k]

  Case(Shape shape, int64_t rows_, uint64_t seed)
      : s(shape), groups(s.k / s.group), rows(rows_), codes(rows * s.k), scales(rows * groups),
        mins(rows * groups), bias(rows), x((s.m - 1) * (s.k + 1) + s.k, narrow<T>(std::nanf(""))) {
    Random random(seed);
    for (int64_t i = 0; i < rows * s.k; i++) codes[i] = static_cast<uint8_t>(random.below(1 << s.bits));
    for (int64_t i = 0; i < rows * groups; i++) {
      scales[i] = random.normal() / static_cast<float>(1 << s.bits);
      mins[i] = random.normal();
    }
    for (int64_t i = 0; i < rows; i++) bias[i] = random.normal();
    for (int64_t r = 0; r < s.m; r++)
      for (int64_t c = 0; c < s.k; c++) x[r * (s.k + 1) + c] = narrow<T>(r == 1 ? 0 : random.normal());
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < s.k; c++) {
        const int64_t at = r * groups + c / s.group;
        volatile float product = scales[at] * static_cast<float>(codes[r * s.k + c] - (s.mins ? 0 : 1 << (s.bits - 1)));
        values.push_back(s.mins ? product + mins[at] : product);
      }
  }
};

// The inputs of a row as codes stand for them.
template <class T>
std::vector<double> quantised(const Case<T>& c, int64_t row) {
  const Shape s = c.s;
  const int64_t group = s.group < 32 && s.k % 32 == 0 ? 32 : s.group;
  std::vector<double> out;
  for (int64_t from = 0; from < s.k; from += group) {
    float amax = 0;
    for (int64_t i = from; i < from + group; i++) amax = std::fmax(amax, std::fabs(widen(c.x[row * (s.k + 1) + i])));
    const float scale = amax / 127.0f, factor = amax > 0 ? 127.0f / amax : 0;
    for (int64_t i = from; i < from + group; i++) {
      volatile float y = widen(c.x[row * (s.k + 1) + i]) * factor;
      out.push_back(std::nearbyintf(y) * static_cast<double>(scale));
    }
  }
  return out;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

template <class T, class Out>
void check_linear(const Case<T>& c, vc::Linear weight, bool wide, bool gated) {
  const Shape s = c.s;
  const int64_t n = gated ? c.rows / 2 : c.rows, stride = n + 3;
  Guarded<Out> out((s.m - 1) * stride + n, narrow<Out>(std::nanf("")));
  weight.n = n, weight.out_stride = stride, weight.wide_inputs = wide, weight.epilogue = gated;
  weight.out_dtype = dtype_of<Out>();
  kernels->linear(&weight, c.x.data(), s.k + 1, out.data(), s.m);
  // a sum of k products in float32, and mins that meet a sum of codes
  const double noise = (8 + 2 * std::sqrt(static_cast<double>(s.k))) * unit<float>();
  for (int64_t i = 0; i < s.m; i++) {
    std::vector<double> inputs = quantised(c, i);
    if (wide)
      for (int64_t k = 0; k < s.k; k++) inputs[static_cast<size_t>(k)] = widen(c.x[i * (s.k + 1) + k]);
    const auto sum = [&](int64_t row, double* size) {
      double total = weight.bias ? c.bias[row] : 0;
      *size = std::fabs(total);
      for (int64_t k = 0; k < s.k; k++) {
        const float value = c.values[static_cast<size_t>(row * s.k + k)];
        const double term = inputs[static_cast<size_t>(k)] * (wide ? widen(narrow<T>(value)) : value);
        total += term, *size += std::fabs(term) + (s.mins ? std::fabs(inputs[static_cast<size_t>(k)]) : 0);
      }
      return total;
    };
    for (int64_t j = 0; j < n; j++) {
      double size, gate_size, wanted = sum(j + (gated ? n : 0), &size), allowed = noise * (size + std::fabs(wanted));
      if (gated) {
        const double gate = sum(j, &gate_size), factor = silu(gate);
        allowed = allowed * std::fabs(factor) + (1.2 * noise * (gate_size + std::fabs(gate)) + 16 * unit<float>() * (1 + std::fabs(factor))) * std::fabs(wanted);
        wanted *= factor;
      }
      allowed += unit<Out>() * 1.01 * (std::fabs(wanted) + allowed) + 1e-30;
      const double got = widen(out[i * stride + j]);
      check(std::fabs(got - wanted) <= allowed,
            "linear of codes: m %ld n %ld k %ld group %ld bits %d mins %d dtype %d -> %d wide %d gated %d [%ld, %ld]: "
            "%.9g, not %.9g +- %.2g",
            s.m, n, s.k, s.group, s.bits, s.mins, dtype_of<T>(), dtype_of<Out>(), wide, gated, i, j, got, wanted, allowed);
    }
  }
}

template <class T>
void check_shape(Shape s, uint64_t seed) {
  const Case<T> c(s, s.n, seed);
  Guarded<char> packed(kernels->packed_code_bytes(s.bits, s.n, s.k), 0x7f);
  const int64_t lanes = (s.n + 63) / 64 * 64 * c.groups;
  Guarded<float> scales(lanes, std::nanf("")), mins(lanes, std::nanf(""));
  with_teams([&] {
    vc::Codes codes = {c.codes.data(), c.scales.data(), s.mins ? c.mins.data() : nullptr, s.n, s.k, s.group, s.bits};
    kernels->pack_codes(&codes, packed.data(), scales.data(), s.mins ? mins.data() : nullptr);
    vc::Linear weight = {};
    weight.packed = packed.data(), weight.scales = scales.data(), weight.mins = s.mins ? mins.data() : nullptr;
    weight.n = s.n, weight.k = s.k, weight.group = s.group, weight.bits = s.bits, weight.dtype = dtype_of<T>();
    Guarded<T> rows(s.n * s.k);
    kernels->unpack_rows(&weight, nullptr, s.n, rows.data());
    for (int64_t i = 0; i < s.n * s.k; i++)
      check(widen(rows[i]) == widen(narrow<T>(c.values[static_cast<size_t>(i)])),
            "unpack_rows of codes: n %ld k %ld group %ld bits %d mins %d dtype %d at %ld: %.9g, not %.9g", s.n, s.k,
            s.group, s.bits, s.mins, dtype_of<T>(), i, widen(rows[i]), c.values[static_cast<size_t>(i)]);
    for (bool wide : {false, true})
      for (bool gated : {false, true}) {
        if (gated && s.n % 128) continue;
        weight.bias = gated ? c.bias.data() : nullptr;
        check_linear<T, float>(c, weight, wide, gated);
        if (sizeof(T) == 2) check_linear<T, T>(c, weight, wide, gated);
      }
  });
}

// A weight's codes are as near as codes can be.
template <class T>
void check_quantize(int bits, int64_t k, int64_t group) {
  Random random(static_cast<uint64_t>(bits + k));
  const int64_t n = 9, groups = k / group;
  Guarded<T> weight(n * k);
  for (int64_t i = 0; i < n * k; i++) weight[i] = narrow<T>(i / k == 3 ? 0 : random.normal());
  Guarded<uint8_t> codes(n * k);
  Guarded<float> scales(n * groups);
  vc::Codes shape = {nullptr, nullptr, nullptr, n, k, group, bits};
  const int zero = 1 << (bits - 1);
  check(kernels->quantize(dtype_of<T>(), weight.data(), &shape, codes.data(), scales.data()) == 1, "quantize: finite");
  for (int64_t i = 0; i < n * k; i++) {
    const double scale = scales[i / k * groups + i % k / group], value = scale * (codes[i] - zero);
    const double wrong = std::fabs(value - widen(weight[i])), step = std::fabs(scale);
    // 4 bits: codes reach 7 steps up, and numbers 9
    check(wrong <= step * (bits == 8 ? 0.501 : 2.001) && (codes[i] == zero || step > 0),
          "quantize: bits %d dtype %d at %ld: %.6g, not %.6g", bits, dtype_of<T>(), i, value, widen(weight[i]));
  }
  weight[k + 1] = narrow<T>(std::nanf(""));
  check(kernels->quantize(dtype_of<T>(), weight.data(), &shape, codes.data(), scales.data()) == 0, "quantize: NaN");
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    uint64_t seed = 0;
    for (int bits : {8, 4})
      for (bool mins : {false, true})
        for (Shape s : {Shape{1, 70, 128, 128, 0, 0}, Shape{2, 128, 256, 32, 0, 0}, Shape{6, 64, 160, 32, 0, 0},
                        Shape{7, 65, 64, 16, 0, 0}, Shape{8, 128, 896, 128, 0, 0}, Shape{13, 130, 192, 64, 0, 0},
                        Shape{97, 64, 64, 32, 0, 0}, Shape{3, 256, 75, 75, 0, 0}, Shape{25, 64, 520, 520, 0, 0}}) {
          s.bits = bits, s.mins = mins, seed++;
          if (few && s.m > 8 && seed % 3) continue;
          check_shape<float>(s, seed);
          check_shape<bf16>(s, seed);
        }
    for (int bits : {8, 4})
      for (int64_t group : {32, 64, 128}) check_quantize<float>(bits, 384, group), check_quantize<bf16>(bits, 384, group);
  });
}
