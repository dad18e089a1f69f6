// What the scan leaves of a tile for a query: one word that holds the largest product of each of its four
// groups, none of them too small. Written by the scan, read by all that come after it.
#pragma once

#include "cuda/device.h"

namespace realm_kernels {
namespace cuda {

constexpr int kGroupRows = 32;  // what is rescored together
constexpr int kTileGroups = 4;
constexpr int kTileRows = kGroupRows * kTileGroups;
// A *quad* is four neighbouring tiles, whose words are read at once.
constexpr int kQuad = 4;
constexpr int kQuadShift = 9;  // makes of a row the number of its quad
static_assert(1 << kQuadShift == kQuad * kTileRows, "a quad is 512 rows");

// The upper 20 bits are those of the tile's maximum M, a float32, rounded upward: 2^-11 of it at most. Below
// them each group has three bits, how far its maximum m is behind: code c > 0 says M - m >= 2^(e + c - 5), e
// the exponent of the rounded M, and 7 says no more than that; 0 says nothing. So the best group is known as
// well as M, and the others up to half of their distance, which is enough to leave most of them unread.
constexpr int kGapBits = 3;
constexpr uint32_t kLargestGap = (1u << kGapBits) - 1;
constexpr uint32_t kGaps = (1u << kGapBits * kTileGroups) - 1;
constexpr int kGapOffset = 5;
constexpr int kExponentAt = 23;
constexpr uint32_t kExponent = 0x7F800000u;

// The bits of the rounded maximum. Infinities stay; the largest numbers become infinite.
RK_DEVICE uint32_t rounded_up(float maximum) {
  const uint32_t bits = __float_as_uint(maximum);
  const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
  return (bits + (~sign & kGaps)) & ~kGaps;
}

// The code of a group, where it belongs. The bits of what is not negative are in the order of their values,
// so a difference of bits compares with a power of two; infinities and NaN give codes that nobody looks at.
// Rounded downward x - x is -0.
RK_DEVICE uint32_t gap_of(uint32_t rounded, float maximum, float of_group, int group) {
  const auto gap = static_cast<int32_t>(__float_as_uint(subtract_down(maximum, of_group)) & 0x7FFFFFFFu);
  const int code = ((gap - static_cast<int32_t>(rounded & kExponent)) >> kExponentAt) + kGapOffset;
  const int kept = code < 0 ? 0 : code > static_cast<int>(kLargestGap) ? static_cast<int>(kLargestGap) : code;
  return static_cast<uint32_t>(kept) << kGapBits * group;
}

RK_DEVICE float maximum_of(uint32_t word) { return __uint_as_float(word & ~kGaps); }

// No less than the maximum of one group of the tile.
RK_DEVICE double maximum_of(uint32_t word, int group) {
  const float maximum = maximum_of(word);
  const auto code = static_cast<int>(word >> kGapBits * group & kLargestGap);
  const auto exponent = static_cast<int>((word & kExponent) >> kExponentAt);
  const int gap = exponent + code - kGapOffset;
  // Nothing is taken off what is infinite.
  return code > 0 && gap > 0 && exponent < 255
             ? static_cast<double>(maximum) - __uint_as_float(static_cast<uint32_t>(gap) << kExponentAt)
             : maximum;
}

// No more than the maximum of the tile, which is not -inf; an integer may have been rounded up to a float.
RK_DEVICE float least_maximum_of(uint32_t word) {
  const uint32_t bits = word & ~kGaps;
  const bool negative = (bits >> 31) != 0;
  return __uint_as_float(negative ? bits + kGaps + 1 : bits == 0 ? 0 : bits - kGaps - 1);
}

}  // namespace cuda
}  // namespace realm_kernels
