// What every element of a codebook goes through in Packing, for one instruction set.

namespace fastgen::FASTGEN_ISA_NS {

// Sets out[k] for codes that are not finite, and hashes[k] to a hash of the values of the others.
template <class T>
void hash_codes(const T* codes, std::int64_t first, std::int64_t last, std::int64_t size, std::uint32_t* hashes,
                char* out) {
  using V = Vec<T>;
  static_assert(sizeof(T) * V::width == sizeof(std::uint32_t) * Words::width);
  for (std::int64_t k = first; k < last; ++k) {
    const T* code = codes + k * size;
    Words hash(std::uint32_t{0});
    V finite(T(0));
    for (std::int64_t j = 0; j < size; j += V::width) {
      // Adding zero turns -0 into 0, which it equals.
      const V x = load_lanes(code + j, static_cast<int>(std::min<std::int64_t>(V::width, size - j))) + V(T(0));
      std::uint32_t words[Words::width];
      T lanes[V::width];
      store(lanes, x);
      std::memcpy(words, lanes, sizeof(words));
      hash = hash.template shl<5>() + hash + Words::load(words);
      // Zero, or NaN from then on.
      finite = finite + (x - x);
    }
    std::uint32_t words[Words::width];
    hash.store(words);
    std::uint64_t mixed = 0;
    for (const std::uint32_t word : words) mixed = (mixed ^ word) * 0x9E3779B97F4A7C15u;
    hashes[k] = static_cast<std::uint32_t>(mixed >> 32);
    out[k] = sum(finite) == T(0) ? 0 : 1;
  }
}

template <class T>
void centre_codes(const CentreCodes<T>& a, std::int64_t first, std::int64_t last) {
  using V = Vec<T>;
  const T infinite = std::numeric_limits<T>::infinity();
  for (std::int64_t k = first; k < last; ++k) {
    T* c = a.centred + k * a.size;
    a.penalty[k] = a.out[k] ? infinite : T(0);
    if (a.out[k]) {
      std::fill_n(c, a.size, T(0));
      a.start[k] = infinite;
      a.length[k] = T(0);
      continue;
    }
    const V factor(a.cosine ? T(-1) : T(-2));
    V squares(T(0));
    for (std::int64_t j = 0; j < a.size; j += V::width) {
      const int n = static_cast<int>(std::min<std::int64_t>(V::width, a.size - j));
      const V x = factor * (load_lanes(a.codes + k * a.size + j, n) - load_lanes(a.centre + j, n));
      squares = fma(x, x, squares);
      store_lanes(c + j, x, n);
    }
    const T square = sum(squares);
    a.start[k] = a.cosine ? T(0) : square / 4;
    a.length[k] = std::isfinite(square) ? length_of(square, a.size) : infinite;
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
