#include "run.h"

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cmath>
#include <memory>

#include "table.h"
#include "work.h"

namespace fastdiff {

namespace {

// Below so many elements a thread, waking it costs more than it saves.
constexpr int64_t kElementsPerThread = 16384;

// Of a row, which is a sequence where there are starts.
int64_t row_size(const Layout& layout, int64_t row) {
  return layout.starts ? layout.starts[row + 1] - layout.starts[row] : layout.elements / layout.rows;
}

int64_t units_of_row(const Layout& layout, int64_t row) {
  if (layout.starts) return (row_size(layout, row) + kUnit - 1) / kUnit;
  return layout.shared * ((layout.inner + kUnit - 1) / kUnit);
}

int64_t unit_count(const Layout& layout) {
  if (layout.elements == 0) return 0;
  if (!layout.starts) return layout.rows * units_of_row(layout, 0);
  int64_t units = 0;
  for (int64_t row = 0; row < layout.rows; ++row) units += units_of_row(layout, row);
  return units;
}

// What was written past the caches is there for every other thread.
void finish_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

template <class Body>
void parallel(int64_t units, int64_t elements, int threads, Body body) {
  int64_t team = threads > 0 ? threads : omp_get_max_threads();
  if (team > elements / kElementsPerThread) team = elements / kElementsPerThread;
  if (team > units) team = units;
  if (team <= 1) {
    if (units) body(0, units);
    finish_streams();
    return;
  }
#pragma omp parallel num_threads(int(team))
  {
    const int64_t index = omp_get_thread_num(), size = omp_get_num_threads();
    body(units * index / size, units * (index + 1) / size);
    finish_streams();
  }
}

template <class Body>
void parallel(const Layout& layout, int threads, Body body) {
  parallel(unit_count(layout), layout.elements, threads, body);
}

// An operation that goes through more memory than a last-level cache commonly holds (and it has two inputs of the size
// of a result, or more) leaves little of the result there; written past the caches, its memory need not be read first.
constexpr int64_t kCache = int64_t(32) << 20;

// The system hands memory out as it is first written, 4 KiB at a time, which takes longer than the writing, and later
// every page has to be looked up. For a result of this size, which has one of 2 MiB in it wherever it begins, the system is
// asked for large pages where it has them.
constexpr int64_t kLargePages = int64_t(4) << 20;

void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), start = ((uintptr_t)data + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)data + uintptr_t(bytes)) / page * page;
  if (start < end) madvise((void*)start, end - start, MADV_HUGEPAGE);  // advice: no matter if it is refused
#else
  (void)data, (void)bytes;
#endif
}

Output placed(Output output, const Layout& layout, int64_t cache = kCache) {
  const int64_t size = output.dtype == DType::f64 ? 8 : output.dtype == DType::f32 ? 4 : 2;
  const int64_t bytes = size * layout.elements;
  output.streamed = output.data && 3 * bytes > cache;
  if (output.data && bytes >= kLargePages) ask_for_large_pages(output.data, bytes);
  return output;
}

// A gradient's memory was last used before the network's backward pass of the step before: beyond what one core's cache
// commonly holds it has to be fetched only to be written over.
constexpr int64_t kGradientCache = int64_t(6) << 20;

double number(const Rows& rows, bool wide, int64_t row, double absent) {
  if (!rows.data) return absent;
  const int64_t at = row * rows.stride;
  return wide ? ((const double*)rows.data)[at] : double(((const float*)rows.data)[at]);
}

void put(const Output& to, bool wide, int64_t at, double value) {
  if (wide)
    ((double*)to.data)[at] = value;
  else
    ((float*)to.data)[at] = float(value);
}

// The sum of each row from those of its units, which lie side by side: in one order, whatever thread made them.
void sum_rows(const Layout& layout, const double* units, double* rows) {
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t count = units_of_row(layout, row);
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += units[k];
    rows[row] = sum;
    units += count;
  }
}

