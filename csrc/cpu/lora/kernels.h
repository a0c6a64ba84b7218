// y_u += h_u B_u^T with h_u = s x_u A_u^T, a block of rows at a time; h stays in cache. In the backward
//
//   g_u = s dy_u B_u    dx_u += g_u A_u    dA_u = g_u^T x_u    dB_u = dy_u^T h_u
//
// Where rows have gates, entries of h and g are multiplied by those of their row, and the products of both without them
// are the gates' gradient. The first two, and h, block by block, or piece by piece of a block where threads would share too
// few; then dA and dB (gradients.h). Where adapters are many and even, a thread takes each whole, so that its rows stay in
// cache between the two. Where the base weight goes along, the update is added to its sums before they are written.
// Sums over rows are cut by the rows of an adapter alone: neither the number of threads nor other adapters change a bit.
#pragma once

#include "../runtime/parallel.h"
#include "../runtime/sums.h"
#include "call.h"
#include "dropout.h"
#include "gates.h"
#include "gradients.h"

namespace ctxkern {
namespace {

template <class W>
class Lora {
 public:
  using Memory = LoraMemory<W>;
  using Thread = typename Memory::Thread;
  using Source = typename Memory::Source;
  using Piece = typename Memory::Piece;
  static constexpr int64_t NR = Memory::NR;

  Lora(const LoraCall& call, bool backward, char* workspace)
      : q(call), memory_(call, backward, workspace), sums_(q, memory_) {}

  int64_t bytes() const { return memory_.bytes; }

  void forward() {
    forget_panels();
    lay_out_base(q.base.strides[1], q.base.strides[0], q.d_in, q.d_out);
    parallel<W>(memory_.block_threads, memory_.pieces(), [&](int64_t i, int thread) {
      const Piece b = memory_.piece(i);
      if (b.count == 0) return;
      const Thread at = with_panels(b.adapter, thread);
      if (memory_.dropped) drop(b);
      const Left x = left_of(b, memory_.x_of(b), at);
      inner(b, x, at.a_lanes, q.d_in, at);
      scale(b, at);
      words_of(b, at);
      const Right panels = by_panel(at.b_lanes, q.rank);
      if (memory_.base) return base(b, x, q.d_in, panels, q.rows, q.d_out, at);
      add(b, panels, q.rows, q.d_out, at);
    });
  }

  void backward() {
    forget_panels();
    lay_out_base(q.base.strides[0], q.base.strides[1], q.d_out, q.d_in);
    if (q.adapters() < q.batch.table) {
      const int64_t each = q.batch.table * q.rank;
      if (q.dA) std::memset(q.dA, 0, static_cast<size_t>(each * q.d_in * size_of(q.A.dtype)));
      if (q.dB) std::memset(q.dB, 0, static_cast<size_t>(each * q.d_out * size_of(q.B.dtype)));
    }
    if (memory_.whole_adapters()) {
      parallel<W>(memory_.block_threads, q.adapters(), [&](int64_t u, int thread) {
        for (int64_t i = q.block_first[u]; i < q.block_first[u + 1]; ++i) block_gradients(i, thread);
        for (int64_t s = 0; s < memory_.strips(); ++s) sums_.strip(u, s, thread);
      });
      parallel<W>(memory_.strip_threads, memory_.parts(), [&](int64_t i, int thread) { sums_.part(i, thread); });
      return;
    }
    parallel<W>(memory_.block_threads, memory_.pieces(), [&](int64_t i, int thread) { block_gradients(i, thread); });
    const int64_t parts = memory_.parts(), strips = memory_.strips();
    parallel<W>(memory_.strip_threads, parts + q.adapters() * strips, [&](int64_t i, int thread) {
      if (i < parts) return sums_.part(i, thread);
      sums_.strip((i - parts) / strips, (i - parts) % strips, thread);
    });
  }

 private:
  static int64_t lanes(int64_t n) { return Memory::lanes(n); }
  static int64_t panels(int64_t lanes, int64_t elements) { return Memory::panels(lanes, elements); }
  static Right by_panel(const float* data, int64_t elements) { return Memory::by_panel(data, elements); }

  void forget_panels() const {
    for (int thread = 0; thread < memory_.block_threads; ++thread) *memory_.thread(thread).adapter = 0;
  }

