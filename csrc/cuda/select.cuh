// max_groups: which groups of a sample move.
#pragma once

#include "plan.h"

namespace embattle::cuda {

cudaError_t select_workspace(const StepArgs& args, const Limits& limits, size_t* bytes);

// Sets *chosen to [groups] bytes inside the workspace: 1 where the group is among the
// args.max_groups of its sample with the largest gradient in the dual norm.
cudaError_t select_groups(const StepArgs& args, const Limits& limits, void* workspace,
                          unsigned char** chosen, const Context& context);

}  // namespace embattle::cuda
