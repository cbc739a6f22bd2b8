// Host side of the layer's kernels: shape choice and launches.
#include <cuda_runtime.h>

#include <algorithm>

#include "kda_cutlass/device.h"
#include "kda_cutlass/layer/conv.cuh"
#include "kda_cutlass/layer/linears.cuh"
#include "kda_cutlass/layer/norm.cuh"
#include "kda_cutlass/layer/resident.cuh"

namespace kda {
namespace {

// Tokens a thread of the convolution walks. Longer runs read fewer tokens twice (W - 1 of each), shorter ones fill the
// card.
constexpr int kLongRun = 32;
constexpr int kShortRun = 8;
constexpr int64_t kEnoughBlocks = 1024;  // about two waves of an H200 at the convolution's registers

constexpr int kMostSharedBytes = 227 * 1024;  // of a CTA

int64_t pieces(int64_t work, int64_t each) { return (work + each - 1) / each; }

// Launches a kernel that may start while the one before it still runs: each of them waits before it touches what that
// one may read or write. In a decode step of a layer this hides most of the launches and the first reads of the
// weights.
template <class... Params, class... Args>
cudaError_t launch_with(int shared_bytes, void (*kernel)(Params...), unsigned blocks, int threads, cudaStream_t stream,
                        Args const&... args) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), unsigned blocks, int threads, cudaStream_t stream, Args const&... args) {
  return launch_with(0, kernel, blocks, threads, stream, args...);
}

struct ConvGrid {
  int64_t channel_blocks;
  int run, runs;
  bool whole;

  explicit ConvGrid(ConvParams const& p) {
    channel_blocks = pieces(int64_t(p.parts) * p.channels / kVectorChannels, kConvThreads);
    run = kLongRun;
    while (run > kShortRun && channel_blocks * p.batch * pieces(p.tokens, run) < kEnoughBlocks) run /= 2;
    runs = static_cast<int>(pieces(p.tokens, run));
    whole = p.final_state && !p.cu_seqlens && runs == 1;
  }
  unsigned conv_blocks(ConvParams const& p) const { return static_cast<unsigned>(channel_blocks * p.batch * runs); }
  unsigned state_blocks(ConvParams const& p) const { return static_cast<unsigned>(channel_blocks * p.num_seqs); }
};

template <int kWidth, int kColumns>
cudaError_t launch_conv_shape(ConvParams const& p, cudaStream_t stream) {
  ConvGrid const grid(p);
  if (unsigned const blocks = grid.conv_blocks(p)) {
    auto* const kernel = p.cu_seqlens ? conv_kernel<kWidth, kColumns, true> : conv_kernel<kWidth, kColumns, false>;
    cudaError_t const error = launch(kernel, blocks, kConvThreads, stream, p, grid.run, grid.runs, grid.whole);
    if (error != cudaSuccess) return error;
  }
  if (p.final_state && !grid.whole && p.num_seqs > 0) {
    return launch(conv_state_kernel<kColumns>, grid.state_blocks(p), kConvThreads, stream, p);
  }
  return cudaSuccess;
}

template <int kWidth>
cudaError_t launch_conv_width(ConvParams const& p, cudaStream_t stream) {
  return p.columns == kWidth ? launch_conv_shape<kWidth, kWidth>(p, stream)
                             : launch_conv_shape<kWidth, kWidth - 1>(p, stream);
}

template <int kChannels>
cudaError_t launch_norm_channels(GatedNormParams const& p, cudaStream_t stream) {
  int64_t const rows = int64_t(kNormThreads) * kVectorChannels / kChannels * kNormRows;
  return launch(gated_norm_kernel<kChannels>, static_cast<unsigned>(pieces(p.rows, rows)), kNormThreads, stream, p);
}

}  // namespace

cudaError_t launch_conv(ConvParams const& p, cudaStream_t stream) {
  return p.width == 2   ? launch_conv_width<2>(p, stream)
         : p.width == 3 ? launch_conv_width<3>(p, stream)
                        : launch_conv_width<4>(p, stream);
}

cudaError_t launch_linears(LinearsParams p, cudaStream_t stream) {
  LinearJob const* const end = p.jobs + p.count;
  if (p.rows == 1 &&
      std::all_of<LinearJob const*>(p.jobs, end, [&](LinearJob const& job) { return job.x == p.jobs[0].x; })) {
    cudaError_t const error = once_a_device([] { return prefer_shared_memory(row_linears_kernel); });
    if (error != cudaSuccess) return error;
    int64_t const needed = pieces(end[-1].first_output + end[-1].outputs, kRowWarps), most = kRowBlocks * sm_count();
    return launch(row_linears_kernel, static_cast<unsigned>(std::min(needed, most)), 32 * kRowWarps, stream, p);
  }
  auto* const kernel = p.rows > 2 * kLinearRowTile ? linears_kernel<4>
                       : p.rows > kLinearRowTile   ? linears_kernel<2>
                                                   : linears_kernel<1>;
  unsigned blocks = 0;
  for (int job = 0; job < p.count; ++job) {
    p.jobs[job].first_block = static_cast<int>(blocks);
    blocks += static_cast<unsigned>(pieces(p.jobs[job].outputs, kLinearOutputs));
  }
  return launch(kernel, blocks, 32 * kLinearWarps, stream, p);
}

namespace {

template <int kPairs>  // at most kResidentMost outputs
cudaError_t launch_resident(ResidentParams const& p, cudaStream_t stream) {
  auto* const kernel = resident_linears_kernel<kPairs>;
  cudaError_t const error = once_a_device([=] {
    cudaError_t const allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes);
    return allowed != cudaSuccess ? allowed : prefer_shared_memory(kernel);
  });
  if (error != cudaSuccess) return error;
  return launch_with(ResidentLayout(p.depth, kPairs).bytes, kernel,
                     static_cast<unsigned>(pieces(p.job.outputs, p.each)), 32 * kResidentWarps, stream, p);
}

}  // namespace

cudaError_t launch_last_linear(LinearsParams p, cudaStream_t stream) {
  int const each = static_cast<int>(pieces(p.jobs[0].outputs, sm_count()));
  ResidentParams const resident{p.jobs[0], p.depth, p.rows, each, p.out};
  auto fits = [&](int pairs) { return each <= 2 * pairs && ResidentLayout(p.depth, pairs).bytes <= kMostSharedBytes; };
  return p.rows > kResidentRows || p.depth % kResidentStep != 0 ? launch_linears(p, stream)
         : fits(3)                                              ? launch_resident<3>(resident, stream)
         : fits(6)                                              ? launch_resident<6>(resident, stream)
         : fits(9)                                              ? launch_resident<9>(resident, stream)
         : fits(12)                                             ? launch_resident<12>(resident, stream)
                                                                : launch_linears(p, stream);
}

cudaError_t launch_gated_norm(GatedNormParams const& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return p.channels == 64    ? launch_norm_channels<64>(p, stream)
         : p.channels == 128 ? launch_norm_channels<128>(p, stream)
                             : launch_norm_channels<256>(p, stream);
}

}  // namespace kda
