#include "checks.h"

#include "tensors.h"

namespace fastdiff {

void refuse(const char* name, const std::string& why) { throw py::value_error(std::string(name) + ": " + why); }

namespace {

constexpr int64_t kMostElements = int64_t(1) << 58;  // whose bytes can still be counted
constexpr int64_t kMostEmptyRows = int64_t(1) << 24;
constexpr int64_t kMostOfSample = int64_t(1) << 34;  // four to each of 2^32 groups
constexpr int64_t kMostOfWhole = int64_t(1) << 42;   // of a sample that there are slices of

bool as_int64(py::handle value, int64_t& number) {
  if (!value || !PyLong_Check(value.ptr())) return false;
  int overflow = 0;
  number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  return overflow == 0;
}

int64_t size_of(int code) {
  switch (code) {
    case int(DType::f32):
      return 4;
    case int(DType::f64):
    case kInt64:
      return 8;
    case int(DType::bf16):
    case int(DType::f16):
      return 2;
    default:
      return 1;
  }
}

py::handle item(py::handle tuple, int k) { return PyTuple_GET_ITEM(tuple.ptr(), k); }

int64_t length(py::handle value) { return PyTuple_Check(value.ptr()) ? PyTuple_GET_SIZE(value.ptr()) : -1; }

}  // namespace

Memory parse_memory(const char* name, py::handle value, int64_t fields) {
  if (length(value) != fields) refuse(name, "expected (pointer, dtype, elements)");
  int64_t code, elements;
  if (!PyLong_Check(item(value, 0).ptr())) refuse(name, "the pointer must be an integer");
  const unsigned long long pointer = PyLong_AsUnsignedLongLong(item(value, 0).ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    refuse(name, "the pointer must be from 0 to 2^64 - 1");
  }
  if (!as_int64(item(value, 1), code) || code < 0 || code > kInt64) refuse(name, "unknown dtype code");
  if (!as_int64(item(value, 2), elements) || elements < 0 || elements > kMostElements)
    refuse(name, "the number of elements must be from 0 to 2^58");
  if (pointer == 0 && elements) refuse(name, "a null pointer to " + std::to_string(elements) + " elements");
  if (pointer % size_of(int(code))) refuse(name, "the pointer is not aligned to its dtype");
  if (pointer > UINT64_MAX - uint64_t(elements) * 8) refuse(name, "the memory would wrap around");
  return {(void*)pointer, int(code), elements};
}

namespace {

Memory parse_tensor(const char* name, py::handle value, int64_t elements, bool image = false) {
  const Memory memory = parse_memory(name, value);
  if (memory.code > int(image ? DType::u8 : DType::f16)) refuse(name, "the dtype must be floating point");
  if (memory.elements != elements)
    refuse(name, "has " + std::to_string(memory.elements) + " elements, but " + std::to_string(elements) + " are needed");
  return memory;
}

// An empty tensor has no address, but is not absent.
int placeholder;
void* present(void* data) { return data ? data : &placeholder; }

}  // namespace

int64_t parse_integer(const char* name, py::handle value) {
  int64_t number;
  if (!as_int64(value, number)) refuse(name, "must be an integer of 64 bits");
  return number;
}

double parse_number(const char* name, py::handle value) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    refuse(name, "must be a number");
  }
  return number;
}

int parse_code(const char* name, py::handle value, int count) {
  int64_t code;
  if (!as_int64(value, code) || code < 0 || code >= count) refuse(name, "must be from 0 to " + std::to_string(count - 1));
  return int(code);
}

int parse_threads(py::handle value) {
  int64_t threads;
  if (!as_int64(value, threads) || threads < 0 || threads > 4096) refuse("threads", "must be from 0 (as OpenMP would) to 4096");
  return int(threads);
}

