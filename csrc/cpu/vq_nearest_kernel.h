// Exact nearest-code search over one block of rows, for one instruction set; see vq_nearest.cpp.

#include "vq_packing_kernel.h"
#include "vq_screen_kernel.h"

namespace fastgen::FASTGEN_ISA_NS {

template <class T>
std::int64_t lane_count() {
  return Vec<T>::width;
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

// As exact_key for n <= 4 codes at once: each sum is a chain of additions, and four of them take no longer than
// one.
template <bool kCosine, class T>
void sums_of_terms(const PackedCodes<T>& c, const T* row, const std::int64_t* index, int n, double* sums) {
  const T* code[4];
  for (int i = 0; i < 4; ++i) code[i] = c.codes + index[i < n ? i : 0] * c.size;
  double sum[4] = {};
  for (std::int64_t j = 0; j < c.size; ++j) {
    const double x = static_cast<double>(row[j]);
    for (int i = 0; i < 4; ++i) sum[i] = add_term<kCosine>(sum[i], x, static_cast<double>(code[i][j]));
  }
  for (int i = 0; i < n; ++i) sums[i] = sum[i];
}

// The code of the least finite key, the lowest of those.
struct Nearest {
  double key = std::numeric_limits<double>::infinity();
  std::int64_t index = 0;

  void offer(double candidate, std::int64_t k) {
    const bool wins = candidate < key || (candidate == key && k < index);
    if (!wins || !(std::fabs(candidate) <= std::numeric_limits<double>::max())) return;
    key = candidate;
    index = k;
  }
};

template <class T>
std::int64_t nearest_of(const PackedCodes<T>& c, const T* row, const std::int64_t* index, int count) {
  Nearest nearest;
  double sums[4];
  for (int i = 0; i < count; i += 4) {
    const int n = std::min(4, count - i);
    c.cosine ? sums_of_terms<true>(c, row, index + i, n, sums) : sums_of_terms<false>(c, row, index + i, n, sums);
    for (int k = 0; k < n; ++k) nearest.offer(key_of_sum(c, sums[k], index[i + k]), index[i + k]);
  }
  return nearest.index;
}

template <bool kCosine, class V>
inline V add_product(V sum, V x, V e) {
  if constexpr (kCosine) return fnma(x, e, sum);
  const V difference = x - e;
  return fma(difference, difference, sum);
}

// Distances (see DistanceError) of a row to n <= width consecutive codes, one a lane.
template <bool kCosine, class T>
inline Vec<T> distances(const T* row, const T* codes, std::int64_t size, int n) {
  using V = Vec<T>;
  constexpr int w = V::width;
  V sums[w];
#pragma GCC unroll 4
  for (int q = 0; q < w; q += 4) {
    const T* e[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      e[i] = codes + (q + i < n ? q + i : n - 1) * size;
      sums[q + i] = V(T(0));
    }
    if (q >= n) continue;
    std::int64_t j = 0;
    for (; j + w <= size; j += w) {
      const V x = load(row + j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[q + i] = add_product<kCosine>(sums[q + i], x, load(e[i] + j));
    }
    if (j == size) continue;
    const int rest = static_cast<int>(size - j);
    const V x = load_n(row + j, rest);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[q + i] = add_product<kCosine>(sums[q + i], x, load_n(e[i] + j, rest));
  }
  return lane_sums(sums);
}

// Lets codes [first, last) compete.
template <class T>
inline void compete(const PackedCodes<T>& c, const T* row, std::int64_t first, std::int64_t last,
                    const DistanceError<T>& error, Contest<T>& contest) {
  using V = Vec<T>;
  constexpr int w = V::width;
  for (std::int64_t k = first; k < last; k += w) {
    const int n = static_cast<int>(std::min<std::int64_t>(w, last - k));
    const T* codes = c.compared + k * c.size;
    V d = c.cosine ? distances<true>(row, codes, c.size, n) : distances<false>(row, codes, c.size, n);
    if (c.penalty != nullptr) d = d + load_n(c.penalty + k, n);
    const Mask<T> near = (d <= V(contest.limit)) & Mask<T>::first(n);
    if (!near.any()) continue;
    // First the limit, so that most of the codes need not be listed.
    contest.lower(least(select(near, d, V(contest.limit))), error);
    unsigned bits = (near & (d <= V(contest.limit))).bits();
    alignas(64) T lanes[w];
    store(lanes, d);
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      contest.add(lanes[lane], k + lane);
    }
  }
}

template <class T>
bool all_finite(const T* row, std::int64_t size) {
  return std::all_of(row, row + size, [](T x) { return std::isfinite(x); });
}

// Keeps the answer of a contest; a row without one is listed for compare_all.
template <class T>
void settle(const PackedCodes<T>& c, const SearchBlock<T>& b, std::int64_t i) {
  Contest<T>& contest = b.contests[i];
  contest.drop();
  if (!contest.complete()) {
    b.undecided[(*b.undecided_count)++] = i;
    return;
  }
  const T* row = b.rows + i * c.size;
  b.indices[i] = contest.count == 1 ? contest.index[0] : nearest_of(c, row, contest.index, contest.count);
}

// The codes as given of [first, first + lanes), in float64, interleaved.
template <class T>
void widen_codes(const PackedCodes<T>& c, std::int64_t first, std::int64_t lanes, double* wide) {
  for (std::int64_t lane = 0; lane < lanes; ++lane) {
    const std::int64_t k = std::min(first + lane, c.count - 1);
    for (std::int64_t j = 0; j < c.size; ++j)
      wide[j * lanes + lane] = static_cast<double>(c.codes[k * c.size + j]);
  }
}

// The sums of terms of a row with kWideLanes widened codes.
template <bool kCosine, class T>
void sums_of_lanes(const T* row, const double* wide, std::int64_t size, double* sums) {
  using D = Vec<double>;
  constexpr int n = kWideLanes / D::width;
  D total[n];
  for (int v = 0; v < n; ++v) total[v] = D(0.0);
  for (std::int64_t j = 0; j < size; ++j) {
    const D x(static_cast<double>(row[j]));
    for (int v = 0; v < n; ++v) {
      total[v] = add_term<kCosine>(total[v], x, load(wide + j * kWideLanes + v * D::width));
    }
  }
  for (int v = 0; v < n; ++v) store(sums + v * D::width, total[v]);
}

// Compares the keys of all codes for the undecided rows.
template <class T>
void compare_all(const PackedCodes<T>& c, const SearchBlock<T>& b) {
  const std::int64_t count = *b.undecided_count;
  std::int64_t distinct = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t r = b.undecided[i];
    const T* row = b.rows + r * c.size;
    if (!all_finite(row, c.size)) {
      b.indices[r] = 0;
    } else if (distinct > 0 && std::equal(row, row + c.size, b.rows + b.undecided[distinct - 1] * c.size)) {
      // Runs of equal rows (padding) are compared once.
      b.indices[r] = -1 - b.undecided[distinct - 1];
    } else {
      b.keys[distinct] = std::numeric_limits<double>::infinity();
      b.indices[r] = 0;
      b.undecided[distinct++] = r;
    }
  }
  double sums[kWideLanes];
  for (std::int64_t k = 0; k < c.count && distinct > 0; k += kWideLanes) {
    widen_codes(c, k, kWideLanes, b.wide);
    for (std::int64_t i = 0; i < distinct; ++i) {
      const T* row = b.rows + b.undecided[i] * c.size;
      c.cosine ? sums_of_lanes<true>(row, b.wide, c.size, sums) : sums_of_lanes<false>(row, b.wide, c.size, sums);
      Nearest nearest;
      nearest.key = b.keys[i];
      nearest.index = b.indices[b.undecided[i]];
      for (std::int64_t lane = 0; lane < std::min<std::int64_t>(kWideLanes, c.count - k); ++lane) {
        nearest.offer(key_of_sum(c, sums[lane], k + lane), k + lane);
      }
      b.keys[i] = nearest.key;
      b.indices[b.undecided[i]] = nearest.index;
    }
  }
  for (std::int64_t i = 0; i < b.count; ++i) {
    if (b.indices[i] < 0) b.indices[i] = b.indices[-1 - b.indices[i]];
  }
}

// rows: `count` of the block, to be ordered by the first of their open sets.
template <class T>
void order_by_set(const SearchBlock<T>& b, std::int64_t sets, const std::int64_t* rows, std::int64_t count,
                  std::int64_t* ordered) {
  std::int32_t begin[SetLayout::kMostSets + 1] = {};
  for (std::int64_t i = 0; i < count; ++i) ++begin[b.open[rows[i]].set[0] + 1];
  for (std::int64_t s = 0; s < sets; ++s) begin[s + 1] += begin[s];
  for (std::int64_t i = 0; i < count; ++i) ordered[begin[b.open[rows[i]].set[0]]++] = rows[i];
}

// Searches the screened rows b.left[0, left); returns how many of them stay there, as their minima do not help.
template <class T, bool kBf16>
std::int64_t search_sets(const PackedCodes<T>& c, const SearchBlock<T>& b, std::int64_t left) {
  const ScreenError<T> screen_error(c, kBf16);
  const DistanceError<T> error(c);
  const auto enter = [&](std::int64_t r, std::int64_t set) {
    const std::int64_t first = set * c.sets.length;
    compete(c, b.rows + r * c.size, first, std::min(first + c.sets.length, c.count), error, b.contests[r]);
  };
  std::int64_t kept = 0, count = 0;
  for (std::int64_t i = 0; i < left; ++i) {
    const std::int64_t r = b.left[i];
    const T x = b.norms[r];
    const RowError<T> row = screen_error.row(x, kBf16 ? static_cast<T>(b.residuals[r]) : T(0));
    if (screen_error.covers(x) && choose_sets<T, kBf16>(c, row, b.minima + i * c.sets.sets(), x, b.open[r])) {
      b.contests[r].start(error, x);
      b.chosen[count++] = r;
    } else {
      b.left[kept++] = r;
    }
  }
  // So that the rows of a set find its codes in L1.
  order_by_set(b, c.sets.sets(), b.chosen, count, b.ordered);
  for (std::int64_t i = 0; i < count; ++i) enter(b.ordered[i], b.open[b.ordered[i]].set[0]);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t r = b.chosen[i];
    const OpenSets<T>& open = b.open[r];
    const double limit = screen_error.score_limit(b.norms[r], b.contests[r].limit);
    for (int s = 1; s < open.count; ++s) {
      if (static_cast<double>(open.bound[s]) <= limit) enter(r, open.set[s]);
    }
    settle(c, b, r);
  }
  return kept;
}

