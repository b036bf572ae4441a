// verify_tree_match, _rejection and _lossy: walk each sequence's tree from the root, entering the
// first child that the policy accepts; where none is, the walk ends with a bonus token.
#pragma once

#include "inferlab/sampling.h"

namespace inferlab {

enum class LossyPolicy : int { kConfThreshold = 0, kTopkAgree = 1, kTypical = 2 };

struct VerifyParams {
  LogitsView logits;                // [batch, nodes, vocab]: the target's
  Ptr<const int32_t> tokens;        // [batch, nodes]
  Ptr<const int32_t> first_child;   // [batch, nodes]
  Ptr<const int32_t> next_sibling;  // [batch, nodes]
  Ptr<const int32_t> seq_lens;      // [batch]
  SamplingParams sampling;
  Ptr<int32_t> accepted_nodes;   // [batch, nodes] out
  Ptr<int32_t> accepted_tokens;  // [batch, nodes] out
  Ptr<int32_t> num_accepted;     // [batch] out
  int64_t batch;
  int64_t nodes;
};

struct RejectionParams {
  VerifyParams walk;
  LogitsView draft_logits;  // [batch, nodes, vocab]; data null: a point mass at each child
  bool with_replacement;
};

struct LossyParams {
  VerifyParams walk;
  LossyPolicy policy;
  float threshold_f32;  // where there is no double
  Double threshold;     // in [0, 1]; kTopkAgree: not read
  int64_t top_k;        // of kTopkAgree
};

#if !defined(__METAL_VERSION__)
namespace cpu {
Status verify_tree_match(const VerifyParams& params);
Status verify_tree_rejection(const RejectionParams& params);
Status verify_tree_lossy(const LossyParams& params);
}  // namespace cpu

namespace cuda {
// As cuda::sample. Links that do not go up in index end the walk.
int64_t verify_workspace_bytes(int64_t batch, int64_t nodes, int64_t vocab, bool penalised);
Status verify_tree_match(const VerifyParams& params, void* workspace, int64_t workspace_bytes,
                         void* stream);
// The draft's element type is the target's, or float. At most 128 siblings are tried at a node.
Status verify_tree_rejection(const RejectionParams& params, void* workspace,
                             int64_t workspace_bytes, void* stream);
Status verify_tree_lossy(const LossyParams& params, void* workspace, int64_t workspace_bytes,
                         void* stream);
}  // namespace cuda
#endif
}  // namespace inferlab
