// The product of 17 to 64 rows of x: see linear.cu, which takes fewer.
#pragma once

#include "inferlab/linear.h"

namespace inferlab::cuda {

constexpr int64_t kMaxWideRows = 64;

bool can_linear_wide(const LinearParams& params);
int64_t linear_wide_workspace_bytes(const LinearParams& params);
Status linear_wide(const LinearParams& params, void* workspace, void* stream);

}  // namespace inferlab::cuda
