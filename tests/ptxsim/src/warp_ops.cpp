// Instructions of a whole warp: shuffles, votes, matrix products. `m` holds every lane of the member mask.
#include "machine.h"

namespace ptxsim {

void do_shfl(Warp& w, const Ins& i, u32 m) {  // mode: 0 up, 1 down, 2 bfly, 3 idx
  u32 in[32], out[32], p = 0;
  memcpy(in, w.at(i.s[0]), sizeof in);
  if (i.s[0].size != 4) throw Unsupported("shfl of an operand that isn't 32 bits");
  for (u32 mm = m; mm; mm &= mm - 1) {
    const int l = __builtin_ctz(mm);
    const int b = int(w.raw(i.s[1], l)) & 31, c = int(w.raw(i.s[2], l)), segment = c >> 8 & 31, clamp = c & 31;
    const int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int j = i.mode == 0 ? l - b : i.mode == 1 ? l + b : i.mode == 2 ? l ^ b : first | (b & ~segment);
    const bool inside = i.mode == 0 ? j >= last : j <= last;
    if (!inside) j = l;
    if (!(m >> j & 1))
      finding("shfl" + std::to_string(i.line), "SHUFFLE reads lane " + std::to_string(j) +
                                                   ", which does not take part, by " + who(w, l) + " at " +
                                                   where(*w.cta->k, i));
    out[l] = in[j];
    p |= u32(inside) << l;
  }
  LANES(w.D<u32>(i.d)[l] = out[l];)
  if (i.d2.size) w.set_pred(i.d2, m, p);
}
void do_vote(Warp& w, const Ins& i, u32 m) {  // mode: 0 all, 1 any, 2 uni, 3 ballot, 4 elect
  if (i.mode == 4) {
    w.set_pred(i.d2, m, m & -m);
    if (i.d.size) {
      LANES(w.D<u32>(i.d)[l] = u32(__builtin_ctz(m));)
    }
    return;
  }
  const u32 p = w.pred(i.s[0]) & m;
  if (i.mode == 3) {
    LANES(w.D<u32>(i.d)[l] = p;)
    return;
  }
  w.set_pred(i.d, m, (i.mode == 0 ? p == m : i.mode == 1 ? p != 0 : p == 0 || p == m) ? ~0u : 0);
}
void do_match(Warp& w, const Ins& i, u32 m) {  // mode: all
  u32 out[32], all = ~0u;
  LANES(u32 r = 0; for (u32 q = m; q; q &= q - 1) r |= u32(w.raw(i.s[0], __builtin_ctz(q)) == w.raw(i.s[0], l))
                                                       << __builtin_ctz(q);
        out[l] = r; if (r != m) all = 0;)
  LANES(w.D<u32>(i.d)[l] = i.mode ? m & all : out[l];)
  if (i.d2.size) w.set_pred(i.d2, m, all);
}
namespace {
template <class T>
void redux(Warp& w, const Ins& i, u32 m) {  // mode: 0 add, 1 min, 2 max, 5 and, 6 or, 7 xor
  T r = w.S<T>(i.s[0])[__builtin_ctz(m)];
  for (u32 mm = m & (m - 1); mm; mm &= mm - 1) {
    const T x = w.S<T>(i.s[0])[__builtin_ctz(mm)];
    r = i.mode == 0   ? r + x
        : i.mode == 1 ? std::min(r, x)
        : i.mode == 2 ? std::max(r, x)
        : i.mode == 5 ? r & x
        : i.mode == 6 ? r | x
                      : r ^ x;
  }
  LANES(w.D<T>(i.d)[l] = r;)
}
}  // namespace
void do_redux_signed(Warp& w, const Ins& i, u32 m) { redux<i32>(w, i, m); }
void do_redux_unsigned(Warp& w, const Ins& i, u32 m) { redux<u32>(w, i, m); }
void do_activemask(Warp& w, const Ins& i, u32 m) { LANES(w.D<u32>(i.d)[l] = m;) }
void do_syncwarp(Warp& w, const Ins&, u32 m) {
  Cta& c = *w.cta;
  if (c.k->vector_clocks) {
    vector<u32> together;
    LANES(c.teach(w.id * 32 + l, together);)
    LANES(c.learn(w.id * 32 + l, together);)
  }
  LANES(for (u32 q = m; q; q &= q - 1) {
    const int o = __builtin_ctz(q);
    w.seen[l][o] = std::max(w.seen[l][o], c.clock[w.id * 32 + o]);
  })
  LANES(c.clock[w.id * 32 + l]++;)
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrices

namespace {
void whole_warp(const Warp& w, const Ins& i, u32 m) {
  if (m != ~0u)
    throw Stop("MATRIX instruction by part of a warp, " + who(w, __builtin_ctz(m)) + " at " + where(*w.cta->k, i));
}
}  // namespace
// mma.sync.m16n8k{4,8,16,32}.row.col with fp32 accumulators; v: d a b c. mode: 0 bf16, 1 f16, 2 tf32
void do_mma(Warp& w, const Ins& i, u32 m) {
  whole_warp(w, i, m);
  const int k = int(i.imm), na = i.mode == 2 ? k / 2 : k / 4, nb = na / 2;
  float A[16][32], B[32][8];
  double C[16][8];
  const auto half = [&](u32 x, int h) {
    return i.mode == 0 ? bf_to_float(u16(x >> 16 * h)) : half_to_float(u16(x >> 16 * h));
  };
  for (int l = 0; l < 32; l++) {
    const int g = l / 4, t = l % 4;
    const auto element = [&](int r) { return u32(w.raw(i.v[r], l)); };
    const auto tf32 = [&](int r) { return bits<float>(element(r) & 0xffffe000u); };
    for (int r = 0; r < na; r++) {
      const int row = g + 8 * (r & 1);
      if (i.mode == 2)
        A[row][t + 4 * (r >> 1)] = tf32(4 + r);
      else
        for (int h = 0; h < 2; h++) A[row][2 * t + h + 8 * (r >> 1)] = half(element(4 + r), h);
    }
    for (int r = 0; r < nb; r++) {
      if (i.mode == 2)
        B[t + 4 * r][g] = tf32(4 + na + r);
      else
        for (int h = 0; h < 2; h++) B[2 * t + h + 8 * r][g] = half(element(4 + na + r), h);
    }
    for (int r = 0; r < 4; r++) C[g + 8 * (r >> 1)][2 * t + (r & 1)] = bits<float>(element(4 + na + nb + r));
  }
  // mma_bits: as tensor cores were measured to do, addends are cut off so many bits below the largest, then the sum at
  // 23
  for (int a = 0; a < 16; a++)
    for (int b = 0; b < 8; b++) {
      double top = std::fabs(C[a][b]);
      for (int q = 0; q < k; q++) top = std::max(top, std::fabs(double(A[a][q]) * B[q][b]));
      if (opt.mma_bits && top > 0 && std::isfinite(top) && !std::isnan(C[a][b])) {
        const int e = std::ilogb(top) - int(opt.mma_bits);
        double sum = std::trunc(std::ldexp(C[a][b], -e));
        for (int q = 0; q < k; q++) sum += std::trunc(std::ldexp(double(A[a][q]) * B[q][b], -e));
        sum = std::ldexp(sum, e);
        const int f = sum == 0 ? 0 : std::ilogb(sum) - 23;
        C[a][b] = std::ldexp(std::trunc(std::ldexp(sum, -f)), f);
      } else {
        for (int q = 0; q < k; q++) C[a][b] += double(A[a][q]) * B[q][b];
      }
    }
  for (int l = 0; l < 32; l++)
    for (int r = 0; r < 4; r++) w.D<float>(i.v[r])[l] = float(C[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)]);
  ledger.mma_flops += u64(2) * 16 * 8 * k;
}
void do_movmatrix(Warp& w, const Ins& i, u32 m) {  // .m8n8.trans.b16
  whole_warp(w, i, m);
  u16 matrix[8][8];
  for (int l = 0; l < 32; l++)
    for (int h = 0; h < 2; h++) matrix[l / 4][2 * (l % 4) + h] = u16(u32(w.raw(i.s[0], l)) >> 16 * h);
  for (int l = 0; l < 32; l++) {
    const int r = l / 4, c = 2 * (l % 4);
    w.D<u32>(i.d)[l] = u32(matrix[c + 1][r]) << 16 | matrix[c][r];
  }
}
void do_ldmatrix(Warp& w, const Ins& i, u32 m) {  // mode: transposed
  whole_warp(w, i, m);
  for (int x = 0; x < i.vec; x++) {
    u16 matrix[8][8];
    u64 addresses[8];
    for (int r = 0; r < 8; r++) {
      addresses[r] = address(w, i, 8 * x + r, i.s[0]);
      memcpy(matrix[r], resolve(w, i, 8 * x + r, SHARED, addresses[r], 16, false), 16);
    }
    if (opt.ledger) ledger_access(SHARED, false, 16, 8, addresses);
    for (int l = 0; l < 32; l++) {
      const int r = l / 4, c = 2 * (l % 4);
      w.D<u32>(i.v[x])[l] =
          i.mode ? u32(matrix[c + 1][r]) << 16 | matrix[c][r] : u32(matrix[r][c + 1]) << 16 | matrix[r][c];
    }
  }
}
void do_stmatrix(Warp& w, const Ins& i, u32 m) {
  whole_warp(w, i, m);
  for (int x = 0; x < i.vec; x++) {
    u16 matrix[8][8];
    for (int l = 0; l < 32; l++) {
      const int r = l / 4, c = 2 * (l % 4);
      const u32 v = u32(w.raw(i.v[x], l));
      (i.mode ? matrix[c][r] : matrix[r][c]) = u16(v);
      (i.mode ? matrix[c + 1][r] : matrix[r][c + 1]) = u16(v >> 16);
    }
    u64 addresses[8];
    for (int r = 0; r < 8; r++) {
      addresses[r] = address(w, i, 8 * x + r, i.s[0]);
      memcpy(resolve(w, i, 8 * x + r, SHARED, addresses[r], 16, true), matrix[r], 16);
    }
    if (opt.ledger) ledger_access(SHARED, true, 16, 8, addresses);
  }
}

}  // namespace ptxsim
