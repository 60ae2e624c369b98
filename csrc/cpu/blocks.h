// Walking over the work, and the blocks of noise and mask that belong to a place in it.
#pragma once

#include "normals.h"
#include "storage.h"
#include "torch_normals.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

struct Unit {
  int64_t start, row, slot;  // slot: the place of its sum, those of a row side by side
  int length;
};

// Calls body(unit) for the units [begin, end) of the layout.
template <class Body>
FASTDIFF_INLINE void for_units(const Layout& layout, int64_t begin, int64_t end, Body body) {
  const int64_t pieces = (layout.inner + kUnit - 1) / kUnit;
  int64_t segment = begin / pieces, piece = begin % pieces;
  int64_t frame = segment % layout.frames, rest = segment / layout.frames;
  int64_t shared = rest % layout.shared, outer = rest / layout.shared;
  const int64_t* const starts = layout.starts;
  int64_t sequence = 0, earlier = 0;  // units in earlier sequences
  for (int64_t u = begin; u < end; ++u) {
    Unit unit;
    int64_t left;
    if (starts) {
      for (int64_t units; u >= earlier + (units = (starts[sequence + 1] - starts[sequence] + kUnit - 1) / kUnit); ++sequence)
        earlier += units;
      unit.start = starts[sequence] + (u - earlier) * kUnit;
      unit.row = sequence;
      unit.slot = u;
      left = starts[sequence + 1] - unit.start;
    } else {
      left = layout.inner - piece * kUnit;
      unit.start = segment * layout.inner + piece * kUnit;
      unit.row = outer * layout.frames + frame;
      unit.slot = (unit.row * layout.shared + shared) * pieces + piece;
    }
    unit.length = int(left < kUnit ? left : kUnit);
    body(unit);
    if (starts || ++piece < pieces) continue;
    piece = 0;
    ++segment;
    if (++frame < layout.frames) continue;
    frame = 0;
    if (++shared < layout.shared) continue;
    shared = 0;
    ++outer;
  }
}

// Calls body(start, count) for the blocks of a unit, of up to `most` elements: kBlock, or kUnit where everything is
// worked on in memory itself. The rest of a unit that fills no two vectors is a block of its own, as it goes through
// buffers.
template <class Body>
FASTDIFF_INLINE void for_blocks(const Unit& unit, int most, Body body) {
  const int whole = unit.length & ~(kStep - 1);
  for (int done = 0; done < whole; done += most) body(unit.start + done, whole - done < most ? whole - done : most);
  if (whole < unit.length) body(unit.start + whole, unit.length - whole);
}

// Calls body(row, start, count) for the blocks of the units [begin, end).
template <class Body>
FASTDIFF_INLINE void for_blocks(const Layout& layout, int64_t begin, int64_t end, int most, Body body) {
  for_units(layout, begin, end, [&](const Unit& unit) {
    for_blocks(unit, most, [&](int64_t start, int count) { body(unit.row, start, count); });
  });
}

// Calls body(start, first, second, count) for the blocks of a unit whose samples, of `sample_size` elements, lie in
// another tensor as the first halves of samples twice as long: `first` is the place there of element `start`, and
// `second` that of its partner in the second half. What lies in one sample lies together there too.
template <class Body>
FASTDIFF_INLINE void for_halves(const Unit& unit, int64_t sample_size, Body body) {
  for (Unit part = unit; part.start < unit.start + unit.length; part.start += part.length) {
    const int64_t sample = part.start / sample_size, left = (sample + 1) * sample_size - part.start;
    const int64_t rest = unit.start + unit.length - part.start;
    part.length = int(left < rest ? left : rest);
    for_blocks(part, kBlock, [&](int64_t start, int count) {
      const int64_t first = start + sample * sample_size;
      body(start, first, first + sample_size, count);
    });
  }
}

// Adds offset * (one normal a channel) to elements [element, element + count) of a sample.
FASTDIFF_APART inline void add_offset(const Noise& noise, const Layout& layout, int64_t sample, int64_t element, int count, float* n) {
  const int64_t channel_size = layout.elements / layout.samples / layout.channels;
  for (int done = 0; done < count;) {
    const int64_t channel = (element + done) / channel_size;
    const int64_t end = (channel + 1) * channel_size - element;
    const int stop = end < count ? int(end) : count;
    const float shift = noise.offset * philox::normal(noise.seed, philox::kOffsetStream,
                                                      noise.samples[sample], uint64_t(channel));
    for (; done < stop; ++done) n[done] = n[done] + shift;
  }
}

struct Spot {
  int64_t sample, element, left;  // elements of the sample from this one on
};

