// Makes a codebook ready for the search of vq_nearest.cpp, which includes this after its kernels.
#pragma once

#include <memory>
#include <mutex>

#include "vq_packed.h"

namespace fastgen {

// Not filled: most of these hold much and are written once.
template <class T>
std::unique_ptr<T[]> unwritten(std::int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// Owns what PackedCodes points to.
template <class T>
class Packing {
 public:
  // width: lanes of the vectors that score; 0 for no screening.
  Packing(const T* codes, std::int64_t count, std::int64_t size, std::int64_t width, bool cosine) : packed_{} {
    packed_.codes = packed_.compared = codes;
    packed_.count = count;
    packed_.size = size;
    packed_.cosine = cosine;
    packed_.safe = true;
    if (cosine) make_units();
    if (width > 0) prepare_screening(width);
  }
  Packing(const Packing&) = delete;

  const PackedCodes<T>& codes() const { return packed_; }

 private:
  void prepare_screening(std::int64_t width) {
    packed_.sets = SetLayout(packed_.count, width);
    leave_out();
    take_centre();
    centre_all();
    packed_.penalty = penalty_.data();
    // Cosine: rows stay as they are, since shifting the codes adds the same to all scores of a row.
    if (packed_.cosine) std::fill(centre_.begin(), centre_.end(), T(0));
    packed_.centre = centre_.data();
    packed_.start = start_.get();
    if constexpr (std::is_same_v<T, float>) {
      if (packed_.size >= kLeastBf16Size && bf16_screening()) pack_bf16();
    }
    longest_ = most_of_sets(length_);
    packed_.longest = longest_.data();
    packed_.owner = this;
    packed_.panels = [](const void* owner) { return static_cast<const Packing*>(owner)->panels(); };
  }

  const T* given(std::int64_t k) const { return packed_.codes + k * packed_.size; }
  const T* code(std::int64_t k) const { return packed_.compared + k * packed_.size; }

  // How many items of that many codes make a thread worth waking.
  std::int64_t grain(std::int64_t codes) const {
    return std::max<std::int64_t>(1, 32768 / std::max<std::int64_t>(1, codes * packed_.size));
  }

  // Whether the float64 keys of a code of that squared length neither overflow nor underflow.
  static bool ordinary(double square) {
    constexpr double kLeast = kSafeLength * kSafeLength;
    return square == 0 || (square > kLeast && square < 1 / kLeast);
  }

  // Cosine: the squares of the keys, and the codes made to have length one.
  void make_units() {
    square_.resize(packed_.count);
    units_.resize(packed_.count * packed_.size);
    torch::stable::parallel_for(0, packed_.count, grain(1), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) {
        const T* e = given(k);
        double sum = 0;
        for (std::int64_t j = 0; j < packed_.size; ++j)
          sum += static_cast<double>(e[j]) * static_cast<double>(e[j]);
        square_[k] = sum;
        const double factor = sum == 0 ? 0 : 1 / std::sqrt(sum);
        T* unit = units_.data() + k * packed_.size;
        for (std::int64_t j = 0; j < packed_.size; ++j)
          unit[j] = static_cast<T>(factor * static_cast<double>(e[j]));
      }
    });
    packed_.square = square_.data();
    packed_.compared = units_.data();
    packed_.safe =
        std::all_of(square_.begin(), square_.end(), [](double s) { return std::isnan(s) || ordinary(s); });
  }

  // Marks the codes that can never be the answer: those not finite, or equal to an earlier one. Leaving out the
  // latter keeps collapsed codebooks as fast as others.
  void leave_out() {
    std::vector<std::uint32_t> hashes(packed_.count);
    out_.resize(packed_.count);
    torch::stable::parallel_for(0, packed_.count, grain(1), [&](std::int64_t begin, std::int64_t end) {
      FASTGEN_DISPATCH_ISA(hash_codes, given(0), begin, end, packed_.size, hashes.data(), out_.data());
    });
    std::int64_t slots = 16;
    while (slots < 2 * packed_.count) slots *= 2;
    std::vector<std::int64_t> table(slots, -1);
    for (std::int64_t k = 0; k < packed_.count; ++k) {
      std::int64_t slot = static_cast<std::int64_t>(hashes[k]) & (slots - 1);
      for (; table[slot] >= 0 && !out_[k]; slot = (slot + 1) & (slots - 1)) {
        out_[k] =
            hashes[k] == hashes[table[slot]] && std::equal(given(k), given(k) + packed_.size, given(table[slot]));
      }
      if (!out_[k]) table[slot] = k;
    }
  }

