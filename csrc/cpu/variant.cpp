// The kernels, compiled once for each instruction set: FASTDIFF_VARIANT names the namespace, the compiler's flags say
// what may be used. Everything but the table is inside that namespace or static, because a function with one name in
// two of these would be linked from either, and run instructions that the machine may lack.
#include "affine.h"
#include "gaussian.h"
#include "loss.h"
#include "moments.h"
#include "posterior.h"
#include "step.h"
#include "table.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

extern const Table table;
const Table table = {
    normal_units,
    torch_normal_chunks,
    {noise_units<float>, noise_units<double>},
    {convert_units<float>, convert_units<double>},
    {loss_units<float>, loss_units<double>},
    {element_units<float>, element_units<double>},
    {gaussian_units<float>, gaussian_units<double>},
    {posterior_units<float>, posterior_units<double>},
    {posterior_gradient_units<float>, posterior_gradient_units<double>},
    {kl_normal_units<float>, kl_normal_units<double>},
    {mask_sum_units<float>, mask_sum_units<double>},
    {moments_units<float>, moments_units<double>},
    {moments_gradient_units<float>, moments_gradient_units<double>},
    {step_units<float>, step_units<double>},
};

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