// In which sample an element is, and where in it.
FASTDIFF_INLINE Spot spot_of(const Layout& layout, int64_t at) {
  const int64_t* const starts = layout.starts;
  if (!starts) {
    const int64_t size = layout.elements / layout.samples;
    return {at / size, at % size, size - at % size};
  }
  int64_t sample = 0, behind = layout.rows;
  while (behind - sample > 1) {
    const int64_t middle = (sample + behind) / 2;
    (starts[middle] <= at ? sample : behind) = middle;
  }
  return {sample, at - starts[sample], starts[sample + 1] - at};
}

// Elements [start, start + count) of the noise, from memory order; writes up to kSlack beyond the end.
FASTDIFF_APART inline void make_noise(const Noise& noise, const Layout& layout, int64_t start, int count, float* n) {
  for (int done = 0; done < count;) {
    const auto [sample, element, left] = spot_of(layout, start + done);
    const int part = left < count - done ? int(left) : count - done;
    normal_elements(noise.seed, noise.stream, noise.samples[sample], uint64_t(element), part, n + done);
    if (noise.offset != 0.0f) add_offset(noise, layout, sample, element, part, n + done);
    done += part;
  }
}

template <class C>
struct NoiseBuffer {
  alignas(64) C values[kBlock + kSlack];
};

// A block of noise: given or made (in float, or double). Zeros behind it up to a multiple of kStep.
template <class N>
FASTDIFF_INLINE const N* view(const Noise& noise, const Layout& layout, int64_t start, int count, NoiseBuffer<N>& buffer) {
  if (!kComputed<N> || noise.kind == Noise::given) return view(noise.tensor, start, count, buffer.values);
  if constexpr (sizeof(N) == 4) {
    if (noise.kind == Noise::drawn)
      twister::draw_block(*(twister::Sequence*)noise.sequence, noise.draws->dtype, count, buffer.values);
    else
      make_noise(noise, layout, start, count, buffer.values);
  } else if constexpr (kComputed<N>) {
    NoiseBuffer<float> narrow;
    make_noise(noise, layout, start, count, narrow.values);
    for (int k = 0; k < count; ++k) buffer.values[k] = N(narrow.values[k]);
  }
  for (int k = count; k < padded(count); ++k) buffer.values[k] = N{};
  return buffer.values;
}

// Noise for blocks in the order of memory. It knows no rows, so that of short ones (tokens) is made for several at a time.
template <class N>
class NoiseAhead {
 public:
  // What lies behind the block is the noise of the next one, or zeros.
  FASTDIFF_INLINE const N* view(const Noise& noise, const Layout& layout, int64_t start, int count) {
    if (noise.kind != Noise::made) return FASTDIFF_VARIANT::view(noise, layout, start, count, buffer_);
    if (start < from_ || start + count > to_) {
      const int64_t left = layout.elements - start;
      const int made = left < kBlock ? int(left) : kBlock;
      FASTDIFF_VARIANT::view(noise, layout, start, made, buffer_);
      from_ = start, to_ = start + made;
    }
    return buffer_.values + (start - from_);
  }

 private:
  NoiseBuffer<N> buffer_;
  int64_t from_ = 0, to_ = 0;
};

// Elements [start, start + count) of a mask's memory: bytes are what they are.
template <class C>
FASTDIFF_INLINE void read_mask(const Input& from, int64_t start, int count, C* to) {
  if (from.dtype != DType::u8) return read(from, start, count, to);
  const uint8_t* source = (const uint8_t*)from.data + start;
  for (int k = 0; k < count; ++k) to[k] = C(source[k]);
}

// Elements [start, start + count) of the mask, broadcast; zeros behind them up to a multiple of kStep.
template <class C>
FASTDIFF_APART const C* view(const Mask& mask, int64_t start, int count, C* buffer) {
  const Strides& at = mask.at;
  const int last = at.dims - 1;
  const int64_t run = at.sizes[last], stride = at.strides[last];
  if (at.dims == 1 && stride == 1 && mask.tensor.dtype != DType::u8) return view<C>(mask.tensor, start, count, buffer);
  for (int done = 0; done < count;) {
    int64_t rest = (start + done) / run;
    const int64_t within = (start + done) % run;
    int64_t place = within * stride;
    for (int d = last - 1; d >= 0; --d) {
      place += rest % at.sizes[d] * at.strides[d];
      rest /= at.sizes[d];
    }
    const int part = run - within < count - done ? int(run - within) : count - done;
    if (stride == 1) {
      read_mask<C>(mask.tensor, place, part, buffer + done);
    } else if (stride == 0) {
      C value{};
      read_mask<C>(mask.tensor, place, 1, &value);
      for (int k = 0; k < part; ++k) buffer[done + k] = value;
    } else {
      for (int k = 0; k < part; ++k) read_mask<C>(mask.tensor, place + k * stride, 1, buffer + done + k);
    }
    done += part;
  }
  for (int k = count; k < padded(count); ++k) buffer[k] = C(0);
  return buffer;
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
