#include "torch_state.h"

namespace fastdiff {

namespace {

// What follows in memory (a cached normal, of which torch.randn for few numbers leaves one) stays as it is.
struct State {
  uint64_t seed;
  int32_t left, seeded;
  uint64_t next;
  uint64_t words[kTwisterWords];
};
constexpr int64_t kBytes = 5056;

}  // namespace

bool TorchDraw::open(void* state, int64_t bytes, int64_t elements, DType dtype) {
  const State* s = (const State*)state;
  if (elements < 16 || (dtype != DType::f32 && elements % 16)) return false;
  if (bytes != kBytes || uintptr_t(state) % alignof(State)) return false;
  if (s->seeded != 1 || s->left < 1 || s->left > kTwisterWords) return false;
  const int position = kTwisterWords + 1 - s->left;
  // Before anything is drawn, and only then, `next` is 0 where nothing is left.
  if (s->next != uint64_t(position) && !(s->left == 1 && s->next == 0)) return false;
  state_ = state;
  arguments_ = {s->words, position, elements, dtype, nullptr, after_, &position_after_};
  return true;
}

void TorchDraw::close() {
  State* s = (State*)state_;
  for (int k = 0; k < kTwisterWords; ++k) s->words[k] = after_[k];
  s->left = kTwisterWords + 1 - position_after_;
  s->next = uint64_t(position_after_);
}

}  // namespace fastdiff
