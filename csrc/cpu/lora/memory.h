// What the threads of a low-rank call work in. No more of them take part than a budget allows.
#pragma once

#include "../runtime/pack.h"
#include "call.h"

namespace ctxkern {
namespace {

// Columns of D or E at a time, of rows that are laid out for a product along them: where strips are shared by threads, and
// where a thread takes all of an adapter.
constexpr int64_t kStrip = 128, kWideStrip = 1024;
// Floats of a wide strip of dA or dB.
constexpr int64_t kTotal = 1 << 16;
// Rows of a part of the base weight's gradient, of kStrip columns: its sums stay in the second cache.
constexpr int64_t kPartRows = 256;
// Bytes that threads work in, beyond as many as rows of x and y in float32: of many threads only some take part where each
// needs much.
constexpr int64_t kBudget = 24 << 20;

template <class W>
class LoraMemory {
 public:
  static constexpr int64_t NR = 2 * VL;

  // What a thread needs for blocks: panels of an adapter, one after another, words along the sum by lanes, and the rest.
  struct Thread {
    int64_t* adapter;  // 1 + whose panels they are
    float *a_lanes, *a_rows, *b_lanes, *b_rows;
    float* rows;   // of a block, as a left operand
    float* sums;   // h or g, [rows, R], and other sums of as many rows
    float* plain;  // x A^T, kept for the gates' gradient
    float* words;  // the same, scaled, as a left operand
    float* pairs;  // a strip of it, as words along the rows
  };

  // And for strips of dA and dB.
  struct Strip {
    float* rows;   // x or dy, [panels, words along the rows, NR]
    float* total;  // dA or dB^T, [ranks, columns of a strip]
    float* part;   // of the base weight's gradient, [kPartRows, kStrip]
  };

  // Rows of a block, of x (or what dropout left of it, in grouped order), y or dy.
  struct Source {
    const char* data;
    int64_t columns;
    const int64_t* map;
  };

  // Rows of block `of`, from its row `offset` on: what a thread takes at a time.
  struct Piece : LoraBlock {
    int64_t of, offset;
  };

  LoraMemory(const LoraCall& call, bool backward, char* workspace) : q(call), backward_(backward) {
    Arena arena(workspace);
    const bool based = q.base.data && (!backward || q.dx);
    base = based ? arena.take(backward ? panels(q.d_in, q.d_out) : panels(q.d_out, q.d_in)) : nullptr;
    bias = based && q.bias.data ? arena.take(lanes(q.d_out)) : nullptr;
    dropped = q.kept_from > 0 ? arena.take<char>(q.rows_of->count * q.d_in * size_of(q.x.dtype)) : nullptr;
    for (int64_t u = 0; u < q.adapters(); ++u) {
      const int64_t rows = q.rows_of->first[u + 1] - q.rows_of->first[u];
      most_rows_ = rows > most_rows_ ? rows : most_rows_;
    }
    cut_blocks();
    if (whole_adapters() && widest() > kStrip && q.rank > 0) {
      const int64_t fits = least(kWideStrip, kTotal / least(q.rank, kBlockRows) / NR * NR);
      strip_width = least(fits, lanes(widest()));
    }
    const int64_t turned = (q.rows_of->count / W::PER + q.block_count() * W::STEP) * q.rank;
    turned_h = backward && q.dB ? arena.take(turned) : nullptr;
    turned_g = backward && q.dA ? arena.take(turned) : nullptr;
    x_words = q.dweight.data ? arena.take(words_at(q.block_count(), q.d_in)) : nullptr;
    dy_words = q.dweight.data ? arena.take(words_at(q.block_count(), q.d_out)) : nullptr;
    Arena one(nullptr), strip(nullptr);
    place(one);
    place_strip(strip);
    each_thread_ = one.used();
    each_strip_ = backward ? strip.used() : 0;
    share_budget();
    threads_ = arena.take<char>(each_thread_ * block_threads);
    strips_ = arena.take<char>(each_strip_ * strip_threads);
    bytes = arena.used();
  }