// What each row's sum is divided by, as in the reference. The result: over how many rows a mean is.
int64_t find_divisors(const LossCall& call, bool wide, int threads, double* units, double* divisors) {
  const Layout& layout = call.kernel.layout;
  const int64_t rows = layout.rows;
  if (call.reduction == Reduction::sum) {
    for (int64_t row = 0; row < rows; ++row) divisors[row] = 1;
    return rows;
  }
  const bool masked = call.normalization != Normalization::none && call.kernel.mask.tensor.data;
  // Rows of one size have the same divisor whether each is averaged or all elements are.
  if (!masked && !(layout.starts && call.normalization == Normalization::row)) {
    const bool own = call.normalization == Normalization::none && call.reduction == Reduction::none;
    for (int64_t row = 0; row < rows; ++row)
      divisors[row] = own ? double(row_size(layout, row)) : double(layout.elements) / double(rows);
    return rows;
  }
  for (int64_t row = 0; row < rows; ++row) divisors[row] = masked ? 0 : double(row_size(layout, row));
  if (masked && layout.elements) {
    const MaskSumArguments arguments{layout, call.kernel.mask, units};
    const auto kernel = chosen().table->mask_sum[wide];
    parallel(layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
    sum_rows(layout, units, divisors);
  }
  if (call.normalization == Normalization::row) {
    // A row with nothing in its mask has no mean, and is left out of that of the rows.
    int64_t kept = 0;
    for (int64_t row = 0; row < rows; ++row) {
      kept += divisors[row] != 0;
      if (divisors[row] == 0) divisors[row] = 1;
    }
    return kept || !rows ? kept : 1;
  }
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) sum += divisors[row];
  for (int64_t row = 0; row < rows; ++row) divisors[row] = sum == 0 ? 1 : sum / double(rows);
  return rows;
}

// upstream * weight / divisor, and the mean over `kept` rows: what multiplies a row's part of the gradient.
void find_factors(const LossCall& call, bool wide, const double* divisors, int64_t kept, double* factors) {
  const int64_t rows = call.kernel.layout.rows;
  for (int64_t row = 0; row < rows; ++row) {
    double factor = number(call.upstream, wide, row, 1);
    if (call.reduction == Reduction::mean) factor /= double(kept);
    factor = factor / divisors[row] * number(call.kernel.weight, wide, row, 1);
    if (wide)
      factors[row] = factor;
    else
      ((float*)factors)[row] = float(factor);
  }
}

void reduce(const LossCall& call, bool wide, const double* sums, const double* divisors, int64_t kept) {
  const int64_t rows = call.kernel.layout.rows;
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const double mean = sums[row] / divisors[row];
    const double weight = number(call.kernel.weight, wide, row, 1);
    const double weighted = weight == 0 ? 0 : weight * sums[row] / divisors[row];
    if (call.means) call.means[row] = mean;
    if (call.result.data && call.reduction == Reduction::none) put(call.result, wide, row, weighted);
    total += weighted;
  }
  if (!call.result.data || call.reduction == Reduction::none) return;
  if (call.reduction == Reduction::mean) total = rows ? total / double(kept) : NAN;
  put(call.result, wide, 0, total);
}

// Runs the kernel of a loss, whose factor and sums are made here, and puts the loss together from its sums.
template <class Arguments>
void in_units(LossCall& call, Arguments& arguments, void (*kernel)(const Arguments&, int64_t, int64_t), bool wide,
              int threads) {
  const Layout& layout = arguments.layout;
  const bool value = call.result.data || call.means;
  const int64_t rows = layout.rows, units = unit_count(layout);
  // One piece of memory: the sums of the units, then for each row its sum, divisor and factor.
  const std::unique_ptr<double[]> memory(new double[size_t(units + 3 * rows + 1)]);
  double *unit_sums = memory.get(), *row_sums = unit_sums + units, *divisors = row_sums + rows,
         *factors = divisors + rows;
  const int64_t kept = find_divisors(call, wide, threads, unit_sums, divisors);
  if (arguments.gradient.data) {
    find_factors(call, wide, divisors, kept, factors);
    arguments.factor = {factors, 1};
  }
  arguments.gradient = placed(arguments.gradient, layout, kGradientCache);
  arguments.sums = value ? unit_sums : nullptr;
  if (units && (value || arguments.gradient.data))
    parallel(layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  if (!value) return;
  if (units)
    sum_rows(layout, unit_sums, row_sums);
  else
    for (int64_t row = 0; row < rows; ++row) row_sums[row] = 0;
  reduce(call, wide, row_sums, divisors, kept);
}

}  // namespace