uint64_t parse_seed(py::handle value) {
  int64_t number;
  if (as_int64(value, number)) return uint64_t(number);
  tensors::View tensor;
  if (tensors::enabled() && tensors::view(value.ptr(), tensor) && tensor.dtype == tensors::kIndex && tensor.elements == 1)
    return *(const uint64_t*)tensor.data;
  if (PyLong_Check(value.ptr())) {
    const unsigned long long large = PyLong_AsUnsignedLongLong(value.ptr());
    if (!PyErr_Occurred()) return large;
    PyErr_Clear();
  }
  refuse("seed", "must be an integer from -2^63 to 2^64 - 1, or a tensor of one int64");
}

uint32_t parse_stream(py::handle value) {
  const int64_t stream = parse_integer("stream", value);
  if (stream < 0 || stream > UINT32_MAX) refuse("stream", "must have 32 bits");
  return uint32_t(stream);
}

Samples parse_samples(py::handle value, int64_t count) {
  int64_t first;
  if (as_int64(value, first)) return {uint64_t(first), nullptr};
  int64_t found;
  const void* ids;
  if (tensors::View tensor; tensors::enabled() && tensors::view(value.ptr(), tensor) && tensor.dtype == tensors::kIndex) {
    found = tensor.elements;
    ids = tensor.data;
  } else {
    if (length(value) != 3) refuse("samples", "expected the index of the first, or int64 numbers");
    const Memory memory = parse_memory("samples", value);
    if (memory.code != kInt64) refuse("samples", "ids must be int64");
    found = memory.elements;
    ids = memory.data;
  }
  if (found != count) refuse("samples", std::to_string(found) + " ids for " + std::to_string(count) + " samples");
  return {0, (const uint64_t*)present((void*)ids)};
}

Layout layout_of_sequences(const Memory& memory) {
  const int64_t* const starts = (const int64_t*)memory.data;
  if (memory.code != kInt64 || memory.elements < 1 || starts[0] != 0)
    refuse("layout", "the starts of sequences must be int64, and the first 0");
  Layout layout{1, 1, 1, 1, 0, 1, memory.elements - 1, starts[memory.elements - 1], starts};
  for (int64_t k = 0; k < layout.rows; ++k)
    if (starts[k + 1] < starts[k]) refuse("layout", "a sequence must end where it starts, or behind it");
  if (layout.elements > kMostElements) refuse("layout", "more than 2^58 elements");
  return layout;
}

Layout parse_layout(py::handle value) {
  if (length(value) == 3) return layout_of_sequences(parse_memory("layout", value));
  if (length(value) != 6) refuse("layout", "expected (outer, shared, frames, inner, samples, channels)");
  int64_t numbers[6];
  for (int k = 0; k < 6; ++k)
    if (!as_int64(item(value, k), numbers[k]) || numbers[k] < 0) refuse("layout", "needs integers of at least 0");
  Layout layout{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], 0, 0, nullptr};
  // The size with zeros taken for ones must be countable too, so that no partial product overflows.
  int64_t most = 1;
  for (int k = 0; k < 4; ++k)
    if (__builtin_mul_overflow(most, numbers[k] ? numbers[k] : 1, &most) || most > kMostElements)
      refuse("layout", "more than 2^58 elements");
  layout.rows = layout.outer * layout.frames;
  layout.elements = layout.rows * layout.shared * layout.inner;
  if (layout.elements == 0 && layout.rows > kMostEmptyRows) refuse("layout", "more than 2^24 rows without elements");
  // With one row to a run of memory, and with one run to a row, the general order is the plain one.
  if (layout.frames == 1) {
    layout.inner *= layout.shared;
    layout.shared = 1;
  }
  if (layout.shared == 1) {
    layout.outer *= layout.frames;
    layout.frames = 1;
  }
  return layout;
}

Input parse_input(const char* name, py::handle value, int64_t elements, bool image) {
  const Memory memory = parse_tensor(name, value, elements, image);
  return {present(memory.data), DType(memory.code)};
}

Output parse_output(const char* name, py::handle value, int64_t elements) {
  const Memory memory = parse_tensor(name, value, elements);
  return {present(memory.data), DType(memory.code), false};
}

