// The one list of what the package can do: every op's schema, and nothing else.
//
// Conventions shared by the group ops (meaning: python/embattle/ops/reference.py):
//   norm           1., 2. or inf
//   token          every vector of the last dim is a group; otherwise everything but dim 0 is one
//   offsets        [groups + 1] int64, ragged groups of packed rows; overrides `token`
//   mask           bool, x.shape[:-1]; masked-out rows take no part and get no perturbation
//   *_per_group    [groups] or one element; overrides the float beside it
//   x0             the ball's centre: the first argument and the result are then x = x0 + delta
//   lower, upper   the box the result lies in; None for no bound
//   *_per_element  [] or [1] or x.shape; overrides the float beside it
//   nonfinite      int32 [groups], incremented where the gradient holds a NaN or an Inf
//   key            int64 [2]: what Philox is keyed with
// An op without a trailing underscore never writes its first argument; one with it returns nothing.

#include "stable.h"

// No argument is keyword-only: torch takes no autograd and vmap rules for keyword-only tensors.

#define EMBATTLE_BOX                                        \
  "Tensor? x0=None, float? lower=None, float? upper=None, " \
  "Tensor? lower_per_element=None, Tensor? upper_per_element=None"
#define EMBATTLE_STEP_OPTIONS                                                  \
  "float norm=2., bool token=False, Tensor? offsets=None, Tensor? mask=None, " \
  "Tensor? step_per_group=None, Tensor? eps_per_group=None, float top=1., "    \
  "int max_groups=-1, " EMBATTLE_BOX ", Tensor(n!)? nonfinite=None"
#define EMBATTLE_PLAIN_STEP \
  "float step_size, float eps, float norm=2., bool token=False, Tensor(n!)? nonfinite=None"
#define EMBATTLE_MOMENTUM_OPTIONS                                                \
  "float norm=2., bool apgd=False, bool token=False, Tensor? offsets=None, "     \
  "Tensor? mask=None, Tensor? step_per_group=None, Tensor? eps_per_group=None, " \
  "float top=1., " EMBATTLE_BOX ", Tensor(n!)? nonfinite=None"
#define EMBATTLE_BALL_OPTIONS                                                  \
  "float norm=2., bool token=False, Tensor? offsets=None, Tensor? mask=None, " \
  "Tensor? eps_per_group=None, " EMBATTLE_BOX
#define EMBATTLE_NOISE_OPTIONS                                                 \
  "float norm=2., bool token=False, Tensor? offsets=None, Tensor? mask=None, " \
  "Tensor? std_per_group=None, Tensor? eps_per_group=None, " EMBATTLE_BOX

STABLE_TORCH_LIBRARY(embattle, m) {
  // Perturbations in groups.
  m.def("pgd_step(Tensor delta, Tensor grad, float step_size, float eps, " EMBATTLE_STEP_OPTIONS
        ") -> Tensor");
  m.def("pgd_step_(Tensor(a!) delta, Tensor grad, float step_size, float eps, "  //
        EMBATTLE_STEP_OPTIONS ") -> ()");
  // The same where there is nothing but a ball of one radius. A small call's time is that of
  // turning arguments into what the stable ABI takes.
  m.def("pgd_step_plain(Tensor delta, Tensor grad, " EMBATTLE_PLAIN_STEP ") -> Tensor");
  m.def("pgd_step_plain_(Tensor(a!) delta, Tensor grad, " EMBATTLE_PLAIN_STEP ") -> ()");
  m.def("project(Tensor delta, float eps, " EMBATTLE_BALL_OPTIONS ") -> Tensor");
  // The same, but a constant to autograd: project's gradient rule takes longer than a small call.
  m.def("project_constant(Tensor delta, float eps, " EMBATTLE_BALL_OPTIONS ") -> Tensor");
  m.def("project_plain(Tensor delta, float eps, float norm=2., bool token=False) -> Tensor");
  m.def("project_(Tensor(a!) delta, float eps, " EMBATTLE_BALL_OPTIONS ") -> ()");
  m.def("random_start(Tensor like, Tensor key, float eps, " EMBATTLE_BALL_OPTIONS ") -> Tensor");
  m.def("gaussian_noise(Tensor x, Tensor key, float std, float eps, " EMBATTLE_NOISE_OPTIONS
        ") -> Tensor");
  m.def("gaussian_noise_(Tensor(a!) x, Tensor key, float std, float eps, " EMBATTLE_NOISE_OPTIONS
        ") -> ()");
  m.def(
      "momentum_step(Tensor delta, Tensor velocity, Tensor grad, float decay, float step_size, "
      "float eps, " EMBATTLE_MOMENTUM_OPTIONS ") -> (Tensor, Tensor)");
  m.def(
      "momentum_step_(Tensor(a!) delta, Tensor(b!) velocity, Tensor grad, float decay, "
      "float step_size, float eps, " EMBATTLE_MOMENTUM_OPTIONS ") -> ()");
  m.def(
      "group_norm(Tensor x, float norm=2., bool token=False, Tensor? offsets=None, "
      "Tensor? mask=None) -> Tensor");

  // Per-sample gradients: dim 0 of every tensor of the list is the batch.
  m.def("per_sample_norm(Tensor[] grads) -> Tensor");
  m.def(
      "clip_and_sum(Tensor[] grads, float[] max_norm, str mode='flat', Tensor? weights=None, "
      "float gamma=0.01) -> (Tensor[], Tensor)");
  m.def(
      "linear_grad_norm(Tensor input, Tensor grad_output, *, bool bias=False, "
      "str method='auto') -> Tensor");
  m.def(
      "embedding_grad_norm(Tensor indices, Tensor grad_output, int padding_idx=-1, "
      "Tensor? offsets=None, bool mean=False, Tensor? per_sample_weights=None) -> Tensor");

  m.def(
      "embedding_grad_sum(Tensor indices, Tensor grad_output, int rows, Tensor? weights=None, "
      "int padding_idx=-1) -> Tensor");
  // The same, of the rows that occur alone: those, ascending, and their sums. On the CPU only:
  // how many they are is known to the device alone.
  m.def(
      "embedding_grad_rows(Tensor indices, Tensor grad_output, int rows, Tensor? weights=None, "
      "int padding_idx=-1) -> (Tensor, Tensor)");

  // Embedding tables: cost follows the rows touched, never the table.
  m.def("embedding_perturb(Tensor weight, Tensor indices, Tensor delta, Tensor inverse) -> Tensor");
  m.def("embedding_perturb_backward(Tensor grad_output, Tensor inverse, int delta_rows) -> Tensor");
  m.def(
      "rowwise_adagrad_(Tensor(a!) weight, Tensor(b!) state, Tensor indices, Tensor grad, *, "
      "float lr, float eps=1e-8, float? max_norm=None) -> ()");
}
