// EXPORT marks the functions that other languages call; everything else stays within its library.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))
