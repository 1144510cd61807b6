// How many parts of a size something is cut into.
#pragma once

#include <cstdint>

namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
