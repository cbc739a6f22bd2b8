// Thin named wrappers over CuTe's SM90/SM80 atoms: one line each where the kernels use them.
#pragma once

#include <cuda_bf16.h>
#include <cutlass/arch/barrier.h>

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <type_traits>
#include <utility>

namespace kda {

using bf16 = __nv_bfloat16;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// f(constant 0), ..., f(constant kCount - 1)
template <class F, int... I>
__device__ __forceinline__ void static_for_impl(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int kCount, class F>
__device__ __forceinline__ void static_for(F&& f) {
  static_for_impl(f, std::make_integer_sequence<int, kCount>{});
}

__device__ __forceinline__ int64_t load_index(void const* data, int64_t offset, bool is_int64) {
  return is_int64 ? static_cast<long long const*>(data)[offset] : static_cast<int const*>(data)[offset];
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// (lo, hi) rounded to nearest and packed, lo in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}
__device__ __forceinline__ float unpack_lo(uint32_t packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float unpack_hi(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

__device__ __forceinline__ __nv_bfloat162 bits_as_bf16x2(uint32_t bits) {
  return *reinterpret_cast<__nv_bfloat162*>(&bits);
}
__device__ __forceinline__ uint32_t bf16x2_as_bits(__nv_bfloat162 pair) { return *reinterpret_cast<uint32_t*>(&pair); }

// ---- kernels that overlap ----------------------------------------------------------------------------------------
// A kernel launched to overlap starts once every CTA of the kernel before it in the stream has called
// let_next_kernel_start() or ended. wait_for_previous_kernel() returns when that kernel has ended and its writes are
// visible.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Asks the L2 for a line. It only hints, so it may come before wait_for_previous_kernel().
__device__ __forceinline__ void prefetch_l2(void const* address) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
}

// ---- shared-memory tiles ---------------------------------------------------------------------------------------
// A panel is rows of 64 bf16 (128 bytes) with the 128-byte swizzle of TMA and WGMMA: 16-byte unit u of row r lies at
// unit u ^ (r % 8). The panel starts at a multiple of 1024 bytes.
constexpr int kPanelRowBytes = 128;

// The cache hint of what a kernel reads once.
constexpr uint64_t kStreamed = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

__device__ __forceinline__ uint32_t panel_offset(int row, int unit) {
  return row * kPanelRowBytes + ((unit ^ (row & 7)) << 4);
}

// A 4-byte word at a shared-memory address plus a constant, for addresses that the compiler would not know as shared.
template <int kOffset>
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(word) : "r"(address), "n"(kOffset) : "memory");
  return word;
}
template <int kOffset>
__device__ __forceinline__ void store_word(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0 + %1], %2;" : : "r"(address), "n"(kOffset), "r"(word) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], void const* smem) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<cute::uint128_t const*>(smem), r[0], r[1], r[2], r[3]);
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], void const* smem) {
  cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<cute::uint128_t const*>(smem), r[0], r[1], r[2], r[3]);
}
__device__ __forceinline__ void stmatrix_x4(void* smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  cute::SM90_U32x4_STSM_N::copy(r0, r1, r2, r3, *reinterpret_cast<cute::uint128_t*>(smem));
}
__device__ __forceinline__ void stmatrix_x4_trans(void* smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  cute::SM90_U16x8_STSM_T::copy(r0, r1, r2, r3, *reinterpret_cast<cute::uint128_t*>(smem));
}

// ---- warp-level MMA ----------------------------------------------------------------------------------------------
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2],
                                            d[3]);
}
// Over 8 of the inner index.
__device__ __forceinline__ void mma_bf16_8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  cute::SM80_16x8x8_F32BF16BF16F32_TN::fma(d[0], d[1], d[2], d[3], a0, a1, b, d[0], d[1], d[2], d[3]);
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  cute::SM80_16x8x8_F32TF32TF32F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2],
                                           d[3]);
}

// ---- WGMMA, A from registers, B from panels ----------------------------------------------------------------------
using GmmaMajor = cute::SM90::GMMA::Major;
using GmmaScale = cute::SM90::GMMA::ScaleOut;

// Where something lies in shared memory, in units of 16 bytes.
struct Place {
  uint32_t units;
  __device__ __forceinline__ explicit Place(void const* smem) : Place(cute::cast_smem_ptr_to_uint(smem) >> 4) {}
  __device__ __forceinline__ explicit Place(uint32_t units) : units(units) {}
  __device__ __forceinline__ Place operator+(uint32_t bytes) const { return Place(units + (bytes >> 4)); }
};
// The same, in a uniform register: WGMMA takes its descriptors from there. What the compiler does not know to be the same
// in all lanes it moves there by two slow instructions a product. Where the code branches it forgets.
__device__ __forceinline__ Place uniform_place(void const* smem) {
  Place at(smem);
  asm volatile("redux.sync.or.b32 %0, %0, 0xffffffff;" : "+r"(at.units));
  return at;
}

