// The screening of vq_nearest.cpp in the arithmetic type, and the choice of sets, for one instruction set.

namespace fastgen::FASTGEN_ISA_NS {

// Rows a tile: two chains each, enough to hide the latency of fma; more would run out of registers, for vectors on
// AVX2 and for the addresses of the rows on AVX-512.
#if defined(FASTGEN_SIMD_AVX512) || defined(FASTGEN_SIMD_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif
static_assert(kTileRows <= kMaxTileRows && kMaxTileRows % kTileRows == 0);

// Centres `count` rows and gives an upper bound of their lengths. Missing rows of the last tile are zero.
template <class T>
void centre_rows(const PackedCodes<T>& c, const T* rows, std::int64_t count, T* centred, T* norms) {
  using V = Vec<T>;
  for (std::int64_t i = 0; i < count; ++i) {
    const T* row = rows + i * c.size;
    T* out = centred + i * c.size;
    V squares(T(0));
    for (std::int64_t j = 0; j < c.size; j += V::width) {
      const int n = static_cast<int>(std::min<std::int64_t>(V::width, c.size - j));
      const V x = load_lanes(row + j, n) - load_lanes(c.centre + j, n);
      squares = fma(x, x, squares);
      store_lanes(out + j, x, n);
    }
    norms[i] = length_of(sum(squares), c.size);
  }
  std::fill_n(centred + count * c.size, (whole_tiles(count) - count) * c.size, T(0));
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

// The least scores of the sets of a group, of panels [first, last), for R rows; joined to what is there, unless
// fresh.
template <class T, int R>
void screen_panels(const PackedCodes<T>& c, const T* panels, const T* tile, std::int64_t first, std::int64_t last,
                   bool fresh, T* minima) {
  using V = Vec<T>;
  constexpr int width = 2 * V::width;
  const std::int64_t stride = c.sets.sets();
  V least[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) least[i] = fresh ? V(std::numeric_limits<T>::infinity()) : load(minima + i * stride);
  for (std::int64_t p = first; p < last; ++p) {
    V low[R], high[R];
    score_panel<T, R>(tile, panels + p * width * c.size, c.start + p * width, c.size, low, high);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) least[i] = min(least[i], min(low[i], high[i]));
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) store(minima + i * stride, least[i]);
}

// minima (rows in whole tiles, sets): the least score of each set, for centred rows.
template <class T>
void screen(const PackedCodes<T>& c, const T* rows, std::int64_t count, T* minima) {
  constexpr int R = kTileRows, w = Vec<T>::width;
  const T* panels = c.exact_panels();
  const std::int64_t panel_bytes = 2 * w * c.size * static_cast<std::int64_t>(sizeof(T));
  c.sets.each_tile(whole_tiles(count) / R, panel_bytes,
                   [&](std::int64_t tile, std::int64_t group, std::int64_t first, std::int64_t last) {
                     screen_panels<T, R>(c, panels, rows + tile * R * c.size, first, last,
                                         first == group * c.sets.group_panels(),
                                         minima + tile * R * c.sets.sets() + group * w);
                   });
}

// Gives lower bounds of the least scores of the sets, and returns an upper bound of the least of all. Codes longer
// than `longest` need no bound.
template <class T, bool kBf16>
inline T bound_sets(const PackedCodes<T>& c, const RowError<T>& row, const T* minima, T longest, T* bounds) {
  using V = Vec<T>;
  const V slope(row.slope), curvature(row.curvature), constant(row.constant), residual(row.residual);
  V upper(std::numeric_limits<T>::infinity());
  for (std::int64_t s = 0; s < c.sets.sets(); s += V::width) {
    const V p = min(V(longest), load(c.longest + s)), minimum = load(minima + s);
    V error = fma(p, fma(p, curvature, slope), constant);
    // The residual of an ordinary bfloat16 is at most 1 / 256 of it.
    if constexpr (kBf16) error = fma(min(V(longest / 200), load(c.residual + s)), residual, error);
    store(bounds + s, minimum - error);
    upper = min(upper, minimum + error);
  }
  return least(upper);
}

// Lists the sets that can hold a code of score `limit` or less; false where there are none, or more than `most`.
template <class T>
inline bool list_sets(const PackedCodes<T>& c, const T* bounds, T limit, int most, OpenSets<T>& open) {
  using V = Vec<T>;
  int count = 0, best = 0;
  for (std::int64_t s = 0; s < c.sets.sets(); s += V::width) {
    for (unsigned bits = (load(bounds + s) <= V(limit)).bits(); bits != 0; bits &= bits - 1) {
      if (count == most) return false;
      const std::int64_t set = s + __builtin_ctz(bits);
      open.set[count] = static_cast<std::int32_t>(set);
      open.bound[count] = bounds[set];
      if (bounds[set] < open.bound[best]) best = count;
      ++count;
    }
  }
  open.count = count;
  std::swap(open.set[0], open.set[best]);
  std::swap(open.bound[0], open.bound[best]);
  return count > 0;
}

// Whether the minima of a row of length at most x leave few enough sets open; lists them.
template <class T, bool kBf16>
inline bool choose_sets(const PackedCodes<T>& c, const RowError<T>& row, const T* minima, T x, OpenSets<T>& open) {
  // Comparing a set costs a few times as much as screening it in the arithmetic type, and less than by keys.
  const std::int64_t share = kBf16 ? c.sets.sets() / 8 : c.sets.sets() / 2;
  const int most = static_cast<int>(std::clamp<std::int64_t>(share, 4, kMostOpenSets));
  T bounds[SetLayout::kMostSets];
  const T limit = bound_sets<T, kBf16>(c, row, minima, std::numeric_limits<T>::infinity(), bounds);
  if (list_sets(c, bounds, limit, most, open)) return true;
  if (c.cosine) return false;
  // A code is farther than the best one, whatever its score, where |e| > |x| + sqrt(best distance).
  const double length = static_cast<double>(x), distance = length * length + static_cast<double>(limit);
  const T longest = static_cast<T>(2.01 * (length + std::sqrt(std::max(0.0, distance))));
  bound_sets<T, kBf16>(c, row, minima, longest, bounds);
  return list_sets(c, bounds, limit, most, open);
}

}  // namespace fastgen::FASTGEN_ISA_NS
