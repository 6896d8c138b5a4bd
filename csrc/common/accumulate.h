// What arithmetic is done in.
#pragma once

namespace fastgen {

// float for half and bfloat16.
template <class S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class S>
using acc_t = typename Accumulate<S>::type;

}  // namespace fastgen
