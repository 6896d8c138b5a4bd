// Every operation of the emulator against what CUDA's manuals say it gives. Prints what differs; exit status 1
// then.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"

using namespace fastgen;

namespace {

int failures = 0;

void expect(bool right, const char* what, int thread, int line) {
  if (right) return;
  ++failures;
  std::printf("line %d, thread %d: %s\n", line, thread, what);
}
#define EXPECT(condition) expect(condition, #condition, static_cast<int>(threadIdx.x), __LINE__)

constexpr unsigned kAll = 0xffffffffu, kEven = 0x55555555u;

__global__ void shuffles() {
  const int lane = threadIdx.x % 32, value = 100 + static_cast<int>(threadIdx.x), base = value - lane;
  for (int width = 1; width <= 32; width *= 2) {
    const int first = lane / width * width;
    for (int n = 0; n < width; ++n) {
      EXPECT(__shfl_sync(kAll, value, n, width) == base + first + n);
      EXPECT(__shfl_up_sync(kAll, value, n, width) == base + (lane - n < first ? lane : lane - n));
      EXPECT(__shfl_down_sync(kAll, value, n, width) == base + (lane + n < first + width ? lane + n : lane));
      EXPECT(__shfl_xor_sync(kAll, value, n, width) == base + (lane ^ n));
    }
  }
  EXPECT(__shfl_sync(kAll, 0.5 * lane, 3) == 1.5);
  EXPECT(__shfl_sync(kAll, static_cast<unsigned long long>(lane) << 40, 2) == 2ull << 40);
  if (lane % 2 == 0) {
    EXPECT(__shfl_xor_sync(kEven, lane, 2) == (lane ^ 2));
    EXPECT(std::isnan(__shfl_xor_sync(kEven, 1.0f * lane, 1)));
  } else {
    EXPECT(__shfl_xor_sync(~kEven, lane, 4) == (lane ^ 4));
  }
}

__global__ void votes() {
  const int lane = threadIdx.x % 32, thread = threadIdx.x;
  EXPECT(__ballot_sync(kAll, lane % 2 == 0) == kEven);
  EXPECT(__any_sync(kAll, lane == 7) && !__any_sync(kAll, 0));
  EXPECT(__all_sync(kAll, 5) && !__all_sync(kAll, lane != 7));
  EXPECT(__match_any_sync(kAll, lane % 2) == (lane % 2 == 0 ? kEven : ~kEven));
  EXPECT(__reduce_add_sync(kAll, lane) == 496 && __reduce_max_sync(kAll, lane - 40) == -9);
  EXPECT(__reduce_min_sync(kAll, 3u + lane) == 3 && __reduce_min_sync(kAll, -lane) == -31);
  EXPECT(__reduce_or_sync(kAll, 1u << lane) == kAll && __reduce_and_sync(kAll, ~(1u << lane)) == 0);
  EXPECT(__reduce_xor_sync(kAll, 1u << lane) == kAll);
  EXPECT(__syncthreads_count(thread % 3 == 0) == 32 && __syncthreads_or(thread == 95));
  EXPECT(__syncthreads_and(1) && !__syncthreads_and(thread != 5) && !__syncthreads_or(0));
}

__global__ void atomics(unsigned* counter, unsigned long long* largest, int* owner) {
  atomicAdd(counter, 2u);
  atomicMax(largest, static_cast<unsigned long long>(threadIdx.x) << 33);
  atomicCAS(owner, -1, static_cast<int>(threadIdx.x));
}

__global__ void bits() {
  EXPECT(__umulhi(0xffffffffu, 0x10u) == 15 && __umul64hi(1ull << 63, 6) == 3);
  EXPECT(__popc(0xf0f0) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4);
  EXPECT(__byte_perm(0x33221100, 0x77665544, 0x7250) == 0x77225500);
  EXPECT(__funnelshift_l(0x80000000u, 1, 1) == 3 && __funnelshift_r(0, 1, 1) == 0x80000000u);
  EXPECT(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2);
  EXPECT(__bfloat16_as_ushort(__float2bfloat16_rn(1.00390625f)) == 0x3f80);
  EXPECT(__bfloat16_as_ushort(__float2bfloat16_rn(1.01171875f)) == 0x3f82);
  EXPECT(__half_as_ushort(__float2half_rn(65504.0f)) == 0x7bff && __half2float(__ushort_as_half(1)) == 0x1p-24f);
}

// Warps 0 and 1 produce, warp 2 consumes, through named barriers: 1 says full, 2 says empty.
__global__ void named_barriers() {
  FASTGEN_SHARED(int, slot, [64]);
  const int thread = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    if (thread < 64) {
      if (round > 0) barrier_sync(2, 96);
      slot[thread] = 10 * round + thread;
      barrier_arrive(1, 96);
    } else {
      barrier_sync(1, 96);
      EXPECT(slot[thread - 64] == 10 * round + thread - 64 && slot[thread - 32] == 10 * round + thread - 32);
      if (round < 2) barrier_arrive(2, 96);
    }
  }
}