template <class T>
void search_screened(const PackedCodes<T>& c, const SearchBlock<T>& b) {
  const std::int64_t padded = whole_tiles(b.count);
  std::int64_t left = b.count;
  centre_rows(c, b.rows, b.count, b.centred, b.norms);
  for (std::int64_t i = 0; i < left; ++i) b.left[i] = i;
  if constexpr (std::is_same_v<T, float>) {
    if (c.pairs != nullptr && *b.pause == 0) {
      round_to_bf16(b.centred, padded, c.size, b.pairs, b.residuals);
      screen_bf16(c.sets, c.pairs, c.start, bf16_pairs(c.size), b.pairs, padded / kBf16TileRows, b.minima);
      left = search_sets<T, true>(c, b, left);
      // Where bfloat16 tells too little apart it seldom does in the next blocks.
      if (3 * left > b.count) *b.pause = 16;
      for (std::int64_t i = 0; i < left; ++i) {
        std::copy_n(b.centred + b.left[i] * c.size, b.left[i] == i ? 0 : c.size, b.centred + i * c.size);
      }
    }
    if (*b.pause > 0) --*b.pause;
  }
  if (left == 0) return;
  screen(c, b.centred, left, b.minima);
  left = search_sets<T, false>(c, b, left);
  std::copy_n(b.left, left, b.undecided + *b.undecided_count);
  *b.undecided_count += left;
}