  // The base weight in panels, for all threads; strides along the sum and from lane to lane.
  void lay_out_base(int64_t row, int64_t column, int64_t count, int64_t columns) const {
    if (!memory_.base) return;
    const int64_t size = size_of(q.base.dtype);
    if (memory_.bias) pack_vector(memory_.bias, q.bias.dtype, q.bias.data, q.bias.strides[0], columns, lanes(columns));
    if (column == 1) {
      // rows that are read once, into all panels
      constexpr int64_t kRows = 64;
      parallel<W>(memory_.block_threads, (count + kRows - 1) / kRows, [&](int64_t i, int) {
        const int64_t r = i * kRows, rows = count - r < kRows ? count - r : kRows;
        with_source<W>(q.base.dtype, [&](auto type) {
          Memory::template pack_panels<decltype(type)::value>(
              memory_.base + r / W::PER * NR, q.base.data + r * row * size, row * size, size, rows, columns, count);
        });
      });
      return;
    }
    parallel<W>(memory_.block_threads, lanes(columns) / NR, [&](int64_t i, int) {
      const int64_t c = i * NR;
      with_source<W>(q.base.dtype, [&](auto type) {
        pack_matrix<W, decltype(type)::value>(memory_.base + panels(c, count), q.base.data + c * column * size,
                                              row * size, column * size, count, columns - c < NR ? columns - c : NR);
      });
    });
  }

  // A thread's memory, with the panels of adapter u in it.
  Thread with_panels(int64_t u, int thread) const {
    const Thread at = memory_.thread(thread);
    if (*at.adapter == u + 1) return at;
    *at.adapter = u + 1;
    const int64_t rank = q.rank_of(u);
    const int64_t a_size = size_of(q.A.dtype), a_r = q.A.strides[1] * a_size, a_d = q.A.strides[2] * a_size;
    const int64_t b_size = size_of(q.B.dtype), b_e = q.B.strides[1] * b_size, b_r = q.B.strides[2] * b_size;
    const char* const a = q.A.data + q.slot(u) * q.A.strides[0] * a_size;
    const char* const b = q.B.data + q.slot(u) * q.B.strides[0] * b_size;
    with_source<W>(q.A.dtype, [&](auto type) {
      constexpr Dtype D = decltype(type)::value;
      if (at.a_lanes) Memory::template pack_panels<D>(at.a_lanes, a, a_d, a_r, q.d_in, rank, q.d_in);
      if (at.a_rows) Memory::template pack_panels<D>(at.a_rows, a, a_r, a_d, rank, q.d_in, q.rank);
    });
    with_source<W>(q.B.dtype, [&](auto type) {
      constexpr Dtype D = decltype(type)::value;
      if (at.b_lanes) Memory::template pack_panels<D>(at.b_lanes, b, b_r, b_e, rank, q.d_out, q.rank);
      if (at.b_rows) Memory::template pack_panels<D>(at.b_rows, b, b_e, b_r, q.d_out, rank, q.d_out);
    });
    return at;
  }

  // What dropout keeps of x.
  void drop(const LoraBlock& b) const {
    const int64_t size = size_of(q.x.dtype);
    with_dtype(q.x.dtype, [&](auto type) {
      constexpr Dtype D = decltype(type)::value;
      for (int64_t i = 0; i < b.count; ++i) {
        const int64_t row = memory_.row_of(b, i);
        const RowDraws draws(*q.seed, row);
        const char* const from = q.x.data + row * q.d_in * size;
        char* const to = memory_.dropped + (b.first + i) * q.d_in * size;
        for (int64_t c = 0; c < q.d_in; c += VL) {
          const V v = load_f32_first<D>(from + c * size, q.d_in - c);
          store_as_first<D>(to + c * size, kept(v, draws.at(c), static_cast<uint32_t>(q.kept_from)), q.d_in - c);
        }
      }
    });
  }

  // Rows as a left operand, in place where that is one.
  Left left_of(const LoraBlock& b, const Source& from, const Thread& at) const {
    const int64_t row = from.columns * size_of(q.x.dtype), step = Memory::step_words(from.columns);
    const bool dense = !from.map && q.x.dtype == W::dtype && from.columns % (W::PER * W::STEP) == 0;
    if (dense && (!memory_.base || row % kSets != 0)) return {from.data, row, 4};
    with_source<W>(q.x.dtype, [&](auto type) {
      pack_left<W, decltype(type)::value>(at.rows, from.data, row, b.count, from.columns, from.map, step);
    });
    return {reinterpret_cast<const char*>(at.rows), step * 4, 4};
  }

