// Exact nearest-code search over one block of rows, for one instruction set; see vq_nearest.cpp.

namespace fastgen::FASTGEN_ISA_NS {

// Rows a tile: as many as leave registers for one panel row. With few dimensions the running minima cost as much
// as the products, so there the tile is small enough to keep them in registers too.
#if defined(FASTGEN_SIMD_AVX512)
constexpr int kTileRows = 12, kShallowTileRows = 4;
#elif defined(FASTGEN_SIMD_AVX2)
constexpr int kTileRows = 6, kShallowTileRows = 2;
#else
constexpr int kTileRows = 2, kShallowTileRows = 2;
#endif
static_assert(kTileRows <= kMaxTileRows && kMaxTileRows % kTileRows == 0 && kMaxTileRows % kShallowTileRows == 0);
constexpr std::int64_t kShallow = 16;

// The part of the packed codebook that is scored against all rows of a block before the next: it stays in L2.
constexpr std::int64_t kChunkBytes = 256 * 1024;

template <class T>
std::int64_t panel_width() {
  return 2 * Vec<T>::width;
}

template <class S>
void read_rows(const ReadRows<S>& a) {
  using T = acc_t<S>;
  const Tokens& t = *a.tokens;
  for (std::int64_t i = 0; i < a.count; ++i) {
    const S* row = a.x + t.offset(a.head, a.first + i);
    T* out = a.out + i * t.size;
    if (t.element_stride != 1) {
      for (std::int64_t j = 0; j < t.size; ++j) out[j] = static_cast<T>(row[j * t.element_stride]);
      continue;
    }
    std::int64_t j = 0;
    for (; j + Vec<T>::width <= t.size; j += Vec<T>::width) store(out + j, load(row + j));
    const int rest = static_cast<int>(t.size - j);
    if (rest > 0) store_n(out + j, load_n(row + j, rest), rest);
  }
}

// The float64 key that defines the answer, from the sum of the terms below in order, as in the reference.
template <class T>
inline double key_of_sum(const PackedCodes<T>& c, double sum, std::int64_t k) {
  if (!c.cosine) return sum;
  return c.square[k] == 0 ? 0 : -sum * std::fabs(sum) / c.square[k];
}

// V is double or a vector of it. No fma: the reference has none.
template <bool kCosine, class V>
inline V add_term(V sum, V x, V e) {
  if constexpr (kCosine) return sum + x * e;
  const V difference = x - e;
  return sum + difference * difference;
}

template <bool kCosine, class T>
double sum_of_terms(const T* row, const T* code, std::int64_t size) {
  double sum = 0;
  for (std::int64_t j = 0; j < size; ++j) {
    sum = add_term<kCosine>(sum, static_cast<double>(row[j]), static_cast<double>(code[j]));
  }
  return sum;
}

template <class T>
double exact_key(const PackedCodes<T>& c, const T* row, std::int64_t k) {
  const T* code = c.codes + k * c.size;
  const double sum = c.cosine ? sum_of_terms<true>(row, code, c.size) : sum_of_terms<false>(row, code, c.size);
  return key_of_sum(c, sum, k);
}

template <class T>
T exact_distance(const PackedCodes<T>& c, const T* row, std::int64_t k) {
  const double key = exact_key(c, row, k);
  if (!c.cosine) return static_cast<T>(key);
  double square = 0;
  for (std::int64_t j = 0; j < c.size; ++j) square += static_cast<double>(row[j]) * static_cast<double>(row[j]);
  const double cosine = square == 0 ? 0 : std::copysign(std::sqrt(std::fabs(key) / square), -key);
  // Written so that NaN stays.
  return static_cast<T>(cosine > 1 ? 0 : 2 - 2 * cosine);
}

struct Nearest {
  double key = std::numeric_limits<double>::infinity();
  std::int64_t index = 0;