void Reader::rows(const char* name, py::handle value, Rows& to, int columns) {
  if (!value) return;
  const Memory memory = parse_memory(name, value, 3);
  if (memory.code > int(DType::f64)) refuse(name, "rows must be float32 or float64");
  if (known && wide != (memory.code == int(DType::f64))) refuse(name, "all rows must be of one dtype");
  known = true;
  wide = memory.code == int(DType::f64);
  if (memory.elements == columns * layout.rows)
    to = {present(memory.data), columns};
  else if (memory.elements == columns)
    to = {memory.data, 0};
  else
    fastdiff::refuse(name, "has " + std::to_string(memory.elements) + " elements, but there are " +
                               std::to_string(layout.rows) + " rows of " + std::to_string(columns));
}

void optional_output(const char* name, py::handle value, int64_t elements, Output& to) {
  if (given(value)) to = parse_output(name, value, elements);
}

void optional_output(const char* name, py::handle value, int64_t elements, Output& to, DType dtype) {
  optional_output(name, value, elements, to);
  if (given(value) && to.dtype != dtype) refuse(name, dtype == DType::f64 ? "must be float64" : "must be float32");
}

Memory parse_table(py::handle value, int64_t& rows) {
  const Memory memory = parse_memory("table", value);
  if (memory.code > int(DType::f64) || memory.elements % kColumns)
    refuse("table", "must be float32 or float64, rows of " + std::to_string(int(kColumns)));
  rows = memory.elements / kColumns;
  return memory;
}

int copies_in(py::handle model_input, int64_t elements) {
  return elements && parse_memory("model_input", model_input).elements == 2 * elements ? 2 : 1;
}

Noise parse_noise(const char* name, py::handle value, const Layout& layout) {
  Noise noise{};
  if (length(value) == 3) {
    noise.kind = Noise::given;
    noise.tensor = parse_input(name, value, layout.elements);
    return noise;
  }
  if (length(value) != 4) refuse(name, "expected (pointer, dtype, elements) or (seed, stream, samples, offset)");
  noise.kind = Noise::made;
  noise.seed = parse_seed(item(value, 0));
  noise.stream = parse_stream(item(value, 1));
  noise.samples = parse_samples(item(value, 2), layout.starts ? layout.rows : layout.samples);
  noise.offset = float(parse_number("offset", item(value, 3)));
  if (layout.starts) {
    if (noise.offset != 0) refuse(name, "sequences one after another have no channels for offset noise");
    for (int64_t k = 0; k < layout.rows; ++k)
      if (layout.starts[k + 1] - layout.starts[k] > kMostOfSample)
        refuse("layout", "noise can be made for samples of at most 2^34 elements");
  } else if (layout.elements) {
    if (layout.samples == 0 || layout.elements % layout.samples)
      refuse("layout", "the samples do not divide the elements");
    const int64_t sample = layout.elements / layout.samples;
    if (sample > kMostOfSample) refuse("layout", "noise can be made for samples of at most 2^34 elements");
    if (noise.offset != 0 && (layout.channels == 0 || sample % layout.channels))
      refuse("layout", "the channels do not divide a sample");
  }
  return noise;
}