template <class T>
std::uint32_t pack(T low, T high) {
  return std::uint32_t{high.x} << 16 | low.x;
}

// A tile through ldmatrix (B transposed on the way) and mma, and another whose fragments are put together by hand.
template <class T, class Mma>
__global__ void tensor_cores(const float* a, const float* b, Mma mma) {
  FASTGEN_SHARED(T, left, [16][16]);
  FASTGEN_SHARED(T, right, [16][8]);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) left[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) right[i / 8][i % 8] = b[i];
  __syncwarp();
  std::uint32_t fragment_a[4], fragment_b[4];
  ldmatrix_x4(fragment_a, &left[lane % 16][lane / 16 * 8]);
  ldmatrix_x4_trans(fragment_b, &right[lane % 16][0]);
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
    EXPECT(fragment_a[i] == pack(left[row][column], left[row][column + 1]));
  }
  for (int i = 0; i < 2; ++i) EXPECT(fragment_b[i] == pack(right[2 * t + 8 * i][g], right[2 * t + 8 * i + 1][g]));
  float c[4] = {1, 2, 3, 4}, d[4];
  mma(d, fragment_a, reinterpret_cast<const std::uint32_t (&)[2]>(fragment_b), c);
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    float expected = c[i];
    for (int k = 0; k < 16; ++k) expected += a[16 * row + k] * b[8 * k + column];
    EXPECT(d[i] == expected);
  }
}

__global__ void tf32(const float* a, const float* b) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  std::uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i) fragment_a[i] = __float_as_uint(a[16 * (g + i % 2 * 8) + t + i / 2 * 4]) | 0x1000;
  for (int i = 0; i < 2; ++i) fragment_b[i] = __float_as_uint(b[8 * (t + 4 * i) + g]) | 0x1fff;
  float d[4] = {};
  mma_m16n8k8_tf32(d, fragment_a, fragment_b, d);
  for (int i = 0; i < 4; ++i) {
    float expected = 0;
    for (int k = 0; k < 8; ++k) expected += a[16 * (g + i / 2 * 8) + k] * b[8 * k + 2 * t + i % 2];
    EXPECT(d[i] == expected);
  }
}

// Bytes beyond `valid` are zero, groups end in order, and nothing is there before the wait.
__global__ void copies(const float* from) {
  FASTGEN_SHARED(float4, to, [2][32]);
  const int lane = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    cp_async_16(&to[stage][lane], from + 4 * lane, stage == 0 ? 16 : 8);
    cp_async_commit();
  }
  EXPECT(std::isnan(to[0][lane].x));
  cp_async_wait<1>();
  EXPECT(to[0][lane].w == from[4 * lane + 3] && std::isnan(to[1][lane].x));
  cp_async_wait<0>();
  EXPECT(to[1][lane].y == from[4 * lane + 1] && to[1][lane].z == 0 && to[1][lane].w == 0);
}

}  // namespace

int main() {
  // Small whole numbers: every sum is exact, in whatever order.
  std::vector<float> a(256), b(128);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(static_cast<int>(i * 37 % 17) - 8);
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(static_cast<int>(i * 53 % 13) - 6);
  unsigned counter = 0;
  unsigned long long largest = 0;
  int owner = -1;
  for (unsigned seed = 0; seed < 3; ++seed) {
    emulation::launch({1, 64, 0, seed}, shuffles);
    emulation::launch({1, 96, 0, seed}, votes);
    emulation::launch({2, 64, 0, seed}, [&] { atomics(&counter, &largest, &owner); });
    emulation::launch({1, 1, 0, seed}, bits);
    emulation::launch({1, 96, 0, seed}, named_barriers);
    emulation::launch({1, 32, 0, seed}, [&] {
      tensor_cores<__nv_bfloat16>(a.data(), b.data(), [](auto&... x) { mma_m16n8k16_bf16(x...); });
    });
    emulation::launch({1, 32, 0, seed}, [&] {
      tensor_cores<__half>(a.data(), b.data(), [](auto&... x) { mma_m16n8k16_f16(x...); });
    });
    emulation::launch({1, 32, 0, seed}, [&] { tf32(a.data(), b.data()); });
    emulation::launch({1, 32, 0, seed}, [&] { copies(a.data()); });
  }
  if (counter != 3 * 256 || largest != 63ull << 33 || owner < 0 || owner > 63) {
    ++failures;
    std::printf("atomics: %u, %llu, %d\n", counter, largest, owner);
  }
  return failures == 0 ? 0 : 1;
}
