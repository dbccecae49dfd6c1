// Stands for CUDA's header of this name: bfloat16, rounded to the nearest, ties to even, as on the device.
#pragma once
#include "cuda_runtime_api.h"

struct __nv_bfloat16 {
  std::uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float value) {
    std::uint32_t whole;
    std::memcpy(&whole, &value, sizeof(whole));
    const bool none = (whole & 0x7fffffff) > 0x7f800000;
    bits = static_cast<std::uint16_t>(none ? 0x7fff : (whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
  operator float() const {
    const std::uint32_t whole = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &whole, sizeof(value));
    return value;
  }
};
