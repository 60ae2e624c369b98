// How the elements are cut into work. The cuts depend on the layout alone, never on the number of threads or the
// instruction set, so that sums taken along them have the same bits everywhere.
#pragma once

#include <cstdint>

namespace fastdiff {

// A unit is up to kUnit elements of one row that lie side by side: what a thread takes.
constexpr int64_t kUnit = 4096;
// A block is what a kernel works on at a time: small enough that its few buffers stay in the first-level cache.
constexpr int kBlock = 512;
// Kernels take two vectors at a time, at most kStep elements: blocks and buffers are padded to a multiple.
constexpr int kStep = 32;
// A sum is this many sums side by side.
constexpr int kLanes = 16;

}  // namespace fastdiff
