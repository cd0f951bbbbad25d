// Vectors of one instruction set and functions of them. Part of simd_kernels.inl.
#define FASTCL_MEMBER inline __attribute__((always_inline))
#define FASTCL_INLINE static FASTCL_MEMBER

namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

template <typename T>
struct Float;

// kExp2: weighted minimax fit of 2^f on [-1/2, 1/2], relative error 2.6e-9 (float) and 1.8e-17
// (double), below the rounding of the evaluation.
// kAtanh: Q of atanh(t) = t + t z Q(z), z = t^2 in [0, 1/9], fitted at the Chebyshev points:
// relative error 3.9e-10 and 1.3e-19.
// kLn2High has so few digits that its product with an exponent is exact; kLn2Low is the rest.
template <>
struct Float<float> {
  typedef float V __attribute__((vector_size(FASTCL_SIMD_BYTES)));
  typedef uint32_t U __attribute__((vector_size(FASTCL_SIMD_BYTES)));
  static constexpr int kMantissa = 23;
  static constexpr uint32_t kBias = 127;
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kMinExponent = -126.f;
  static constexpr int kDegree = 6;
  static constexpr float kExp2[kDegree + 1] = {
      1.f,
      0.69314721496802789f,
      0.24022652782887737f,
      0.05550310551013797f,
      0.00961769297297306f,
      0.00134066439023518f,
      0.00015594678161327f,
  };
  static constexpr float kLn2High = 0x1.63p-1f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr int kAtanhTerms = 5;
  static constexpr float kAtanh[kAtanhTerms] = {
      0.33333333660263706f, 0.19999853165964859f, 0.14296178997151419f,
      0.10853287900440186f, 0.11612164612011674f,
  };
};

template <>
struct Float<double> {
  typedef double V __attribute__((vector_size(FASTCL_SIMD_BYTES)));
  typedef uint64_t U __attribute__((vector_size(FASTCL_SIMD_BYTES)));
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kMinExponent = -1022.;
  static constexpr int kDegree = 11;
  static constexpr double kExp2[kDegree + 1] = {
      1.,
      0.69314718055994569675,
      0.24022650695910098007,
      0.055504108664790394552,
      0.0096181291076070023796,
      0.0013333558153439964747,
      0.0001540353044157213033,
      0.000015252727385193868197,
      1.3215442675329822143e-6,
      1.0180647659234138888e-7,
      7.0725704128144235096e-9,
      4.078071929588336665e-10,
  };
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kAtanhTerms = 11;
  static constexpr double kAtanh[kAtanhTerms] = {
      0.33333333333333333,  0.19999999999999761,  0.1428571428580005,   0.11111111099118385,
      0.090909099489813572, 0.076922719824302746, 0.066675893157246279, 0.058671395306515987,
      0.054225891974400074, 0.037460718977753837, 0.078152889004614252,
  };
};

template <typename T>
using Vec = typename Float<T>::V;
template <typename T>
using Bits = typename Float<T>::U;
template <typename T>
constexpr int64_t kLanes = FASTCL_SIMD_BYTES / sizeof(T);

template <typename T>
FASTCL_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
FASTCL_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
FASTCL_INLINE Bits<T> load_ids(const Id<T>* p) {
  Bits<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
FASTCL_INLINE void store_ids(Id<T>* p, Bits<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
FASTCL_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <typename T>
FASTCL_INLINE T horizontal_sum(Vec<T> v) {
  T lane[kLanes<T>];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) lane[k] += lane[k + width];
  }
  return lane[0];
}

template <typename T, typename V>
FASTCL_INLINE Bits<T> bits(V v) {
  static_assert(sizeof(V) == sizeof(Bits<T>));
  Bits<T> b;
  __builtin_memcpy(&b, &v, sizeof(b));
  return b;
}

// x where the mask (all ones or all zeros in a lane) is set, 0 elsewhere, whatever x is there.
template <typename T, typename Mask>
FASTCL_INLINE Vec<T> keep(Mask mask, Vec<T> x) {
  const Bits<T> kept = bits<T>(mask) & bits<T>(x);
  Vec<T> result;
  __builtin_memcpy(&result, &kept, sizeof(result));
  return result;
}

// 2^(n + f) of the integer n = rounded - kRound, 0 where t, which n + f comes from, is under the
// normal range. NaN stays NaN.
template <typename T>
FASTCL_INLINE Vec<T> power(Vec<T> rounded, Vec<T> f, Vec<T> t) {
  using F = Float<T>;
  Vec<T> p = splat<T>(F::kExp2[F::kDegree]);
#pragma GCC unroll 16
  for (int k = F::kDegree - 1; k >= 0; --k) p = p * f + F::kExp2[k];
  const Bits<T> exponent = (bits<T>(rounded) + F::kBias) << F::kMantissa;
  Vec<T> scale;
  __builtin_memcpy(&scale, &exponent, sizeof(scale));
  // -inf gives 0 although its polynomial is NaN, and NaN is not hidden.
  return keep<T>(~bits<T>(t < F::kMinExponent), p * scale);
}

// 2^t for t below the largest exponent. Results under the normal range are 0; NaN stays NaN.
template <typename T>
FASTCL_INLINE Vec<T> exp2(Vec<T> t) {
  // Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits.
  const Vec<T> rounded = t + Float<T>::kRound;
  return power<T>(rounded, t - (rounded - Float<T>::kRound), t);
}

// e^y; the product with log2(e) is rounded, which is harmless for the small |y| whose e^y matters.
template <typename T>
FASTCL_INLINE Vec<T> exp(Vec<T> y) {
  return exp2<T>(y * static_cast<T>(kLog2E));
}

// e^y with the digits of log2(e) that a rounded product loses: right where y is large, too.
template <typename T>
FASTCL_INLINE Vec<T> exp_exact(Vec<T> y) {
  using F = Float<T>;
  const Vec<T> t = y * static_cast<T>(kLog2E);
  const Vec<T> rounded = t + F::kRound;
  const Vec<T> n = rounded - F::kRound;
  const Vec<T> rest = (y - n * F::kLn2High) - n * F::kLn2Low;
  return power<T>(rounded, rest * static_cast<T>(kLog2E), t);
}

// softplus and its slope, the sigmoid, from one exponential e^-|x|; both are 0 of -inf.
template <typename T>
struct Softplus {
  Vec<T> x, e;

  FASTCL_INLINE Softplus of(Vec<T> x) { return {x, exp_exact<T>(x < 0 ? x : -x)}; }

  // max(x, 0) + log(1 + e), with log(1 + e) = 2 atanh(e / (2 + e)).
  FASTCL_MEMBER Vec<T> value() const {
    using F = Float<T>;
    const Vec<T> t = e / (e + 2);
    const Vec<T> z = t * t;
    Vec<T> q = splat<T>(F::kAtanh[F::kAtanhTerms - 1]);
#pragma GCC unroll 16
    for (int k = F::kAtanhTerms - 2; k >= 0; --k) q = q * z + F::kAtanh[k];
    return keep<T>(x > 0, x) + 2 * (t + t * (z * q));
  }

  FASTCL_MEMBER Vec<T> slope() const { return (x < 0 ? e : splat<T>(1)) / (e + 1); }
};

}  // namespace
}  // namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE
