// The gate activations of DESIGN section 2, giving the log decay in base 2.
#pragma once

#include "../sm90.cuh"
#include "params.h"

namespace kda {

constexpr float kLog2e = 1.4426950408889634f;

constexpr float kLeastLogDecay = -30000.f;  // log2, of one token: finite, because sums multiply it by 0

// log2(1 + 2^y). Below 2^-6 the logarithm of 1 + u has lost u's digits, so a series takes over: its first term left
// out is u^5 / 5, 1e-8 of the result.
__device__ __forceinline__ float softplus_log2(float y) {
  float const u = exp2_approx(y);
  float const series = kLog2e * u * (1.f - u * (0.5f - u * (1.f / 3.f - 0.25f * u)));
  float const direct = y > 28.f ? y : log2_approx(1.f + u);
  return u < 0.015625f ? series : direct;
}

// The gate of one channel.
template <Gate kGate>
struct LogDecay {
  float slope, offset, height;

  __device__ __forceinline__ LogDecay(float rate, float lower_bound, float dt_bias) {
    if constexpr (kGate == Gate::kSoftplus) {
      slope = kLog2e;
      height = -rate;
    } else if constexpr (kGate == Gate::kLowerBound) {
      slope = -rate * kLog2e;
      height = lower_bound * kLog2e;
    }
    offset = slope * dt_bias;
  }
  __device__ __forceinline__ float operator()(float x) const {
    if constexpr (kGate == Gate::kGiven) return fmaxf(x * kLog2e, kLeastLogDecay);
    float const y = slope * x + offset;
    if constexpr (kGate == Gate::kSoftplus) return fmaxf(height * softplus_log2(y), kLeastLogDecay);
    return height * rcp_approx(1.f + exp2_approx(y));
  }
};

}  // namespace kda