// Descriptors of panels under the 128-byte swizzle, 1024 bytes from 8 rows to the next 8.
__device__ __forceinline__ uint64_t panel_desc(Place at, uint32_t leading_bytes) {
  constexpr uint32_t kUpper = 1u << 30 | 1024 >> 4;
  return static_cast<uint64_t>(kUpper) << 32 | (at.units + (leading_bytes >> 4 << 16));
}
// B whose rows are N and whose 64-wide panel rows run along K. It does not look at the leading bytes.
__device__ __forceinline__ uint64_t desc_k_major(Place panel) { return panel_desc(panel, 0); }
// B whose rows are K and whose panel rows run along N; `panel_bytes` from one 64-wide panel to the next.
__device__ __forceinline__ uint64_t desc_mn_major(Place panel, uint32_t panel_bytes) {
  return panel_desc(panel, panel_bytes);
}

template <size_t... I>
__device__ __forceinline__ void wgmma_k_impl(float (&d)[32], uint32_t const* a, uint64_t desc, GmmaScale scale_d,
                                             std::index_sequence<I...>) {
  cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<GmmaMajor::K, GmmaMajor::K>::fma(a[0], a[1], a[2], a[3], desc, d[I]...,
                                                                                 scale_d);
}
template <size_t... I>
__device__ __forceinline__ void wgmma_k_impl(float (&d)[16], uint32_t const* a, uint64_t desc, GmmaScale scale_d,
                                             std::index_sequence<I...>) {
  if (scale_d == GmmaScale::One) {
    cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<GmmaMajor::K, GmmaMajor::K>::fma(a[0], a[1], a[2], a[3], desc,
                                                                                   d[I]..., scale_d);
  } else {
    // Not CuTe's atom, whose accumulators go in as well as out: two products whose accumulators start undefined would
    // share virtual registers, and ptxas (13.0) then takes what is made of one for what is made of the other.
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 0, 1, 1, 0;"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), "=f"(d[7]), "=f"(d[8]),
          "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]), "=f"(d[14]), "=f"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc));
  }
}
template <size_t... I>
__device__ __forceinline__ void wgmma_n128_mn_impl(float (&d)[64], uint32_t const* a, uint64_t desc,
                                                   std::index_sequence<I...>) {
  cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<GmmaMajor::K, GmmaMajor::MN>::fma(a[0], a[1], a[2], a[3], desc,
                                                                                   d[I]..., GmmaScale::One);
}

// d[64 x kRows] (+)= a[64 x kPanels*64] * B^T, B being kRows rows of `kPanels` K-major panels of 64 rows each. Of the
// (last) panel only the first 16 * kSteps of K, where the rest is known to be zero.
template <int kPanels, int kSteps = 4, int kFloats>
__device__ __forceinline__ void wgmma_k_major(float (&d)[kFloats], uint32_t const (&a)[16 * kPanels], Place panels,
                                              bool accumulate) {
  static_assert(kFloats == 16 || kFloats == 32);  // 32 or 64 rows
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int s = 0; s < (p + 1 < kPanels ? 4 : kSteps); ++s) {  // 16 of K: 32 bytes along a panel row
      GmmaScale const scale_d = (accumulate || p || s) ? GmmaScale::One : GmmaScale::Zero;
      wgmma_k_impl(d, &a[16 * p + 4 * s], desc_k_major(panels + (p * 64 * kPanelRowBytes + 32 * s)), scale_d,
                   std::make_index_sequence<kFloats>{});
    }
  }
}
// d[64 x 128] += a[64 x 64] * B, B in two MN-major panels of 64 rows.
__device__ __forceinline__ void wgmma_mn_major(float (&d)[64], uint32_t const (&a)[16], Place panels) {
#pragma unroll
  for (int s = 0; s < 4; ++s)  // 16 of K: 16 panel rows
    wgmma_n128_mn_impl(d, &a[4 * s], desc_mn_major(panels + 16 * kPanelRowBytes * s, 64 * kPanelRowBytes),
                       std::make_index_sequence<64>{});
}

// Keeps the compiler from moving reads or writes of registers across an asynchronous WGMMA that owns them.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(r[i]);
}

}  // namespace kda