// Few rows: all codes compete, and nothing is packed.
template <class T>
void search_directly(const PackedCodes<T>& c, const SearchBlock<T>& b) {
  constexpr int w = Vec<T>::width;
  const DistanceError<T> error(c);
  for (std::int64_t i = 0; i < b.count; ++i) {
    T square = 0;
    for (std::int64_t j = 0; c.cosine && j < c.size; ++j)
      square += b.rows[i * c.size + j] * b.rows[i * c.size + j];
    b.contests[i].start(error, length_of(square, c.size));
  }
  for (std::int64_t k = 0; k < c.count; k += w) {
    for (std::int64_t i = 0; i < b.count; ++i) {
      compete(c, b.rows + i * c.size, k, std::min(k + w, c.count), error, b.contests[i]);
    }
  }
  for (std::int64_t i = 0; i < b.count; ++i) settle(c, b, i);
}

template <class T>
void search_block(const PackedCodes<T>& c, const SearchBlock<T>& b) {
  *b.undecided_count = 0;
  c.start == nullptr ? search_directly(c, b) : search_screened(c, b);
  if (*b.undecided_count > 0) compare_all(c, b);
  if (b.distance == nullptr) return;
  for (std::int64_t i = 0; i < b.count; ++i) {
    b.distance[i] = exact_distance(c, b.rows + i * c.size, b.indices[i]);
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
