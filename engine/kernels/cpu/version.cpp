// What this library was compiled from.
#include "export.h"

// Returns the hash of the sources, as engine/kernels/sources.py computes it.
EXPORT const char* ryz_source_hash() { return SOURCE_HASH; }
