// Host side of the layer's kernels: shape choice and launches.
#include <cuda_runtime.h>

#include "kda_cutlass/layer/conv.cuh"
#include "kda_cutlass/layer/linears.cuh"
#include "kda_cutlass/layer/norm.cuh"

namespace kda {
namespace {

// Tokens a thread of the convolution walks. Longer runs read fewer tokens twice (W - 1 of each), shorter ones fill the
// card.
constexpr int kLongRun = 32;
constexpr int kShortRun = 8;
constexpr int64_t kEnoughBlocks = 1024;  // about two waves of an H200 at the convolution's registers

int64_t pieces(int64_t work, int64_t each) { return (work + each - 1) / each; }

// Launches a kernel that may start while the one before it still runs: each of them waits before it touches what that
// one may read or write. In a decode step of a layer this hides most of the launches and the first reads of the
// weights.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), unsigned blocks, int threads, cudaStream_t stream, Args const&... args) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
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
  struct Variant {
    void (*kernel)(LinearsParams);
    int outputs, threads;  // of a block
  };
  auto vector = [](auto shape) -> Variant {
    return {linear_vector_kernel<decltype(shape)>, decltype(shape)::kBlockOutputs, 32 * kVectorWarps};
  };
  auto matrix = [](void (*kernel)(LinearsParams)) -> Variant { return {kernel, kLinearOutputs, 32 * kLinearWarps}; };
  Variant const variant = p.rows > 2 * kLinearRowTile        ? matrix(linears_kernel<4>)
                          : p.rows > kLinearRowTile          ? matrix(linears_kernel<2>)
                          : p.rows > 1                       ? matrix(linears_kernel<1>)
                          : p.depth <= ShallowVector::kDepth ? vector(ShallowVector{})
                                                             : vector(WideVector{});
  unsigned blocks = 0;
  for (int job = 0; job < p.count; ++job) {
    p.jobs[job].first_block = static_cast<int>(blocks);
    blocks += static_cast<unsigned>(pieces(p.jobs[job].outputs, variant.outputs));
  }
  return launch(variant.kernel, blocks, variant.threads, stream, p);
}

cudaError_t launch_gated_norm(GatedNormParams const& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return p.channels == 64    ? launch_norm_channels<64>(p, stream)
         : p.channels == 128 ? launch_norm_channels<128>(p, stream)
                             : launch_norm_channels<256>(p, stream);
}

}  // namespace kda