  // In ascending order of k, so that the lowest index wins ties.
  void offer(double candidate, std::int64_t k) {
    if (candidate < key && candidate > -std::numeric_limits<double>::infinity()) {
      key = candidate;
      index = k;
    }
  }
};

// Centres `count` rows and gives an upper bound of their lengths. Missing rows of the last tile are zero.
template <class T, int R>
void centre_rows(const PackedCodes<T>& c, const T* rows, std::int64_t count, T* centred, T* norms) {
  using V = Vec<T>;
  const T rounding = T(1) + static_cast<T>(c.size + 8) * std::numeric_limits<T>::epsilon();
  const T underflow = static_cast<T>(c.size) * std::numeric_limits<T>::min();
  for (std::int64_t i = 0; i < count; ++i) {
    const T* row = rows + i * c.size;
    T* out = centred + i * c.size;
    V squares(T(0));
    std::int64_t j = 0;
    for (; j + V::width <= c.size; j += V::width) {
      const V x = load(row + j) - load(c.mean + j);
      squares = fma(x, x, squares);
      store(out + j, x);
    }
    if (j < c.size) {
      const int n = static_cast<int>(c.size - j);
      const V x = load_n(row + j, n) - load_n(c.mean + j, n);
      squares = fma(x, x, squares);
      store_n(out + j, x, n);
    }
    norms[i] = std::sqrt(sum(squares) + underflow) * rounding;
  }
  std::fill_n(centred + count * c.size, ((count + R - 1) / R * R - count) * c.size, T(0));
}

// Scores of R rows against one panel: low for its first vector of codes, high for its second.
template <class T, int R>
inline void score_panel(const T* tile, const T* panel, const T* start, std::int64_t size, Vec<T> (&low)[R],
                        Vec<T> (&high)[R]) {
  using V = Vec<T>;
  const V start_low = load(start), start_high = load(start + V::width);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    low[i] = start_low;
    high[i] = start_high;
  }
  for (std::int64_t j = 0; j < size; ++j) {
    const V code_low = load(panel), code_high = load(panel + V::width);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const V x = V(tile[i * size]);
      low[i] = fma(x, code_low, low[i]);
      high[i] = fma(x, code_high, high[i]);
    }
    panel += 2 * V::width;
    ++tile;
  }
}

template <class T>
inline void keep_least(Vec<T> score, T vector, Vec<T>& best, Vec<T>& second, Vec<T>& index) {
  second = min(second, max(best, score));
  index = select(score < best, Vec<T>(vector), index);
  best = min(score, best);
}

