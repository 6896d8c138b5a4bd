// A codebook made ready for the search of vq_nearest.cpp.
#pragma once

#include "vq_screen_bf16.h"

namespace fastgen {

// One head's codebook, ready for the search. The members below `sets` are those of the screening, and empty
// without it.
template <class T>
struct PackedCodes {
  const T* codes;        // K x D, as given
  const T* compared;     // K x D: the codes, for cosine made to have length one
  const double* square;  // K, |e|^2 summed in order; for cosine only
  std::int64_t count, size;
  bool cosine;
  bool safe;  // no key of a finite row of ordinary length overflows or underflows

  SetLayout sets;
  const T* penalty;       // K: 0, or infinite for codes that take no part
  const T* centre;        // D, what is subtracted from rows
  const T* start;         // 2 * width a panel: the score before any product; infinite where `penalty` is
  const T* longest;       // per set, the largest |c|
  const T* residual;      // per set, the largest |c - bfloat16(c)|; for pairs only
  double reach;           // the largest |c| of all
  const Bf16Pair* pairs;  // per panel pairs x 2 * width; null where there is no use for them
  const T* (*panels)(const void* owner);
  const void* owner;

  // per panel D x 2 * width
  const T* exact_panels() const { return panels(owner); }
};

// Lengths from this to its inverse have products and squares of products in the range of float64; all lengths of
// float32 vectors are among them.
constexpr double kSafeLength = 1e-60;

// Codes made ready to be scored; see Packing.
template <class T>
struct CentreCodes {
  const T *codes, *centre;
  const char* out;
  std::int64_t size;
  bool cosine;
  T *centred, *start, *length, *penalty;
};

}  // namespace fastgen