  // Rows of y or dx = those of x or dy times the base weight, + bias, + the words times `update`.
  void base(const LoraBlock& b, const Left& left, int64_t depth, Right update, char* to, int64_t columns,
            const Thread& at) const {
    const int64_t size = size_of(q.x.dtype);
    Right right = by_panel(memory_.base, depth);
    // what the first of several tiles of rows has time for
    if (b.count > 3 * kTileRows<2>) right.far = right.panel;
    const Also also{words_left(b, at), update, words<W>(q.rank_of(b.adapter))};
    Out out{to + (b.map ? 0 : b.row * columns * size), columns * size, store_of(q.x.dtype), columns};
    out.map = b.map;
    out.bias = memory_.bias;
    if (takes_also<W>) out.also = &also;
    product_wide_in_pieces<W>(b.count, words<W>(depth), kDeepest, left, right, out);
    if (!takes_also<W>) add(b, update, to, columns, at);
  }

  // sums [rows, R] = rows of a block, of `depth` elements, times panels of words by R lanes.
  void inner(const LoraBlock& b, const Left& left, const float* right, int64_t depth, const Thread& at) const {
    product_in_pieces<W>(b.count, round_up(q.rank_of(b.adapter), VL), words<W>(depth), kDeepest, left,
                         by_panel(right, depth), at.sums, lanes(q.rank));
  }

  float scale_of(const LoraBlock& b) const {
    return static_cast<float>(q.scale * (q.scales ? q.scales[q.slot(b.adapter)] : 1.0) / kept_share());
  }

  const char* gates_of(const LoraBlock& b, int64_t i) const {
    const int64_t row = memory_.row_of(b, i);
    return reinterpret_cast<const char*>(q.gates + (q.gate_of ? q.gate_of[row] : row) * q.rank);
  }

  // The sums times the scale and the gates of their row.
  void scale(const LoraBlock& b, const Thread& at) const {
    const int64_t rank = q.rank_of(b.adapter);
    const V factor = splat(scale_of(b));
    for (int64_t i = 0; i < b.count; ++i) {
      float* const sums = at.sums + i * lanes(q.rank);
      const char* const gates = q.gates ? gates_of(b, i) : nullptr;
      for (int64_t k = 0; k < rank; k += VL) {
        const V each = gates ? factor * load_f32_first<Dtype::f32>(gates + 4 * k, rank - k) : factor;
        store(sums + k, load<V>(sums + k) * each);
      }
    }
  }

  // The gradient of each row's gates, of g as it is in the sums.
  void products(const LoraBlock& b, const Thread& at) const {
    const int64_t rank = q.rank_of(b.adapter);
    const V factor = splat(scale_of(b));
    for (int64_t i = 0; i < b.count; ++i) {
      const int64_t from = i * lanes(q.rank);
      float* const to = q.products + memory_.row_of(b, i) * q.rank;
      for (int64_t k = 0; k < rank; k += VL)
        store_as_first<Dtype::f32>(reinterpret_cast<char*>(to + k),
                                   factor * load<V>(at.plain + from + k) * load<V>(at.sums + from + k), rank - k);
    }
  }

  double kept_share() const { return 1.0 - static_cast<double>(q.kept_from) * 0x1p-32; }

  // The sums as a left operand.
  void words_of(const LoraBlock& b, const Thread& at) const {
    pack_left<W, Dtype::f32>(at.words, reinterpret_cast<const char*>(at.sums), lanes(q.rank) * 4, b.count,
                             q.rank_of(b.adapter));
  }

  Left words_left(const LoraBlock& b, const Thread& at) const {
    return {reinterpret_cast<const char*>(at.words), words<W>(q.rank_of(b.adapter)) * 4, 4};
  }

  // Transposed, [R, words along the rows], a left operand too.
  void turned(const Piece& b, const Thread& at, float* all) const {
    const int64_t rank = q.rank_of(b.adapter), r_lanes = lanes(q.rank), steps = words<W>(b.count);
    const int64_t row = words<W>(q.blocks[b.of].count);
    float *const pairs = at.pairs, *const to = all + memory_.turned_at(b.of) + b.offset / W::PER;
    for (int64_t k = 0; k < rank; k += kStrip) {
      const int64_t part = rank - k < kStrip ? rank - k : kStrip;
      pack_rows<W, Dtype::f32>(pairs, kStrip, reinterpret_cast<const char*>(at.sums + k), r_lanes * 4, 4, b.count,
                               part);
      for (int64_t j = 0; j < part; j += VL) {
        for (int64_t s = 0; s < steps; s += VL) {
          V r[VL];
          const int64_t there = steps - s < VL ? steps - s : VL;
          for (int64_t i = 0; i < VL; ++i) r[i] = i < there ? load<V>(pairs + (s + i) * kStrip + j) : V{};
          transpose(r);
          for (int64_t i = 0; i < VL && j + i < part; ++i) store_first(to + (k + j + i) * row + s, r[i], 4 * there);
        }
      }
    }
  }

