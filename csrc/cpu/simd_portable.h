// Pairs of 16-byte vectors of the compiler's own kind, which it maps to what the target has.
// Read by simd.h, once.

namespace fastgen::FASTGEN_ISA_NS {

#define FASTGEN_EACH for (int i = 0; i < 2; ++i)

template <class T>
struct Part {
  typedef T type __attribute__((vector_size(16)));
};
template <class T>
using part_t = typename Part<T>::type;
template <class T>
using lane_mask_t = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

template <class T>
struct Mask {
  using Int = lane_mask_t<T>;
  static constexpr int width = 32 / sizeof(T);
  part_t<Int> m[2];
  static FASTGEN_INLINE Mask first(int n) {
    Int lanes[width];
    for (int i = 0; i < width; ++i) lanes[i] = i < n ? -1 : 0;
    Mask r;
    std::memcpy(r.m, lanes, sizeof(lanes));
    return r;
  }
  friend FASTGEN_INLINE Mask operator&(Mask a, Mask b) {
    FASTGEN_EACH a.m[i] &= b.m[i];
    return a;
  }
  friend FASTGEN_INLINE Mask operator|(Mask a, Mask b) {
    FASTGEN_EACH a.m[i] |= b.m[i];
    return a;
  }
  friend FASTGEN_INLINE Mask operator~(Mask a) {
    FASTGEN_EACH a.m[i] = ~a.m[i];
    return a;
  }
  bool any() const {
    const part_t<Int> either = m[0] | m[1];
    std::uint64_t words[2];
    std::memcpy(words, &either, sizeof(words));
    return (words[0] | words[1]) != 0;
  }
  unsigned bits() const {
    Int lanes[width];
    std::memcpy(lanes, m, sizeof(lanes));
    unsigned r = 0;
    for (int i = 0; i < width; ++i) r |= static_cast<unsigned>(lanes[i] & 1) << i;
    return r;
  }
};

// a < b ? a : b and a > b ? a : b. gcc does not find the instructions for them in the conditional expression.
#if defined(__x86_64__)
FASTGEN_INLINE part_t<float> least_of(part_t<float> a, part_t<float> b) { return _mm_min_ps(a, b); }
FASTGEN_INLINE part_t<float> greatest_of(part_t<float> a, part_t<float> b) { return _mm_max_ps(a, b); }
FASTGEN_INLINE part_t<double> least_of(part_t<double> a, part_t<double> b) { return _mm_min_pd(a, b); }
FASTGEN_INLINE part_t<double> greatest_of(part_t<double> a, part_t<double> b) { return _mm_max_pd(a, b); }
#else
template <class P>
FASTGEN_INLINE P least_of(P a, P b) {
  return a < b ? a : b;
}
template <class P>
FASTGEN_INLINE P greatest_of(P a, P b) {
  return a > b ? a : b;
}
#endif

template <class T>
struct Vec {
  using P = part_t<T>;
  using I = part_t<lane_mask_t<T>>;
  static constexpr int width = 32 / sizeof(T);
  P v[2];
  Vec() = default;
  FASTGEN_INLINE Vec(T s) {
    if constexpr (sizeof(T) == 4) {
      v[0] = v[1] = P{s, s, s, s};
    } else {
      v[0] = v[1] = P{s, s};
    }
  }
  static FASTGEN_INLINE Vec load(const T* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static FASTGEN_INLINE Vec load_n(const T* p, int n) {
    Vec r(T(0));
    std::memcpy(r.v, p, static_cast<std::size_t>(n) * sizeof(T));
    return r;
  }
  FASTGEN_INLINE void store(T* p) const { std::memcpy(p, v, sizeof(v)); }
  FASTGEN_INLINE void stream(T* p) const { store(p); }
  FASTGEN_INLINE void store_n(T* p, int n) const { std::memcpy(p, v, static_cast<std::size_t>(n) * sizeof(T)); }
#define FASTGEN_LANEWISE(NAME, EXPRESSION)                                                                        \
  friend FASTGEN_INLINE Vec NAME(Vec a, Vec b) {                                                                  \
    FASTGEN_EACH a.v[i] = EXPRESSION;                                                                             \
    return a;                                                                                                     \
  }
  FASTGEN_LANEWISE(operator+, a.v[i] + b.v[i])
  FASTGEN_LANEWISE(operator-, a.v[i] - b.v[i])
  FASTGEN_LANEWISE(operator*, a.v[i] * b.v[i])
  FASTGEN_LANEWISE(operator/, a.v[i] / b.v[i])
  FASTGEN_LANEWISE(min, least_of(a.v[i], b.v[i]))
  FASTGEN_LANEWISE(max, greatest_of(a.v[i], b.v[i]))
#undef FASTGEN_LANEWISE
  friend FASTGEN_INLINE Vec operator-(Vec a) {
    FASTGEN_EACH a.v[i] = -a.v[i];
    return a;
  }
  friend FASTGEN_INLINE Vec abs(Vec a) {
    FASTGEN_EACH a.v[i] =
        reinterpret_cast<P>(reinterpret_cast<I>(a.v[i]) & ~reinterpret_cast<I>(Vec(T(-0.0)).v[i]));
    return a;
  }
  friend FASTGEN_INLINE Vec sqrt(Vec a) {
    for (int i = 0; i < width; ++i)
      a.v[i * 2 / width][i % (width / 2)] = std::sqrt(a.v[i * 2 / width][i % (width / 2)]);
    return a;
  }
#define FASTGEN_LANEWISE(NAME, EXPRESSION)                                                                        \
  friend FASTGEN_INLINE Mask<T> NAME(Vec a, Vec b) {                                                              \
    Mask<T> r;                                                                                                    \
    FASTGEN_EACH r.m[i] = reinterpret_cast<I>(EXPRESSION);                                                        \
    return r;                                                                                                     \
  }
  FASTGEN_LANEWISE(operator<, a.v[i] < b.v[i])
  FASTGEN_LANEWISE(operator<=, a.v[i] <= b.v[i])
  FASTGEN_LANEWISE(operator==, a.v[i] == b.v[i])
#undef FASTGEN_LANEWISE
  friend FASTGEN_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  friend FASTGEN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
  friend FASTGEN_INLINE Mask<T> is_nan(Vec a) { return ~(a == a); }
  friend FASTGEN_INLINE Vec select(Mask<T> m, Vec a, Vec b) {
    FASTGEN_EACH a.v[i] =
        reinterpret_cast<P>((m.m[i] & reinterpret_cast<I>(a.v[i])) | (~m.m[i] & reinterpret_cast<I>(b.v[i])));
    return a;
  }
};

struct Words {
  using P = part_t<std::uint32_t>;
  static constexpr int width = Vec<float>::width;
  P v[2];
  Words() = default;
  FASTGEN_INLINE Words(std::uint32_t s) { v[0] = v[1] = P{s, s, s, s}; }
  static FASTGEN_INLINE Words load(const std::uint32_t* p) {
    Words r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  FASTGEN_INLINE void store(std::uint32_t* p) const { std::memcpy(p, v, sizeof(v)); }
#define FASTGEN_LANEWISE(OPERATOR)                                                                                \
  friend FASTGEN_INLINE Words operator OPERATOR(Words a, Words b) {                                               \
    FASTGEN_EACH a.v[i] = a.v[i] OPERATOR b.v[i];                                                                 \
    return a;                                                                                                     \
  }
  FASTGEN_LANEWISE(+)
  FASTGEN_LANEWISE(-)
  FASTGEN_LANEWISE(&)
  FASTGEN_LANEWISE(|)
  FASTGEN_LANEWISE(^)
#undef FASTGEN_LANEWISE
  template <int N>
  FASTGEN_INLINE Words shl() const {
    Words r;
    FASTGEN_EACH r.v[i] = v[i] << N;
    return r;
  }
  template <int N>
  FASTGEN_INLINE Words shr() const {
    Words r;
    FASTGEN_EACH r.v[i] = v[i] >> N;
    return r;
  }
  FASTGEN_INLINE Words sign() const {
    Words r;
    FASTGEN_EACH r.v[i] = reinterpret_cast<P>(reinterpret_cast<part_t<std::int32_t>>(v[i]) >> 31);
    return r;
  }
};
FASTGEN_INLINE Words bits(Vec<float> a) {
  Words r;
  FASTGEN_EACH r.v[i] = reinterpret_cast<Words::P>(a.v[i]);
  return r;
}
FASTGEN_INLINE Vec<float> as_float(Words a) {
  Vec<float> r;
  FASTGEN_EACH r.v[i] = reinterpret_cast<part_t<float>>(a.v[i]);
  return r;
}
FASTGEN_INLINE Vec<float> int_to_float(Words a) {
  Vec<float> r;
  FASTGEN_EACH r.v[i] = __builtin_convertvector(reinterpret_cast<part_t<std::int32_t>>(a.v[i]), part_t<float>);
  return r;
}
FASTGEN_INLINE Vec<float> select_sign(Words m, Vec<float> a, Vec<float> b) {
  Mask<float> negative;
  FASTGEN_EACH negative.m[i] = reinterpret_cast<part_t<std::int32_t>>(m.sign().v[i]);
  return select(negative, a, b);
}

struct WideWords {
  using P = part_t<std::uint64_t>;
  static constexpr int width = Words::width / 2;
  P v[2];
  WideWords() = default;
  FASTGEN_INLINE WideWords(std::uint64_t s) { v[0] = v[1] = P{s, s}; }
  static FASTGEN_INLINE WideWords load(const std::uint64_t* p) {
    WideWords r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  FASTGEN_INLINE WideWords high() const {
    WideWords r;
    FASTGEN_EACH r.v[i] = v[i] >> 32;
    return r;
  }
  friend FASTGEN_INLINE WideWords operator+(WideWords a, WideWords b) {
    FASTGEN_EACH a.v[i] += b.v[i];
    return a;
  }
  friend FASTGEN_INLINE WideWords xor3(WideWords a, WideWords b, WideWords c) {
    FASTGEN_EACH a.v[i] ^= b.v[i] ^ c.v[i];
    return a;
  }
  friend FASTGEN_INLINE WideWords mul_low(WideWords a, WideWords b) {
#if defined(__x86_64__)
    FASTGEN_EACH a.v[i] =
        reinterpret_cast<P>(_mm_mul_epu32(reinterpret_cast<__m128i>(a.v[i]), reinterpret_cast<__m128i>(b.v[i])));
#else
    FASTGEN_EACH a.v[i] = (a.v[i] & 0xffffffffu) * (b.v[i] & 0xffffffffu);
#endif
    return a;
  }
  friend FASTGEN_INLINE Words interleave_low(WideWords even, WideWords odd) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half of a 64-bit lane must come first");
    Words r;
    FASTGEN_EACH r.v[i] = reinterpret_cast<Words::P>((even.v[i] & 0xffffffffu) | (odd.v[i] << 32));
    return r;
  }
};
#if defined(__x86_64__)
FASTGEN_INLINE void transpose4(Words (&w)[4]) {
  FASTGEN_EACH {
    __m128 row[4];
    for (int j = 0; j < 4; ++j) row[j] = reinterpret_cast<__m128>(w[j].v[i]);
    _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
    for (int j = 0; j < 4; ++j) w[j].v[i] = reinterpret_cast<Words::P>(row[j]);
  }
}
#else
FASTGEN_INLINE void transpose4(Words (&w)[4]) {
  std::uint32_t lanes[4][Words::width];
  for (int j = 0; j < 4; ++j) w[j].store(lanes[j]);
  for (int block = 0; block < Words::width; block += 4) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) std::swap(lanes[i][block + j], lanes[j][block + i]);
    }
  }
  for (int j = 0; j < 4; ++j) w[j] = Words::load(lanes[j]);
}
#endif
FASTGEN_INLINE Vec<double> low_half(Vec<float> a) {
  double lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = static_cast<double>(a.v[0][i]);
  return Vec<double>::load(lanes);
}
FASTGEN_INLINE Vec<double> high_half(Vec<float> a) {
  double lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = static_cast<double>(a.v[1][i]);
  return Vec<double>::load(lanes);
}

template <class H>
FASTGEN_INLINE Vec<float> load(const H* p) {
  float lanes[Vec<float>::width];
  for (int i = 0; i < Vec<float>::width; ++i) lanes[i] = static_cast<float>(p[i]);
  return Vec<float>::load(lanes);
}
template <class H>
FASTGEN_INLINE void store(H* p, Vec<float> a) {
  float lanes[Vec<float>::width];
  a.store(lanes);
  for (int i = 0; i < Vec<float>::width; ++i) p[i] = static_cast<H>(lanes[i]);
}

#undef FASTGEN_EACH

inline void stream_end() {}

}  // namespace fastgen::FASTGEN_ISA_NS
