// Sums over the rows of an adapter, or of all, block by block in their order: dA and dB, strip of columns by strip, and the
// gradient of the base weight, part by part.
#pragma once

#include "memory.h"

namespace ctxkern {
namespace {

template <class W>
class LoraSums {
 public:
  using Memory = LoraMemory<W>;
  using Source = typename Memory::Source;
  using Strip = typename Memory::Strip;
  using Piece = typename Memory::Piece;
  static constexpr int64_t NR = Memory::NR;

  LoraSums(const LoraCall& call, const Memory& memory) : q(call), memory_(memory) {}

  // Rows of a piece, for all sums that read them.
  void lay_out_x(const Piece& b) const {
    if (memory_.x_words) lay_out(b, memory_.x_of(b), memory_.x_words + memory_.words_at(b.of, q.d_in));
  }
  void lay_out_dy(const Piece& b) const {
    if (memory_.dy_words) lay_out(b, memory_.dy_of(b), memory_.dy_words + memory_.words_at(b.of, q.d_out));
  }

  // A strip of columns of dA_u or, after those, of dB_u.
  void strip(int64_t u, int64_t s, int thread) const {
    const int64_t of_a = memory_.strips_of_a();
    const bool is_a = s < of_a;
    const int64_t width = is_a ? q.d_in : q.d_out, strip = memory_.strip_width, c = (is_a ? s : s - of_a) * strip;
    const int64_t columns = least(width - c, strip), rank = q.rank_of(u);
    const Strip at = memory_.strip(thread);
    for (int64_t k = 0; k < q.rank; k += kBlockRows) {
      const int64_t ranks = least(rank - k, kBlockRows);
      Out out{reinterpret_cast<char*>(at.total), strip * 4, Store::f32, round_up(columns, VL)};
      for (int64_t i = q.block_first[u]; ranks > 0 && i < q.block_first[u + 1]; ++i) {
        const int64_t steps = words<W>(q.blocks[i].count);
        const float* const left = (is_a ? memory_.turned_g : memory_.turned_h) + memory_.turned_at(i) + k * steps;
        product_wide<W>(ranks, steps, {reinterpret_cast<const char*>(left), steps * 4, 4},
                        strip_of(i, is_a, c, columns, ranks, at), out);
        out.store = Store::f32_add;
      }
      const int64_t all = least(q.rank - k, kBlockRows);
      for (int64_t i = ranks > 0 ? ranks : 0; i < all; ++i) std::memset(at.total + i * strip, 0, strip * 4);
      char* const to = is_a ? q.dA : q.dB;
      const Dtype dtype = is_a ? q.A.dtype : q.B.dtype;
      if (is_a == q.turned) {
        write_turned(dtype, to + (q.slot(u) * width + c) * q.rank * size_of(dtype), k, all, columns, at.total);
      } else {
        write(dtype, to + (q.slot(u) * q.rank * width + c) * size_of(dtype), width, k, all, columns, at.total);
      }
    }
  }

  // A part of the gradient of the base weight, of kPartRows rows and kStrip columns as they lie in memory.
  void part(int64_t i, int thread) const {
    const bool turned = memory_.weight_turned();
    const int64_t height = memory_.weight_rows(), width = memory_.weight_columns();
    const int64_t across = (width + kStrip - 1) / kStrip, m = i / across * kPartRows, n = i % across * kStrip;
    const int64_t rows = least(height - m, kPartRows), columns = least(width - n, kStrip);
    float* const sums = memory_.strip(thread).part;
    Out out{reinterpret_cast<char*>(sums), kStrip * 4, Store::f32, round_up(columns, VL)};
    for (int64_t block = 0; block < q.block_count(); ++block) {
      const bool last = block + 1 == q.block_count();
      Right right = laid_out(block, turned, n);
      right.far = last ? 0 : laid_out(block + 1, turned, n).data - right.data;
      for (int64_t r = 0; r < rows; r += NR, right.far = 0) {
        const Right left = laid_out(block, !turned, m + r);
        const int64_t far = last ? 0 : (laid_out(block + 1, !turned, m + r).data - left.data) * 4;
        Out piece = out;
        piece.data += r * out.row;
        product_wide<W>(least(rows - r, NR), words<W>(q.blocks[block].count),
                        {reinterpret_cast<const char*>(left.data), 4, NR * 4, far}, right, piece);
      }
      out.store = Store::f32_add;
    }
    const int64_t size = size_of(q.dweight.dtype);
    for (int64_t r = 0; r < rows; ++r)
      write_vector(q.dweight.dtype, q.dweight.data + ((m + r) * width + n) * size, 1, sums + r * kStrip, columns);
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return Memory::least(a, b); }

