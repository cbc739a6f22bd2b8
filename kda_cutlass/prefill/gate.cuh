// The gate activations of DESIGN section 2, giving the log decay in base 2.
#pragma once

#include "../sm90.cuh"
#include "params.h"

namespace kda {

constexpr float kLog2e = 1.4426950408889634f;

constexpr float kLeastLogDecay = -30000.f;  // log2, of one token: finite, because sums multiply it by 0

// log2(1 + 2^y), to 3e-7 of it: max(y, 0) and log2(1 + u) of the smaller of 2^y and 2^-y, which is u times a polynomial
// (least largest relative error over [0, 1]).
__device__ __forceinline__ float softplus_log2(float y) {
  float const u = exp2_approx(-fabsf(y));
  float p = -0.01231933f;
  p = p * u + 0.06360736f;
  p = p * u - 0.15535109f;
  p = p * u + 0.25600913f;
  p = p * u - 0.35339459f;
  p = p * u + 0.48006365f;
  p = p * u - 0.72131008f;
  p = p * u + 1.44269476f;
  return p * u + fmaxf(y, 0.f);
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