const char* find_strides(const int64_t* sizes, const int64_t* strides, int64_t dims, int64_t most, int64_t memory, Strides& at) {
  constexpr const char *kOtherSizes = "its sizes are not those of the elements", *kBeyond = "its strides reach beyond its memory";
  int64_t elements = 1, last = 0;
  int kept = 0;
  at = {};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = sizes[d], stride = strides[d];
    int64_t reach, span, merged;
    if (__builtin_mul_overflow(elements, size, &elements)) return kOtherSizes;
    if (size == 0) continue;
    if (__builtin_mul_overflow(size - 1, stride, &reach) || __builtin_add_overflow(last, reach, &last)) return kBeyond;
    if (size == 1) continue;
    if (kept && !__builtin_mul_overflow(size, stride, &span) && at.strides[kept - 1] == span &&
        !__builtin_mul_overflow(at.sizes[kept - 1], size, &merged)) {
      at.sizes[kept - 1] = merged;
      at.strides[kept - 1] = stride;
      continue;
    }
    if (kept == kMaxDims) return "has too many dimensions";
    at.sizes[kept] = size;
    at.strides[kept++] = stride;
  }
  if (elements != most) return kOtherSizes;
  if (elements && last >= memory) return kBeyond;
  if (!kept) {
    at.sizes[0] = 1;
    at.strides[0] = 1;
    kept = 1;
  }
  at.dims = kept;
  return nullptr;
}

namespace {

Strides parse_strides(const char* name, py::handle sizes, py::handle strides, int64_t most, int64_t memory) {
  const int64_t dims = length(sizes);
  if (dims < 1 || dims > kMostDims || length(strides) != dims)
    refuse(name, "needs as many sizes as strides, from 1 to 64");
  int64_t of_sizes[kMostDims], of_strides[kMostDims];
  for (int d = 0; d < dims; ++d)
    if (!as_int64(item(sizes, d), of_sizes[d]) || !as_int64(item(strides, d), of_strides[d]) || of_sizes[d] < 0 ||
        of_strides[d] < 0)
      refuse(name, "sizes and strides must be integers of at least 0");
  Strides at;
  if (const char* why = find_strides(of_sizes, of_strides, dims, most, memory, at)) refuse(name, why);
  return at;
}

}  // namespace

Mask parse_mask(py::handle value, const Layout& layout) {
  const Memory memory = parse_memory("mask", value, 5);
  if (memory.code == kInt64) refuse("mask", "the dtype must be floating point, uint8 or bool");
  return {{present(memory.data), DType(memory.code)},
          parse_strides("mask", item(value, 3), item(value, 4), layout.elements, memory.elements)};
}

Order parse_order(py::handle value, const Layout& layout) {
  if (length(value) != 2) refuse("order", "expected (sizes, strides)");
  Order order{parse_strides("order", item(value, 0), item(value, 1), layout.elements, layout.elements), 1};
  Strides& at = order.at;
  const int last = at.dims - 1;
  // Blocks, and the runs of a row that they cut up, must be whole words.
  bool pairs = at.strides[last] == 1 && at.sizes[last] % 2 == 0 && layout.inner % 2 == 0;
  for (int d = 0; d < last; ++d) pairs = pairs && at.strides[d] % 2 == 0;
  if (!pairs) return order;
  order.word = 2;
  for (int d = 0; d < last; ++d) at.strides[d] /= 2;
  at.sizes[last] /= 2;
  if (at.sizes[last] == 1 && last > 0) --at.dims;
  return order;
}

Window parse_window(py::handle value, const Layout& layout) {
  if (length(value) != 3) refuse("window", "expected (first, sizes, strides)");
  Window window{};
  window.first = parse_integer("window", item(value, 0));
  if (window.first < 0 || window.first > kMostOfWhole) refuse("window", "begins outside of samples of 2^42 elements");
  if (!layout.elements) return window;  // there are samples, which divide the elements: see parse_noise
  const int64_t sample = layout.elements / layout.samples;
  Strides& at = window.at = parse_strides("window", item(value, 1), item(value, 2), sample, kMostOfWhole - window.first);
  if (at.strides[at.dims - 1] == 1) return window;
  if (at.dims == kMaxDims) refuse("window", "has too many dimensions");
  at.sizes[at.dims] = at.strides[at.dims] = 1;
  ++at.dims;
  return window;
}

Indices parse_indices(py::handle value) {
  const Memory memory = parse_memory("indices", value, 3);
  if (memory.code != kInt64) refuse("indices", "must be int64");
  return {(const int64_t*)memory.data, memory.elements};
}

}  // namespace fastdiff