  void lay_out(const Piece& b, const Source& from, float* block) const {
    const int64_t size = size_of(q.x.dtype);
    with_source<W>(q.x.dtype, [&](auto type) {
      Memory::template pack_panels<decltype(type)::value>(block + b.offset / W::PER * NR, from.data,
                                                          from.columns * size, size, b.count, from.columns,
                                                          q.blocks[b.of].count, from.map);
    });
  }

  // Columns c and on of a block's rows of x or dy, as they were laid out.
  Right laid_out(int64_t i, bool is_dy, int64_t c) const {
    const int64_t width = is_dy ? q.d_out : q.d_in, count = q.blocks[i].count;
    const float* const panels = is_dy ? memory_.dy_words : memory_.x_words;
    return Memory::by_panel(panels + memory_.words_at(i, width) + Memory::panels(c, count), count);
  }

  // Columns c and on of a block's rows, as words along the rows. In place where a single tile reads them.
  Right strip_of(int64_t i, bool is_a, int64_t c, int64_t columns, int64_t ranks, const Strip& at) const {
    if (is_a ? memory_.x_words : memory_.dy_words) {
      Right right = laid_out(i, !is_a, c);
      if (i + 1 < q.block_count()) right.far = laid_out(i + 1, !is_a, c).data - right.data;
      return right;
    }
    const LoraBlock& b = q.blocks[i];
    const Source from = is_a ? memory_.x_of(b) : memory_.dy_of(b);
    const int64_t size = size_of(q.x.dtype);
    if (W::PER * W::STEP == 1 && ranks <= kTileRows<2> && q.x.dtype == W::dtype && !from.map && columns % VL == 0)
      return {reinterpret_cast<const float*>(from.data) + c, from.columns};
    with_source<W>(q.x.dtype, [&](auto type) {
      Memory::template pack_panels<decltype(type)::value>(at.rows, from.data + c * size, from.columns * size, size,
                                                          b.count, columns, b.count, from.map);
    });
    return Memory::by_panel(at.rows, b.count);
  }

  // Rows k and on of [R, width], from sums [ranks, columns of a strip].
  void write(Dtype dtype, char* to, int64_t width, int64_t k, int64_t ranks, int64_t columns, const float* sums) const {
    for (int64_t i = 0; i < ranks; ++i)
      write_vector(dtype, to + (k + i) * width * size_of(dtype), 1, sums + i * memory_.strip_width, columns);
  }

  // The same as columns of [width, R].
  void write_turned(Dtype dtype, char* to, int64_t k, int64_t ranks, int64_t columns, const float* sums) const {
    const int64_t size = size_of(dtype);
    for (int64_t j = 0; j < columns; j += VL) {
      for (int64_t i = 0; i < ranks; i += VL) {
        V r[VL];
        for (int64_t l = 0; l < VL; ++l) r[l] = i + l < ranks ? load<V>(sums + (i + l) * memory_.strip_width + j) : V{};
        transpose(r);
        with_dtype(dtype, [&](auto type) {
          for (int64_t l = 0; l < VL && j + l < columns; ++l)
            store_as_first<decltype(type)::value>(to + ((j + l) * q.rank + k + i) * size, r[l], ranks - i);
        });
      }
    }
  }

  const LoraCall& q;
  const Memory& memory_;
};

}  // namespace
}  // namespace ctxkern