  Thread thread(int i) const {
    Arena arena(threads_ + i * each_thread_);
    return place(arena);
  }

  Strip strip(int thread) const {
    Arena arena(strips_ + thread * each_strip_);
    return place_strip(arena);
  }

  bool needs_h() const { return !backward_ || q.dB || q.products; }
  bool needs_g() const { return backward_ && (q.dA || q.dx || q.products); }

  // Enough adapters, none of them with more than a small share of all rows.
  bool whole_adapters() const { return q.threads == 1 || most_rows_ * 4 * q.threads <= q.rows_of->count; }

  int64_t pieces() const { return q.block_count() * pieces_each_; }

  // Of no rows where a block has fewer pieces than the longest.
  Piece piece(int64_t i) const {
    const LoraBlock& b = q.blocks[i / pieces_each_];
    const int64_t at = i % pieces_each_ * piece_rows_, count = most(0, least(b.count - at, piece_rows_));
    return {{b.adapter, b.first + at, count, b.row + at, b.map ? b.map + at : nullptr}, i / pieces_each_, at};
  }

  int64_t strips_of_a() const { return strips_of(q.dA, q.d_in); }
  int64_t strips() const { return strips_of_a() + strips_of(q.dB, q.d_out); }

  // The base weight's gradient as it lies in memory: E rows of D columns, or turned.
  bool weight_turned() const { return q.dweight.strides[1] != 1; }
  int64_t weight_rows() const { return weight_turned() ? q.d_in : q.d_out; }
  int64_t weight_columns() const { return weight_turned() ? q.d_out : q.d_in; }
  int64_t parts() const {
    if (!q.dweight.data) return 0;
    return (weight_rows() + kPartRows - 1) / kPartRows * ((weight_columns() + kStrip - 1) / kStrip);
  }

  // Where h^T or g^T of a block lies, with room for the last word of each to be half full.
  int64_t turned_at(int64_t i) const { return (first(i) / W::PER + i * W::STEP) * q.rank; }

  // Where the panels of a block of x or dy lie, with as much room.
  int64_t words_at(int64_t i, int64_t width) const {
    return (first(i) / W::PER + i * W::STEP) * lanes(width) + i * (lanes(width) / NR * 16);
  }

  Source source_of(const LoraBlock& b, const char* data, int64_t columns) const {
    return {b.map ? data : data + b.row * columns * size_of(q.x.dtype), columns, b.map};
  }

  Source x_of(const LoraBlock& b) const {
    if (!dropped) return source_of(b, q.x.data, q.d_in);
    return {dropped + b.first * q.d_in * size_of(q.x.dtype), q.d_in, nullptr};
  }

  Source dy_of(const LoraBlock& b) const { return source_of(b, q.rows, q.d_out); }

  static int64_t row_of(const LoraBlock& b, int64_t i) { return b.map ? b.map[i] : b.row + i; }

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t lanes(int64_t n) { return round_up(n, NR); }

  // Floats of as many lanes, in panels of sums over `elements`. A line between panels keeps them from one set of a cache.
  static int64_t panels(int64_t lanes, int64_t elements) {
    return round_up(lanes, NR) / NR * (words<W>(elements) * NR + 16);
  }
  // Between rows of a left operand, which do not share one set of a cache.
  static int64_t step_words(int64_t columns) {
    const int64_t count = words<W>(columns);
    return count * 4 % kSets == 0 ? count + 16 : count;
  }
  static Right by_panel(const float* data, int64_t elements) { return {data, NR, panels(NR, elements)}; }

  // Panels with room for sums over `longest`, of a matrix as in `pack_matrix`; rows are read one after another where they lie
  // as such, into all panels.
  template <Dtype D>
  static void pack_panels(float* to, const char* from, int64_t row, int64_t column, int64_t count, int64_t lanes,
                          int64_t longest, const int64_t* map = nullptr) {
    const int64_t panel = panels(NR, longest);
    if (column == size_of(D)) return pack_rows<W, D>(to, NR, from, row, column, count, lanes, map, panel);
    for (int64_t c = 0; c < lanes; c += NR, to += panel)
      pack_matrix<W, D>(to, from + c * column, row, column, count, lanes - c < NR ? lanes - c : NR);
  }

