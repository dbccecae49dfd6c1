// Stands for CUDA's header of this name: float16, rounded to the nearest, ties to even, as on the device.
#pragma once
#include "cuda_runtime_api.h"

struct __half {
  std::uint16_t bits;

  __half() = default;
  __half(float value) {
    std::uint32_t whole;
    std::memcpy(&whole, &value, sizeof(whole));
    const std::uint32_t sign = whole >> 16 & 0x8000, magnitude = whole & 0x7fffffff;
    std::uint32_t found;
    if (magnitude > 0x7f800000)
      found = 0x7fff;
    else if (magnitude >= 0x477ff000)  // 65520, half way to what would come after the largest
      found = sign | 0x7c00;
    else if (magnitude < 0x38800000)  // below the normal numbers, in steps of 2^-24
      found = sign | static_cast<std::uint32_t>(std::lrint(std::fabs(value) * 16777216.0f));
    else
      found = sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    bits = static_cast<std::uint16_t>(found);
  }
  operator float() const {
    const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ffu;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) / 16777216.0f;
    const std::uint32_t whole = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13;
    float value;
    std::memcpy(&value, &whole, sizeof(value));
    return value;
  }
};
