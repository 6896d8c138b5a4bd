// A codebook made ready for the search of vq_nearest.cpp.
#pragma once

#include "common.h"

namespace fastgen {

// One head's codebook, ready to be scored.
template <class T>
struct PackedCodes {
  const T* codes;        // K x D, as given
  const double* square;  // K, |e|^2 summed in order; for cosine only
  const T* panels;       // per panel D x width
  const T* start;        // per panel width: the score before any product; infinite for codes that take no part
  const T* mean;         // D, what is subtracted from rows
  std::int64_t count, size, panel_count;
  double reach;  // the largest centred |e| of the codes that take part; infinite where keys could overflow
  bool cosine;
};

// Lengths from this to its inverse have products and squares of products in the range of float64; all lengths of
// float32 vectors are among them.
constexpr double kSafeLength = 1e-60;

// Owns what PackedCodes points to.
template <class T>
class Packing {
 public:
  Packing(const T* codes, std::int64_t count, std::int64_t size, std::int64_t width, bool cosine)
      : width_(width),
        panel_count_((count + width - 1) / width),
        square_(cosine ? count : 0),
        mean_(size),
        packed_{} {
    packed_.codes = codes;
    packed_.count = count;
    packed_.size = size;
    packed_.panel_count = panel_count_;
    packed_.cosine = cosine;
    if (cosine) sum_squares();
    leave_out();
    take_mean();
    panels_.resize(panel_count_ * width * size);
    start_.resize(panel_count_ * width, std::numeric_limits<T>::infinity());
    std::vector<double> reach(panel_count_);
    torch::stable::parallel_for(0, panel_count_, grain(width), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) reach[p] = pack(p);
    });
    packed_.reach = *std::max_element(reach.begin(), reach.end());
    // Cosine: rows stay as they are, since shifting the codes adds the same to all scores of a row.
    if (cosine) std::fill(mean_.begin(), mean_.end(), T(0));
    packed_.square = square_.data();
    packed_.panels = panels_.data();
    packed_.start = start_.data();
    packed_.mean = mean_.data();
  }
  Packing(const Packing&) = delete;

  const PackedCodes<T>& codes() const { return packed_; }

 private:
  const T* code(std::int64_t k) const { return packed_.codes + k * packed_.size; }

  // How many items of that many codes make a thread worth waking.
  std::int64_t grain(std::int64_t codes) const {
    return std::max<std::int64_t>(1, 32768 / std::max<std::int64_t>(1, codes * packed_.size));
  }

  void sum_squares() {
    torch::stable::parallel_for(0, packed_.count, grain(1), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) {
        double sum = 0;
        for (std::int64_t j = 0; j < packed_.size; ++j) {
          sum += static_cast<double>(code(k)[j]) * static_cast<double>(code(k)[j]);
        }
        square_[k] = sum;
      }
    });
  }

  // Marks the codes that can never be the answer: those not finite, or equal to an earlier one. Leaving out the
  // latter keeps collapsed codebooks as fast as others.
  void leave_out() {
    const std::vector<std::uint64_t> factors = hash_factors();
    std::vector<std::uint64_t> hashes(packed_.count);
    out_.resize(packed_.count);
    torch::stable::parallel_for(0, packed_.count, grain(1), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) out_[k] = !hash(code(k), factors, &hashes[k]);
    });
    std::int64_t slots = 16;
    while (slots < 2 * packed_.count) slots *= 2;
    std::vector<std::int64_t> table(slots, -1);
    for (std::int64_t k = 0; k < packed_.count; ++k) {
      std::int64_t slot = static_cast<std::int64_t>(hashes[k] >> 20) & (slots - 1);
      for (; table[slot] >= 0 && !out_[k]; slot = (slot + 1) & (slots - 1)) {
        out_[k] =
            hashes[k] == hashes[table[slot]] && std::equal(code(k), code(k) + packed_.size, code(table[slot]));
      }
      if (!out_[k]) table[slot] = k;
    }
  }

  static std::uint64_t mix(std::uint64_t h) {
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
    return h ^ (h >> 31);
  }

  std::vector<std::uint64_t> hash_factors() const {
    std::vector<std::uint64_t> factors(packed_.size);
    for (std::int64_t j = 0; j < packed_.size; ++j) factors[j] = mix(static_cast<std::uint64_t>(j) + 1) | 1u;
    return factors;
  }

  // Whether a code is finite, and a hash of its values.
  bool hash(const T* code, const std::vector<std::uint64_t>& factors, std::uint64_t* result) const {
    std::uint64_t sum = 0;
    T finite = 0;
    for (std::int64_t j = 0; j < packed_.size; ++j) {
      // Adding zero turns -0 into 0, which it equals.
      const T value = code[j] + T(0);
      std::uint64_t bits = 0;
      std::memcpy(&bits, &value, sizeof(T));
      sum += bits * factors[j];
      // Zero, or NaN from then on.
      finite += value - value;
    }
    *result = mix(sum);
    return finite == T(0);
  }

  // The factor that makes a code one of length one, for cosine.
  double unit(std::int64_t k) const { return square_[k] == 0 ? 0 : 1 / std::sqrt(square_[k]); }

  void take_mean() {
    std::vector<double> sum(packed_.size);
    std::int64_t used = 0;
    for (std::int64_t k = 0; k < packed_.count; ++k) {
      if (out_[k]) continue;
      ++used;
      const double scale = packed_.cosine ? unit(k) : 1;
      const T* e = code(k);
      for (std::int64_t j = 0; j < packed_.size; ++j) sum[j] += scale * static_cast<double>(e[j]);
    }
    const double share = 1 / static_cast<double>(std::max<std::int64_t>(1, used));
    for (std::int64_t j = 0; j < packed_.size; ++j) mean_[j] = static_cast<T>(share * sum[j]);
  }

  // Whether the float64 keys of a code neither overflow nor underflow: for cosine by its length. Otherwise what is
  // finite here is, as the rows that are scored are bounded.
  bool safe(std::int64_t k, double centred_square) const {
    constexpr double kLeast = kSafeLength * kSafeLength;
    if (!std::isfinite(centred_square)) return false;
    return !packed_.cosine || square_[k] == 0 || (square_[k] > kLeast && square_[k] < 1 / kLeast);
  }

  // Fills panel p and returns its reach.
  double pack(std::int64_t p) {
    const std::int64_t first = p * width_, lanes = std::min(width_, packed_.count - first);
    T* panel = panels_.data() + first * packed_.size;
    std::vector<double> squares(lanes), units(lanes, 1.0);
    for (std::int64_t lane = 0; lane < lanes && packed_.cosine; ++lane) units[lane] = unit(first + lane);
    const T factor = packed_.cosine ? T(-1) : T(-2);
    for (std::int64_t j = 0; j < packed_.size; ++j) {
      const double mean = static_cast<double>(mean_[j]);
      const T* e = code(first) + j;
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        const T centred = static_cast<T>(units[lane] * static_cast<double>(e[lane * packed_.size]) - mean);
        panel[j * width_ + lane] = factor * centred;
        squares[lane] += static_cast<double>(centred) * static_cast<double>(centred);
      }
    }
    double reach = 0;
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const std::int64_t k = first + lane;
      if (out_[k]) {
        // Not finite values would turn infinite scores into NaN.
        for (std::int64_t j = 0; j < packed_.size; ++j) panel[j * width_ + lane] = T(0);
        continue;
      }
      start_[k] = packed_.cosine ? T(0) : static_cast<T>(squares[lane]);
      reach = std::max(
          reach, safe(k, squares[lane]) ? std::sqrt(squares[lane]) : std::numeric_limits<double>::infinity());
    }
    return reach;
  }

  std::int64_t width_, panel_count_;
  std::vector<double> square_;
  std::vector<char> out_;
  std::vector<T> mean_, panels_, start_;
  PackedCodes<T> packed_;
};

}  // namespace fastgen
