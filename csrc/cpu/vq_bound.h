// What the scores of vq_nearest.cpp prove: bounds of their rounding errors.
#pragma once

#include "vq_packed.h"

namespace fastgen {

// With u the unit roundoff of T, D products and additions are wrong by a factor of at most 1 + D u; the constant
// covers what comes before and after, and every bound is rounded up.
template <class T>
double sum_error(std::int64_t terms) {
  return 1.01 * static_cast<double>(terms + 16) * std::numeric_limits<T>::epsilon() / 2;
}

// An upper bound of the length of a vector, from its squares added up in T, some of which may have vanished.
template <class T>
T length_of(T square, std::int64_t size) {
  const T rounding = T(1) + static_cast<T>(size + 8) * std::numeric_limits<T>::epsilon();
  return std::sqrt(square + static_cast<T>(size) * std::numeric_limits<T>::min()) * rounding;
}

// How wrong a screened score of one row can be, for the codes c of a set whose largest length is p and whose
// largest rounding residual is q.
template <class T>
struct RowError {
  T slope, curvature, residual, constant;
};

// The score of a code is s = |e|^2 + <x, c>, c = -2 e, for x and e less the centre (cosine: <x, c>, c = -e / |e|).
// Computed from x^ and c^ in place of x and c it is off by at most
//     |x - x^| |c| + |x^| |c - c^| + g (|x| |c| + |e|^2) + constant,
// by Cauchy and Schwarz with the residuals as they are; g = sum_error covers centring and accumulation, and the
// constant underflow, the float64 keys that the order is defined by, and for cosine the rounding of e / |e|.
template <class T>
class ScreenError {
 public:
  ScreenError(const PackedCodes<T>& c, bool bf16) : cosine_(c.cosine), reach_(c.reach) {
    const double size = static_cast<double>(c.size), most = std::numeric_limits<T>::max() / 64;
    // Twice, for |e|^2 and the score that it starts; and a bfloat16 product may be cut off instead of rounded.
    sum_ = (bf16 ? 4 : 2) * sum_error<T>(c.size);
    key_ = 2 * sum_error<double>(c.size);
    underflow_ = 16 * size * std::numeric_limits<T>::min();
    const bool usable = c.safe && sum_ < 0.01 && reach_ * reach_ < most;
    longest_ = usable ? std::min(std::sqrt(most), most / std::max(reach_, 1.0)) : -1;
    shortest_ = c.cosine ? kSafeLength : 0;
  }

  // Whether the scores of a row of length at most x are bounded at all; where not, they or the keys could overflow
  // or underflow.
  bool covers(T x) const { return static_cast<double>(x) <= longest_ && static_cast<double>(x) >= shortest_; }

  // length >= |x|, residual >= |x - x^|.
  RowError<T> row(T length, T residual) const {
    const double x = static_cast<double>(length), lost = static_cast<double>(residual);
    const double keys = cosine_ ? (key_ + std::numeric_limits<T>::epsilon()) * x : key_ * x * x;
    return {up(lost + (sum_ + 2 * key_) * x), cosine_ ? T(0) : up((sum_ + key_) / 4), up(x + lost),
            up(keys + underflow_ * (1 + reach_ + x))};
  }

  // The best score of a row of that length, given an upper bound of its best distance: d = |x|^2 + s.
  double score_limit(T length, T distance) const {
    if (cosine_) return std::numeric_limits<double>::infinity();
    const double square = static_cast<double>(length) * static_cast<double>(length);
    return static_cast<double>(distance) - square * (1 - 4 * sum_) + underflow_;
  }

 private:
  static T up(double value) { return static_cast<T>(1.001 * value); }

  bool cosine_;
  double reach_, sum_, key_, underflow_, longest_, shortest_;
};

// Which codes can be the nearest to a row of length at most x, from their distances d = |x - e|^2 in T (cosine:
// d = -<x, e / |e|>): those of d <= factor * least + slack(x).
template <class T>
struct DistanceError {
  T factor, constant, slope;
  double shortest, longest;

  explicit DistanceError(const PackedCodes<T>& c) {
    const double underflow = 16 * static_cast<double>(c.size) * std::numeric_limits<T>::min();
    const double relative = 4 * (sum_error<T>(c.size) + sum_error<double>(c.size));
    factor = c.cosine ? T(1) : static_cast<T>(1 + relative);
    constant = static_cast<T>(underflow);
    slope = c.cosine ? static_cast<T>(1.01 * relative + underflow) : T(0);
    shortest = c.cosine ? kSafeLength : 0;
    longest = c.cosine ? 1 / kSafeLength : std::numeric_limits<double>::infinity();
    if (!c.safe || relative > 1) longest = -1;
  }

  T slack(T x) const {
    const double length = static_cast<double>(x);
    const bool covered = length >= shortest && length <= longest;
    return covered ? constant + slope * x : std::numeric_limits<T>::infinity();
  }
};

// The codes of a row that can still be the nearest.
template <class T>
struct Contest {
  static constexpr int kMost = 32;
  T least, limit, slack;
  int count;
  bool crowded;  // more than kMost could be
  T distance[kMost];
  std::int64_t index[kMost];

  void start(const DistanceError<T>& error, T x) {
    slack = error.slack(x);
    least = limit = std::numeric_limits<T>::infinity();
    count = 0;
    crowded = false;
  }

  // Whether the list holds the nearest code for certain. A distance near overflow may be one that has no finite
  // key.
  bool complete() const { return !crowded && count > 0 && least < std::numeric_limits<T>::max() / 4; }

  void lower(T d, const DistanceError<T>& error) {
    if (!(d < least)) return;
    least = d;
    limit = d * error.factor + slack;
  }

  // d <= limit, which is up to date.
  void add(T d, std::int64_t k) {
    if (count == kMost) drop();
    crowded = crowded || count == kMost;
    if (crowded) return;
    distance[count] = d;
    index[count++] = k;
  }

  // Forgets the codes that others have beaten since.
  void drop() {
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      if (!(distance[i] <= limit)) continue;
      distance[kept] = distance[i];
      index[kept++] = index[i];
    }
    count = kept;
  }
};

}  // namespace fastgen