  // Rows of y or dx (+)= the words times panels of `columns` lanes.
  void add(const LoraBlock& b, Right panels, char* to, int64_t columns, const Thread& at) const {
    const int64_t size = size_of(q.x.dtype);
    Out out{to + (b.map ? 0 : b.row * columns * size), columns * size, q.adds ? add_of(q.x.dtype) : store_of(q.x.dtype),
            columns};
    out.map = b.map;
    product_along<W>(b.count, words<W>(q.rank_of(b.adapter)), words_left(b, at), panels, out);
  }

  // dx (+)= the same, where dropout kept x.
  void add_dropped(const LoraBlock& b, const Thread& at) const {
    const int64_t size = size_of(q.x.dtype), steps = words<W>(q.rank_of(b.adapter));
    for (int64_t d = 0; d < q.d_in; d += kStrip) {
      const int64_t columns = q.d_in - d < kStrip ? q.d_in - d : kStrip;
      const Out out{reinterpret_cast<char*>(at.sums), kStrip * 4, Store::f32, round_up(columns, VL)};
      product_along<W>(b.count, steps, words_left(b, at), by_panel(at.a_rows + panels(d, q.rank), q.rank), out);
      with_dtype(q.x.dtype, [&](auto type) {
        constexpr Dtype D = decltype(type)::value;
        for (int64_t i = 0; i < b.count; ++i) {
          const int64_t row = memory_.row_of(b, i);
          const RowDraws draws(*q.seed, row);
          char* const to = q.dx + (row * q.d_in + d) * size;
          for (int64_t c = 0; c < columns; c += VL) {
            V v = kept(load<V>(at.sums + i * kStrip + c), draws.at(d + c), static_cast<uint32_t>(q.kept_from));
            if (q.adds) v += load_f32_first<D>(to + c * size, columns - c);
            store_as_first<D>(to + c * size, v, columns - c);
          }
        }
      });
    }
  }

  void block_gradients(int64_t i, int thread) const {
    const Piece b = memory_.piece(i);
    if (b.count == 0) return;
    const Thread at = with_panels(b.adapter, thread);
    if (memory_.dropped && (q.dA || memory_.needs_h())) drop(b);
    sums_.lay_out_x(b);
    if (memory_.needs_h()) {
      inner(b, left_of(b, memory_.x_of(b), at), at.a_lanes, q.d_in, at);
      if (q.products) std::memcpy(at.plain, at.sums, static_cast<size_t>(b.count * lanes(q.rank) * 4));
    }
    if (q.dB) {
      scale(b, at);
      turned(b, at, memory_.turned_h);
    }
    sums_.lay_out_dy(b);
    if (!memory_.needs_g()) return;
    const Left dy = left_of(b, memory_.dy_of(b), at);
    inner(b, dy, at.b_rows, q.d_out, at);
    if (q.products) products(b, at);
    scale(b, at);
    if (q.dA) turned(b, at, memory_.turned_g);
    if (!q.dx) return;
    words_of(b, at);
    const Right panels = by_panel(at.a_rows, q.rank);
    if (memory_.base) return base(b, dy, q.d_out, panels, q.dx, q.d_in, at);
    if (memory_.dropped) return add_dropped(b, at);
    add(b, panels, q.dx, q.d_in, at);
  }

  const LoraCall& q;
  const Memory memory_;
  const LoraSums<W> sums_;
};

template <class W>
int64_t lora_bytes(const LoraCall& q, bool backward) {
  return Lora<W>(q, backward, nullptr).bytes();
}

template <class W>
void lora_forward(const LoraCall& q, char* workspace) {
  Lora<W>(q, false, workspace).forward();
}

template <class W>
void lora_backward(const LoraCall& q, char* workspace) {
  Lora<W>(q, true, workspace).backward();
}

template <class W>
constexpr LoraKernels lora_kernels_of{&lora_bytes<W>,
                                      &lora_forward<W>,
                                      &lora_backward<W>,
                                      W::PER == 1 ? &gate_bytes : nullptr,
                                      W::PER == 1 ? &gates : nullptr,
                                      W::PER == 1 ? &gate_gradients : nullptr};

}  // namespace
}  // namespace ctxkern