void run(NormalArguments& arguments, int threads) {
  arguments.out = placed(arguments.out, arguments.layout);
  const auto kernel = chosen().table->normal;
  parallel(arguments.layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

void run(TorchNormalArguments& arguments, int threads) {
  const auto kernel = chosen().table->torch_normal;
  // Every thread makes all words up to its own, which is the smaller part of the work.
  parallel(arguments.elements / 16, arguments.elements, threads,
           [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

void run(NoiseArguments& arguments, bool wide, int threads) {
  arguments.x_t = placed(arguments.x_t, arguments.layout);
  arguments.keep = placed(arguments.keep, arguments.layout);
  const auto kernel = chosen().table->noise[wide];
  parallel(arguments.layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

void run(ConvertArguments& arguments, bool wide, int threads) {
  arguments.out = placed(arguments.out, arguments.layout);
  const auto kernel = chosen().table->convert[wide];
  parallel(arguments.layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

void run(StepArguments& arguments, bool wide, int threads) {
  arguments.y = placed(arguments.y, arguments.layout);
  arguments.x0 = placed(arguments.x0, arguments.layout);
  arguments.entry = placed(arguments.entry, arguments.layout);
  // What is written over was just read: it is in the caches, and stays there.
  if (arguments.y.data == arguments.x.data) arguments.y.streamed = false;
  for (const Input& past : arguments.history)
    if (arguments.entry.data == past.data) arguments.entry.streamed = false;
  const auto kernel = chosen().table->step[wide];
  parallel(arguments.layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

void run(LossCall& call, bool wide, int threads) {
  LossArguments& arguments = call.kernel;
  if (arguments.errors.data || arguments.d_errors.data) {
    arguments.errors = placed(arguments.errors, arguments.layout);
    arguments.gradient = placed(arguments.gradient, arguments.layout, kGradientCache);
    const auto kernel = chosen().table->elements[wide];
    parallel(arguments.layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
    return;
  }
  call.kernel.every_sum = call.means;
  in_units(call, call.kernel, chosen().table->loss[wide], wide, threads);
}

void run(GaussianCall& call, bool wide, int threads) {
  GaussianArguments& arguments = call.kernel;
  // As a loss without a mask, of weight 1: the weights are in the terms.
  LossCall loss{};
  loss.kernel.layout = arguments.layout;
  loss.reduction = call.reduction;
  loss.upstream = call.upstream;
  loss.result = call.result;
  in_units(loss, arguments, chosen().table->gaussian[wide], wide, threads);
}

void run(PosteriorArguments& arguments, bool wide, int threads) {
  arguments.z = placed(arguments.z, arguments.layout);
  arguments.x_t = placed(arguments.x_t, arguments.layout);
  arguments.keep = placed(arguments.keep, arguments.layout);
  const auto kernel = chosen().table->posterior[wide];
  parallel(arguments.layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

void run(PosteriorGradientArguments& arguments, bool wide, int threads) {
  arguments.gradient = placed(arguments.gradient, arguments.layout, kGradientCache);
  const auto kernel = chosen().table->posterior_gradient[wide];
  parallel(arguments.layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

void run(KLNormalCall& call, bool wide, int threads) {
  KLNormalArguments& arguments = call.kernel;
  LossCall loss{};  // as a loss without a mask
  loss.kernel.layout = arguments.layout;
  loss.kernel.weight = arguments.weight;
  loss.reduction = call.reduction;
  loss.upstream = call.upstream;
  loss.result = call.result;
  in_units(loss, arguments, chosen().table->kl_normal[wide], wide, threads);
}

void run(MomentsCall& call, bool wide, int threads) {
  MomentsArguments& kernel_arguments = call.kernel;
  const Layout& layout = kernel_arguments.layout;
  const int64_t rows = layout.rows, units = unit_count(layout);
  // One piece of memory: the sums of the units for each moment, then those of the rows for one.
  const std::unique_ptr<double[]> memory(new double[size_t(kMoments * units + rows)]);
  double* row_sums = memory.get() + kMoments * units;
  kernel_arguments.sums = memory.get();
  kernel_arguments.units = units;
  const auto kernel = chosen().table->moments[wide];
  parallel(layout, threads, [&](int64_t begin, int64_t end) { kernel(kernel_arguments, begin, end); });
  for (int moment = 0; moment < kMoments; ++moment) {
    const Output& result = call.results[moment];
    if (!result.data) continue;
    if (units) sum_rows(layout, memory.get() + moment * units, row_sums);
    for (int64_t row = 0; row < rows; ++row) put(result, wide, row, units ? row_sums[row] : 0);
  }
}

void run(MomentsGradientArguments& arguments, bool wide, int threads) {
  arguments.d_a = placed(arguments.d_a, arguments.layout, kGradientCache);
  arguments.d_b = placed(arguments.d_b, arguments.layout, kGradientCache);
  const auto kernel = chosen().table->moments_gradient[wide];
  parallel(arguments.layout, threads, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

}  // namespace fastdiff
