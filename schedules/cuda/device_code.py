"""Device functions of the kernels: what TensorIR has no words for. Each has a plain form in TensorIR where it is used.

Fragments are those of `mma.m16n8k16` (PTX ISA, section 9.7.14): with lane l, register r of a 16 x 8 tile holds row
l / 4 + 8 (r / 2), column 2 (l % 4) + r % 2. Shared tiles are row-major, k fastest, `LD` elements from row to row.
"""

from __future__ import annotations


def once(name: str, source: str) -> str:
    """TVM emits the source anew for every function name that is called from it."""
    return f"\n#ifndef {name}\n#define {name}\n{source.strip()}\n#endif\n"


PUT = once(
    "TS_PUT",
    r"""
template <typename T> __device__ __forceinline__ void ts_put(void* to, T value) { *(T*)to = value; }
""",
)

COPY = once(
    "TS_COPY",
    r"""
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void ts_copy16(void* to, const void* from, bool valid) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void ts_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void ts_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else
__device__ __forceinline__ void ts_copy16(void* to, const void* from, bool valid) {
  *(uint4*)to = valid ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
}
__device__ __forceinline__ void ts_commit() {}
template <int N> __device__ __forceinline__ void ts_wait() {}
#endif
""",
)

MMA = once(
    "TS_MMA",
    r"""
__device__ __forceinline__ void ts_ldmatrix(unsigned* r, const void* from) {
  unsigned address = (unsigned)__cvta_generic_to_shared(from);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
#if __CUDA_ARCH__ >= 800
template <bool BF16> __device__ __forceinline__ void ts_mma1(float* c, const unsigned* a, const unsigned* b) {
  if constexpr (BF16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else  // sm_75 has half of it, and no bfloat16
template <bool BF16> __device__ __forceinline__ void ts_mma1(float* c, const unsigned* a, const unsigned* b) {
#pragma unroll
  for (int k = 0; k < 2; ++k)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
}
#endif
template <int NI, int LD> __device__ __forceinline__ void ts_load_b(unsigned (*f)[2], const void* from) {
  int lane = threadIdx.x & 31;
  const unsigned short* b = (const unsigned short*)from;
  b += ((lane & 7) + ((lane >> 4) << 3)) * LD + ((lane >> 3) & 1) * 8;
#pragma unroll
  for (int n = 0; n < NI; n += 2) ts_ldmatrix(f[n], b + n * 8 * LD);
}
template <int LD> __device__ __forceinline__ void ts_load_a(unsigned* f, const void* from, int m) {
  int lane = threadIdx.x & 31;
  ts_ldmatrix(f, (const unsigned short*)from + (m * 16 + (lane & 15)) * LD + (lane >> 4) * 8);
}
// c (MI x NI tiles) += a b^T over 16 of k
template <bool BF16, int MI, int NI, int LD>
__device__ __forceinline__ void ts_mma(float* c, const void* a, const void* b) {
  unsigned fb[NI][2], fa[4];
  ts_load_b<NI, LD>(fb, b);
#pragma unroll
  for (int m = 0; m < MI; ++m) {
    ts_load_a<LD>(fa, a, m);
#pragma unroll
    for (int n = 0; n < NI; ++n) ts_mma1<BF16>(c + (m * NI + n) * 4, fa, fb[n]);
  }
}
// the same for complex numbers: real and imaginary planes `pa` and `pb` elements apart, sums MI * NI * 4 apart
template <bool BF16, int MI, int NI, int LD>
__device__ __forceinline__ void ts_cmma(float* c, const void* a, int pa, const void* b, int pb) {
  unsigned br[NI][2], bi[NI][2], ar[4], ai[4], na[4];
  ts_load_b<NI, LD>(br, b);
  ts_load_b<NI, LD>(bi, (const unsigned short*)b + pb);
#pragma unroll
  for (int m = 0; m < MI; ++m) {
    ts_load_a<LD>(ar, a, m);
    ts_load_a<LD>(ai, (const unsigned short*)a + pa, m);
#pragma unroll
    for (int i = 0; i < 4; ++i) na[i] = ai[i] ^ 0x80008000u;
#pragma unroll
    for (int n = 0; n < NI; ++n) {
      float* re = c + (m * NI + n) * 4;
      float* im = re + MI * NI * 4;
      ts_mma1<BF16>(re, ar, br[n]);
      ts_mma1<BF16>(im, ar, bi[n]);
      ts_mma1<BF16>(re, na, bi[n]);
      ts_mma1<BF16>(im, ai, br[n]);
    }
  }
}
""",
)

# The same tiles and the same fragments for float32, without tensor cores.
FMA = once(
    "TS_FMA",
    r"""
template <int MI, int NI, int LD, int K>
__device__ __forceinline__ void ts_fma(float* c, const float* a, const float* b, float sign) {
  int lane = threadIdx.x & 31;
  const float* pa = a + (lane >> 2) * LD;
  const float* pb = b + (lane & 3) * 2 * LD;
#pragma unroll 2
  for (int k = 0; k < K; k += 4) {
    float4 vb[NI][2];
#pragma unroll
    for (int n = 0; n < NI; ++n) {
      vb[n][0] = *(const float4*)(pb + n * 8 * LD + k);
      vb[n][1] = *(const float4*)(pb + (n * 8 + 1) * LD + k);
    }
#pragma unroll
    for (int m = 0; m < 2 * MI; ++m) {
      float4 va = *(const float4*)(pa + m * 8 * LD + k);
      va.x *= sign; va.y *= sign; va.z *= sign; va.w *= sign;
#pragma unroll
      for (int n = 0; n < NI; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float* s = c + ((m >> 1) * NI + n) * 4 + (m & 1) * 2 + j;
          *s = fmaf(va.x, vb[n][j].x, *s);
          *s = fmaf(va.y, vb[n][j].y, *s);
          *s = fmaf(va.z, vb[n][j].z, *s);
          *s = fmaf(va.w, vb[n][j].w, *s);
        }
    }
  }
}
""",
)

# acc[a] += sum_d c[d] x[(a - d) mod N]: one circulant block by a vector, all in registers.
CIRCULANT = once(
    "TS_CIRCULANT",
    r"""
template <int N> __device__ __forceinline__ void ts_circulant(float* acc, const float* c, const float* x) {
#pragma unroll
  for (int d = 0; d < N; ++d)
#pragma unroll
    for (int a = 0; a < N; ++a) acc[a] = fmaf(c[d], x[(a - d + N) % N], acc[a]);
}
// acc[a] += sum_d c[d] w[a - d + D - 1], a < A, d < D: a Toeplitz part of a longer block, w its window of x
template <int A, int D> __device__ __forceinline__ void ts_toeplitz(float* acc, const float* c, const float* w) {
#pragma unroll
  for (int d = 0; d < D; ++d)
#pragma unroll
    for (int a = 0; a < A; ++a) acc[a] = fmaf(c[d], w[a - d + D - 1], acc[a]);
}
""",
)

# acc[0] += sum_k a[k] b[k]
DOT = once(
    "TS_DOT",
    r"""
template <int N> __device__ __forceinline__ void ts_dot(float* acc, const float* a, const float* b) {
#pragma unroll
  for (int k = 0; k < N; ++k) acc[0] = fmaf(a[k], b[k], acc[0]);
}
template <int N> __device__ __forceinline__ void ts_scale(float* acc, const float* a, const float* b) {
#pragma unroll
  for (int k = 0; k < N; ++k) acc[k] = fmaf(a[k], b[k], acc[k]);
}
""",
)