  // Any point near the codes will do: the median of some of them, which a few codes far away do not move.
  void take_centre() {
    constexpr std::int64_t kSome = 31;
    const std::int64_t step = (packed_.count + kSome - 1) / kSome;
    std::vector<std::int64_t> some;
    for (std::int64_t k = 0; k < packed_.count; k += step) {
      if (!out_[k]) some.push_back(k);
    }
    centre_.resize(packed_.size);
    std::vector<T> values(some.size());
    for (std::int64_t j = 0; j < packed_.size && !some.empty(); ++j) {
      for (std::size_t i = 0; i < some.size(); ++i) values[i] = code(some[i])[j];
      const auto middle = values.begin() + values.size() / 2;
      std::nth_element(values.begin(), middle, values.end());
      centre_[j] = *middle;
    }
  }

  // The codes as they are scored: c = -2 (e - centre), or -(e - centre) for cosine, and their lengths. Codes left
  // out are zero: values that are not finite would turn their infinite scores into NaN.
  void centre_all() {
    centred_ = unwritten<T>(packed_.count * packed_.size);
    length_.resize(packed_.count);
    penalty_.resize(packed_.count);
    std::vector<T> starts(packed_.count);
    const CentreCodes<T> args{packed_.compared, centre_.data(), out_.data(),    packed_.size,   packed_.cosine,
                              centred_.get(),   starts.data(),  length_.data(), penalty_.data()};
    torch::stable::parallel_for(0, packed_.count, grain(1), [&](std::int64_t begin, std::int64_t end) {
      FASTGEN_DISPATCH_ISA(centre_codes, args, begin, end);
    });
    packed_.reach = static_cast<double>(*std::max_element(length_.begin(), length_.end()));
    start_ = unwritten<T>(packed_.sets.panels() * 2 * packed_.sets.width);
    fill_panels(starts.data(), 1, std::numeric_limits<T>::infinity(), start_.get());
  }

  void pack_bf16() {
    const std::int64_t pairs = bf16_pairs(packed_.size);
    const auto rounded = unwritten<Bf16Pair>(packed_.count * pairs);
    std::vector<float> lost(packed_.count);
    torch::stable::parallel_for(0, packed_.count, grain(1), [&](std::int64_t begin, std::int64_t end) {
      round_to_bf16(centred_.get() + begin * packed_.size, end - begin, packed_.size,
                    rounded.get() + begin * pairs, lost.data() + begin);
    });
    pairs_ = unwritten<Bf16Pair>(packed_.sets.panels() * 2 * packed_.sets.width * pairs);
    fill_panels(rounded.get(), pairs, Bf16Pair(0), pairs_.get());
    residual_ = most_of_sets(lost);
    packed_.residual = residual_.data();
    packed_.pairs = pairs_.get();
  }

  // Packed when first asked for: most codebooks that are screened in bfloat16 never need them.
  const T* panels() const {
    std::call_once(packed_once_, [this] {
      panels_ = unwritten<T>(packed_.sets.panels() * 2 * packed_.sets.width * packed_.size);
      fill_panels(centred_.get(), packed_.size, T(0), panels_.get());
    });
    return panels_.get();
  }

  // Interleaves `size` words of every code by panels.
  template <class Word>
  void fill_panels(const Word* rows, std::int64_t size, Word missing, Word* panels) const {
    const std::int64_t lanes = 2 * packed_.sets.width;
    torch::stable::parallel_for(0, packed_.sets.panels(), grain(lanes), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) {
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
          const std::int64_t k = packed_.sets.code(p, lane);
          Word* out = panels + p * lanes * size + lane;
          for (std::int64_t j = 0; j < size; ++j)
            out[j * lanes] = k < packed_.count ? rows[k * size + j] : missing;
        }
      }
    });
  }

  std::vector<T> most_of_sets(const std::vector<T>& of_codes) const {
    std::vector<T> most(packed_.sets.sets());
    for (std::int64_t k = 0; k < packed_.count; ++k) {
      T& of_set = most[k / packed_.sets.length];
      of_set = std::max(of_set, of_codes[k]);
    }
    return most;
  }

  // With fewer dimensions codes lie so densely that bfloat16 tells few of them apart.
  static constexpr std::int64_t kLeastBf16Size = 4;

  std::vector<double> square_;
  std::vector<char> out_;
  std::vector<T> units_, centre_, length_, penalty_, longest_, residual_;
  std::unique_ptr<T[]> centred_, start_;
  std::unique_ptr<Bf16Pair[]> pairs_;
  mutable std::once_flag packed_once_;
  mutable std::unique_ptr<T[]> panels_;
  PackedCodes<T> packed_;
};

}  // namespace fastgen
