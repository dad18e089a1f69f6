// The csrc/cpu kernels without Python, for AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer:
// `make sanitize` builds and runs this once for each.
#include "cases.h"

int main() {
  std::printf("instruction sets:");
  for (const std::string& name : realm_kernels::instruction_sets()) {
    std::printf(" %s", name.c_str());
  }
  std::printf("\nmips_topk: %lld calls\n", static_cast<long long>(sanitize::run_mips_topk()));
  std::printf("marginal_loss: %lld calls\n", static_cast<long long>(sanitize::run_marginal_loss()));
  std::printf("linear_marginal_loss: %lld calls\n",
              static_cast<long long>(sanitize::run_linear_marginal_loss()));
  std::printf("span_evidence: %lld calls\n", static_cast<long long>(sanitize::run_span_evidence()));
  std::printf("score_spans: %lld calls\n", static_cast<long long>(sanitize::run_score_spans()));
}
