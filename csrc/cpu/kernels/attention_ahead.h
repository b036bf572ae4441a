// Asking memory for K and V in the order in which they lie there. Half a slot at a time, or one
// head of a slot after another, memory streams at two thirds of the speed of whole slots.
#pragma once

#include <algorithm>

#include "attention_tiles.h"

namespace inferlab::cpu::INFERLAB_ISA {

// What memory is asked for while other slots are worked on: all heads of a slot in a line, in the
// order in which slots will be used, K of a chunk, V of it, the first K of the next chunk.
class SlotsAhead {
 public:
  // A chunk's slots; `width`: elements of a slot that are wanted. Of the next chunk's keys some
  // have been asked for already when it is that chunk's turn.
  void begin_chunk(const bf16* keys, const bf16* values, const int64_t* offsets, int64_t slots,
                   const int64_t* next_offsets, int64_t next_slots, int64_t width, int64_t lead) {
    const bool carried = phase_ == 2;
    const int64_t slot = carried ? slot_ : 0, at = carried ? at_ : 0;
    const Run runs[3] = {
        {keys, offsets, slots}, {values, offsets, slots}, {keys, next_offsets, next_slots}};
    std::copy_n(runs, 3, runs_);
    width_ = width;
    phase_ = 0;
    slot_ = slot;
    at_ = at;
    skip_ended();
    if (slot < lead) ask(((lead - slot) * width - at) / kLine<bf16>);
  }

  void ask(int64_t lines) {
    while (lines > 0 && !ended()) {
      const int64_t some = std::min(lines, (width_ - at_) / kLine<bf16>);
      const bf16* line = runs_[phase_].base + runs_[phase_].offsets[slot_] + at_;
      for (int64_t i = 0; i < some; ++i, line += kLine<bf16>) __builtin_prefetch(line, 0, 2);
      lines -= some;
      at_ += some * kLine<bf16>;
      if (at_ < width_) continue;
      at_ = 0;
      ++slot_;
      skip_ended();
    }
  }

 private:
  struct Run {
    const bf16* base;
    const int64_t* offsets;
    int64_t slots;
  };

  bool ended() const { return slot_ >= runs_[phase_].slots; }
  void skip_ended() {
    while (phase_ < 2 && ended()) slot_ -= runs_[phase_++].slots;
  }

  Run runs_[3] = {};
  int phase_ = 0;
  int64_t width_ = 0, slot_ = 0, at_ = 0;
};

}  // namespace inferlab::cpu::INFERLAB_ISA