// Scores a tile against panels [first, last). lanes: per row the best scores, the second best and the number of
// the vector of codes that holds the best, one of each a lane.
template <class T, int R>
void scan_panels(const PackedCodes<T>& c, const T* tile, std::int64_t first, std::int64_t last, T* lanes) {
  using V = Vec<T>;
  constexpr int w = V::width;
  V best[R], second[R], index[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    best[i] = load(lanes + (3 * i) * w);
    second[i] = load(lanes + (3 * i + 1) * w);
    index[i] = load(lanes + (3 * i + 2) * w);
  }
  for (std::int64_t p = first; p < last; ++p) {
    V low[R], high[R];
    score_panel<T, R>(tile, c.panels + p * 2 * w * c.size, c.start + p * 2 * w, c.size, low, high);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      keep_least(low[i], static_cast<T>(2 * p), best[i], second[i], index[i]);
      keep_least(high[i], static_cast<T>(2 * p + 1), best[i], second[i], index[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    store(lanes + (3 * i) * w, best[i]);
    store(lanes + (3 * i + 1) * w, second[i]);
    store(lanes + (3 * i + 2) * w, index[i]);
  }
}

// How far apart the scores of two codes must be for their order to be certain, for a row of length at most x.
//
// With u the unit roundoff of T: centring moves each of x, e by at most u times its length; the score then is size
// products and additions, each wrong by a factor of at most 1 + u. So a score is within (size + 8) u (e^2 + 2 x e)
// of its exact value, where e is the length of the longest code that matters. Two more terms cover the float64
// keys that the order is defined by, and underflow. All are rounded up to 1.01.
template <class T>
struct CertainGap {
  const PackedCodes<T>& codes;
  double slack, key, underflow;
  double longest_row;                // above, scores could overflow
  double shortest_row;               // below, keys could underflow
  double at_zero, slope, curvature;  // of the gap as a function of x, for e = codes.reach

  explicit CertainGap(const PackedCodes<T>& c) : codes(c) {
    const double size = static_cast<double>(c.size), most = std::numeric_limits<T>::max() / 64;
    slack = 1.01 * (size + 12) * std::numeric_limits<T>::epsilon() / 2;
    key = 1.01 * (size + 8) * std::numeric_limits<double>::epsilon();
    underflow = 16 * size * std::numeric_limits<T>::min();
    const bool usable = slack < 0.01 && c.reach * c.reach < most;
    longest_row = usable ? std::min(std::sqrt(most), most / c.reach) : -1;
    shortest_row = c.cosine ? kSafeLength : 0;
    const double e = c.reach;
    at_zero = 2 * (c.cosine ? underflow * (1 + e) : (slack + key) * e * e + underflow * (1 + e));
    slope = 2 * (2 * slack * e + underflow + (c.cosine ? key : 2 * key * e));
    curvature = c.cosine ? 0 : 2 * key;
  }

  bool covers(double x) const { return x <= longest_row && x >= shortest_row; }

  double operator()(double x) const { return at_zero + x * (slope + x * curvature); }

  // A smaller one where long codes are far from the row: a code longer than x + sqrt(best distance) is farther
  // than the best one whatever its score.
  double refined(double x, double best) const {
    if (codes.cosine) return (*this)(x);
    const double distance = std::max(0.0, x * x + best + (*this)(x));
    const double e = std::min(codes.reach, 1.001 * (x + std::sqrt(distance)));
    return 2 * (slack * (e * e + 2 * x * e) + key * (x + e) * (x + e) + underflow * (1 + x + e));
  }
};

// What the lanes of a row prove: its code, or that all codes that score up to `limit` must be compared by their
// keys, or, where that is infinite, all codes.
template <class T>
struct Verdict {
  std::int64_t index;
  T limit;
};

template <class T>
Verdict<T> settle(const CertainGap<T>& gap, const T* lanes, T norm) {
  using V = Vec<T>;
  constexpr int w = V::width;
  const V best = load(lanes), second = load(lanes + w);
  const T first = least(best);
  const unsigned bits = (best == V(first)).bits();
  const double x = static_cast<double>(norm), score = static_cast<double>(first);
  if (!gap.covers(x) || bits == 0) return {-1, std::numeric_limits<T>::infinity()};
  if ((bits & (bits - 1)) == 0) {
    const T next = least(select(best == V(first), second, best));
    const double distance = static_cast<double>(next) - score;
    if (distance > gap(x) || distance > gap.refined(x, score)) {
      const int lane = __builtin_ctz(bits);
      return {static_cast<std::int64_t>(lanes[2 * w + lane]) * w + lane, T(0)};
    }
  }
  // Twice, for the rounding of the sum.
  return {-1, static_cast<T>(score + 2 * std::min(gap(x), gap.refined(x, score)))};
}

// The codes of panel p as given, in float64, interleaved like the panel.
template <class T>
void widen_panel(const PackedCodes<T>& c, std::int64_t p, double* wide) {
  const std::int64_t width = panel_width<T>();
  for (std::int64_t lane = 0; lane < width; ++lane) {
    const std::int64_t k = p * width + lane;
    for (std::int64_t j = 0; j < c.size; ++j) {
      wide[j * width + lane] = k < c.count ? static_cast<double>(c.codes[k * c.size + j]) : 0;
    }
  }
}

// The sums of terms of a row with all codes of a widened panel.
template <bool kCosine, class T>
void sums_of_panel(const T* row, const double* wide, std::int64_t size, double* sums) {
  using D = Vec<double>;
  constexpr int width = 2 * Vec<T>::width, n = width / D::width;
  D total[n];
  for (int v = 0; v < n; ++v) total[v] = D(0.0);
  for (std::int64_t j = 0; j < size; ++j) {
    const D x(static_cast<double>(row[j]));
    for (int v = 0; v < n; ++v) total[v] = add_term<kCosine>(total[v], x, load(wide + j * width + v * D::width));
  }
  for (int v = 0; v < n; ++v) store(sums + v * D::width, total[v]);
}

// Offers the codes of panel p whose bits are set. wide: the widened panel, or null where they are few.
template <class T>
void offer_codes(const PackedCodes<T>& c, const T* row, std::int64_t p, unsigned bits, const double* wide,
                 Nearest& nearest) {
  constexpr int width = 2 * Vec<T>::width;
  double sums[width];
  if (wide != nullptr) {
    c.cosine ? sums_of_panel<true>(row, wide, c.size, sums) : sums_of_panel<false>(row, wide, c.size, sums);
  }
  for (int lane = 0; lane < width; ++lane) {
    const std::int64_t k = p * width + lane;
    if (!(bits >> lane & 1u) || k >= c.count) continue;
    nearest.offer(wide != nullptr ? key_of_sum(c, sums[lane], k) : exact_key(c, row, k), k);
  }
}

// Compares, for n <= R rows of `list`, the keys of all codes that score up to the row's limit, which b.norms
// holds.
template <class T, int R>
void compare_candidates(const PackedCodes<T>& c, const SearchBlock<T>& b, const std::int64_t* list,
                        std::int64_t n) {
  using V = Vec<T>;
  constexpr int w = V::width, width = 2 * w;
  Nearest nearest[R];
  for (std::int64_t i = 0; i < R; ++i) {
    std::copy_n(b.centred + list[std::min(i, n - 1)] * c.size, c.size, b.tile + i * c.size);
  }
  for (std::int64_t p = 0; p < c.panel_count; ++p) {
    V low[R], high[R];
    score_panel<T, R>(b.tile, c.panels + p * width * c.size, c.start + p * width, c.size, low, high);
    unsigned bits[R];
    int total = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const T limit = b.norms[list[i]];
      bits[i] = (low[i] <= V(limit)).bits() | (high[i] <= V(limit)).bits() << w;
      if (!std::isfinite(limit)) bits[i] = ~0u;
      total += __builtin_popcount(bits[i]);
    }
    // Interleaving a panel costs about as much as one row's keys for it.
    const bool many = total > width;
    if (many) widen_panel(c, p, b.wide);
    for (std::int64_t i = 0; i < n; ++i) {
      if (bits[i] != 0) {
        offer_codes(c, b.rows + list[i] * c.size, p, bits[i], many ? b.wide : nullptr, nearest[i]);
      }
    }
  }
  for (std::int64_t i = 0; i < n; ++i) b.indices[list[i]] = nearest[i].index;
}

template <class T>
bool all_finite(const T* row, std::int64_t size) {
  return std::all_of(row, row + size, [](T x) { return std::isfinite(x); });
}

template <class T, int R>
void search_tiles(const PackedCodes<T>& c, const SearchBlock<T>& b) {
  using V = Vec<T>;
  constexpr int w = V::width;
  const std::int64_t tiles = (b.count + R - 1) / R, chunk_bytes = 2 * w * c.size * sizeof(T);
  const std::int64_t chunk = std::max<std::int64_t>(1, kChunkBytes / std::max<std::int64_t>(1, chunk_bytes));
  centre_rows<T, R>(c, b.rows, b.count, b.centred, b.norms);
  std::fill_n(b.lanes, tiles * R * 3 * w, std::numeric_limits<T>::infinity());
  for (std::int64_t p = 0; p < c.panel_count; p += chunk) {
    const std::int64_t last = std::min(p + chunk, c.panel_count);
    for (std::int64_t t = 0; t < tiles; ++t) {
      scan_panels<T, R>(c, b.centred + t * R * c.size, p, last, b.lanes + t * R * 3 * w);
    }
  }

  const CertainGap<T> gap(c);
  std::int64_t open = 0;
  for (std::int64_t i = 0; i < b.count; ++i) {
    const T* row = b.rows + i * c.size;
    const Verdict<T> verdict = settle(gap, b.lanes + i * 3 * w, b.norms[i]);
    b.indices[i] = verdict.index;
    if (verdict.index >= 0) continue;
    if (!all_finite(row, c.size)) {
      b.indices[i] = 0;
    } else if (open > 0 && std::equal(row, row + c.size, b.rows + b.open[open - 1] * c.size)) {
      // Runs of equal rows (padding) are compared once.
      b.indices[i] = -1 - b.open[open - 1];
    } else {
      b.norms[i] = verdict.limit;
      b.open[open++] = i;
    }
  }
  for (std::int64_t i = 0; i < open; i += R) {
    compare_candidates<T, R>(c, b, b.open + i, std::min<std::int64_t>(R, open - i));
  }
  for (std::int64_t i = 0; i < b.count; ++i) {
    if (b.indices[i] < 0) b.indices[i] = b.indices[-1 - b.indices[i]];
  }
}

template <class T>
void search_block(const PackedCodes<T>& c, const SearchBlock<T>& b) {
  c.size <= kShallow ? search_tiles<T, kShallowTileRows>(c, b) : search_tiles<T, kTileRows>(c, b);
  if (b.distance == nullptr) return;
  for (std::int64_t i = 0; i < b.count; ++i) {
    b.distance[i] = exact_distance(c, b.rows + i * c.size, b.indices[i]);
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