  float *base, *bias;          // panels of the base weight, E lanes in the forward and D in the backward
  char* dropped;               // what dropout left of x, in grouped order
  float *turned_h, *turned_g;  // of all blocks
  float *x_words, *dy_words;  // of all blocks, in panels of words along their rows, where more than dA and dB read them
  int64_t block_threads, strip_threads, strip_width = kStrip, bytes;

 private:
  static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
  int64_t widest() const { return most(q.d_in, q.d_out); }
  int64_t strips_of(const char* wanted, int64_t n) const { return wanted ? (n + strip_width - 1) / strip_width : 0; }

  // Grouped row of the first of block i, or the number of rows.
  int64_t first(int64_t i) const { return i < q.block_count() ? q.blocks[i].first : q.rows_of->count; }

  Thread place(Arena& arena) const {
    const int64_t r_lanes = lanes(q.rank), rows = least(kBlockRows, most_rows_);
    Thread at;
    at.adapter = arena.take<int64_t>(1);
    at.a_lanes = needs_h() ? arena.take(panels(q.rank, q.d_in)) : nullptr;
    at.a_rows = backward_ && q.dx ? arena.take(panels(q.d_in, q.rank)) : nullptr;
    at.b_lanes = backward_ ? nullptr : arena.take(panels(q.d_out, q.rank));
    at.b_rows = needs_g() ? arena.take(panels(q.rank, q.d_out)) : nullptr;
    at.rows = arena.take(rows * step_words(widest()) + NR);
    at.sums = arena.take(rows * (r_lanes > kStrip ? r_lanes : kStrip));
    at.plain = q.products ? arena.take(rows * r_lanes) : nullptr;
    at.words = arena.take(rows * words<W>(q.rank) + NR);
    at.pairs = backward_ ? arena.take(words<W>(rows) * kStrip) : nullptr;
    return at;
  }

  Strip place_strip(Arena& arena) const {
    return {arena.take(panels(strip_width, least(kBlockRows, most_rows_))),
            arena.take(least(q.rank, kBlockRows) * strip_width), arena.take(q.dweight.data ? kPartRows * kStrip : 0)};
  }

  // Blocks in pieces where threads would else share too few. No sum goes over the rows of a piece, so that no bit changes.
  void cut_blocks() {
    constexpr int64_t kBlocks = 4, kPieces = 8, kFewRows = 32;  // of each thread, and of a piece
    if (q.threads == 1 || (backward_ && whole_adapters()) || q.block_count() >= kBlocks * q.threads) return;
    const int64_t longest = most(1, least(kBlockRows, most_rows_));
    const int64_t rows = most(kFewRows, q.rows_of->count / (kPieces * q.threads));
    pieces_each_ = (longest + rows - 1) / rows;
    piece_rows_ = round_up((longest + pieces_each_ - 1) / pieces_each_, W::PER * W::STEP);
  }

  // Threads for blocks and for strips, as many as there is work for and the budget allows.
  void share_budget() {
    const bool whole = backward_ && whole_adapters();
    block_threads = most(1, least(q.threads, whole ? q.adapters() : pieces()));
    strip_threads = whole ? block_threads : most(1, least(q.threads, q.adapters() * strips() + parts()));
    const int64_t budget = kBudget + q.batch.tokens * (q.d_in + q.d_out) * 4;
    if (whole) {
      block_threads = strip_threads = most(1, least(block_threads, budget / most(1, each_thread_ + each_strip_)));
      return;
    }
    block_threads = most(1, least(block_threads, budget / 2 / most(1, each_thread_)));
    strip_threads = most(1, least(strip_threads, budget / 2 / most(1, each_strip_)));
  }

  const LoraCall& q;
  const bool backward_;
  char *threads_, *strips_;
  int64_t each_thread_, each_strip_, most_rows_ = 0, pieces_each_ = 1, piece_rows_ = kBlockRows;
};

}  // namespace
}  // namespace ctxkern
