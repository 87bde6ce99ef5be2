"""The ops as torch knows them: schemas, fakes, autograd, compile, vmap, autocast, views."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import devices
import pytest
import samples
import torch
from compare import SEED, assert_close, raw_calls, run, same_bits
from embattle import ops, reference
from samples import DTYPES, NORMS, Call
from torch import Tensor
from torch.autograd import forward_ad

# What no function of embattle.ops calls; test_ops_grad_rows.py has it.
HIDDEN = {"embedding_grad_rows"}
REGISTERED = sorted(
    name.removeprefix("embattle::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("embattle::") and name.removeprefix("embattle::") not in HIDDEN
)

# The samples that go through opcheck, which is slow: one per kind of option.
CHECKED = (
    "l2/plain/sample",
    "l2/plain/token-masked",
    "l2/plain/ragged",
    "l2/plain/0d",
    "l2/plain/no-samples",
    "l1/plain/ragged-masked",
    "linf/plain/transposed",
    "l1/top-3/sample",
    "l2/x0-box-eps-per-group/sample",
    "l1/box-tensor/ragged",
    "l2/budget-2/token",
    "l2/nonfinite/sample",
    "l2/mi-plain/sample",
    "linf/apgd-x0-box/token-masked",
    "l1/mi-nonfinite/ragged",
    "l2/normal/sample",
    "linf/normal/ragged-masked",
)


def _checked(op: str) -> list[samples.Sample]:
    every = samples.for_op(op)
    every = tuple(s for s in every if "poisoned" not in s.name)  # opcheck takes NaN for unequal
    chosen = [s for s in every if s.name in CHECKED]
    return chosen or list(every[:: max(1, len(every) // 8)])


def _function(op: str) -> str:
    """The function of embattle.ops that calls a registered op."""
    forward = op.removesuffix("_backward").removesuffix("_constant")
    forward = forward.removesuffix("_plain").replace("_plain_", "_")
    return forward if hasattr(ops, forward) else forward + "_"


@pytest.mark.parametrize("op", REGISTERED)
def test_opcheck(op: str) -> None:
    """Every registered op has a function in embattle.ops, and samples, and passes opcheck."""
    function = _function(op)
    assert hasattr(ops, function), f"embattle::{op} has no function in embattle.ops"
    checked = 0
    for sample in _checked(function):
        call = sample.call(torch.float32)
        if op.endswith("_backward") or op == "project":  # else it is another one
            call = _requiring_grad(call)

            def use(call: Call = call) -> None:
                outputs = [t for t in run(function, call) if t.requires_grad]
                sum(t.sum() for t in outputs).backward()  # type: ignore[union-attr]

        else:

            def use(call: Call = call) -> None:
                run(function, call)

        for overload, args, kwargs in raw_calls(use):
            if overload._schema.name != f"embattle::{op}":
                continue
            torch.library.opcheck(overload, args, kwargs)
            checked += 1
    assert checked, f"no sample of {function} calls embattle::{op}"


def _requiring_grad(call: Call) -> Call:
    return call.map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)


def test_functions_on_groups_are_said_by_their_definitions() -> None:
    for op in samples.GROUP_OPS:
        function, definition = getattr(ops, op), getattr(reference, op)
        assert inspect.signature(function) == inspect.signature(definition)
        assert function.__doc__ == definition.__doc__
        assert function.__name__ == op
        if hasattr(ops, op + "_"):
            assert inspect.signature(getattr(ops, op + "_")) == inspect.signature(definition)


def test_an_op_in_place_takes_what_its_other_form_takes() -> None:
    for op in REGISTERED:
        if op.endswith("_") and op[:-1] in REGISTERED:
            taken = [
                [(a.name, str(a.type), a.default_value) for a in form.default._schema.arguments]
                for form in (getattr(torch.ops.embattle, n) for n in (op, op[:-1]))
            ]
            assert taken[0] == taken[1]


@pytest.mark.parametrize("op", samples.GROUP_OPS)
def test_what_is_missing_too_much_or_unknown_is_a_type_error(op: str) -> None:
    call = samples.for_op(op)[0].call(torch.float32)
    function = getattr(ops, op)
    function(*call.args, **call.kwargs)
    with pytest.raises(TypeError, match="unknown"):
        function(*call.args, **call.kwargs, unknown=None)
    with pytest.raises(TypeError, match="positional"):
        function(*call.args, call.args[0], **call.kwargs)
    with pytest.raises(TypeError, match="missing"):
        function(*call.args[:-1], **call.kwargs)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY:
            fewer = {key: value for key, value in call.kwargs.items() if key != name}
            with pytest.raises(TypeError, match=f"missing.*{name}"):
                function(*call.args, **fewer)
    names = list(inspect.signature(function).parameters)[: len(call.args)]
    function(**dict(zip(names, call.args, strict=True)), **call.kwargs)


def test_every_function_has_samples() -> None:
    for name in ops.__all__:
        assert samples.for_op(name), f"embattle.ops.{name} has no samples"
        assert hasattr(reference, name), f"embattle.ops.{name} is not defined"


# --- torch.compile --------------------------------------------------------------------------------


def _batch_call(op: str, batch: int) -> Call:
    """A call of an op that has a batch dimension, with most options in use."""
    g = torch.Generator().manual_seed(batch)
    shape = (batch, 5, 6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def ids(*shape: int, rows: int = 7) -> Tensor:
        return torch.randint(0, rows, shape, generator=g)

    cut = {"mask": torch.rand(shape[:-1], generator=g) > 0.2}
    name = op.removesuffix("_") if op in samples.WRITING else op
    if name == "pgd_step":
        eps = torch.rand(batch, generator=g)
        return Call(
            [normal(*shape), normal(*shape)], {"step_size": 0.3, "eps": eps, "norm": "L2", **cut}
        )
    if name == "momentum_step":
        tensors = [normal(*shape) for _ in range(3)]
        return Call(tensors, {"decay": 0.9, "step_size": 0.3, "eps": 1.0, "norm": 1, **cut})
    if name == "project":
        return Call([normal(*shape)], {"eps": 1.0, "norm": math.inf, "group": "token", **cut})
    if name == "random_start":
        return Call([normal(*shape)], {"eps": 1.0, "lower": -0.5, "upper": normal(*shape).abs()})
    if name == "gaussian_noise":
        return Call([normal(*shape)], {"std": 0.3, **cut})
    if name == "group_norm":
        return Call([normal(*shape)], {"norm": "linf", **cut})
    if name in ("per_sample_norm", "clip_and_sum"):
        grads = [normal(*shape), normal(batch, 3)]
        return Call([grads], {} if name == "per_sample_norm" else {"max_norm": 1.0})
    if name == "linear_grad_norm":
        return Call([normal(*shape), normal(batch, 5, 4)], {"bias": True})
    if name == "embedding_grad_norm":
        return Call([ids(batch, 5), normal(*shape)], {"padding_idx": 0})
    if name == "embedding_grad_sum":
        weights = torch.rand(batch, generator=g)
        call = [ids(batch, 5), normal(*shape), 7]
        return Call(call, {"padding_idx": 0, "weights": weights})
    if name == "embedding_perturb":
        inverse = ids(batch, 5) - 1
        return Call([normal(7, 6), ids(batch, 5), normal(6, 6), inverse], {})
    assert name == "rowwise_adagrad_", f"no batch of {op}: write one"
    return Call([normal(7, 6), normal(7).abs(), ids(batch, 5), normal(*shape)], {"lr": 0.1})


@pytest.mark.parametrize("op", ops.__all__)
def test_compiles_whole_and_once(op: str) -> None:
    """fullgraph, no recompilation when the batch size changes, and the same bits as eager."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    def function(args: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        result = getattr(ops, op)(*args, **kwargs)
        if isinstance(result, Tensor):
            return [result + 0]
        return [t + 0 for part in result for t in (part if isinstance(part, list) else [part])]

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for batch in (8, 11, 13):  # not equal to another size, which would be taken for the batch
        call = _batch_call(op, batch)
        again = _batch_call(op, batch)
        torch.manual_seed(SEED)
        wanted = function(*call)
        torch.manual_seed(SEED)
        for a, b in zip(compiled(*again), wanted, strict=True):
            assert same_bits(a, b)
        for a, b in zip(_tensors(again), _tensors(call), strict=True):
            assert same_bits(a, b), "compiled code writes what eager code writes"
        if batch == 8:
            first = graphs
    assert graphs == first, "recompiled for another batch size"


def _tensors(call: Call) -> list[Tensor]:
    found: list[Tensor] = []
    call.map(lambda t: (found.append(t), t)[1])
    return found


def test_compiled_training_step_differentiates_through_ops() -> None:
    def loss(delta: Tensor, weight: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
        x = ops.embedding_perturb(weight, ids, ops.project(delta, eps=0.5), inverse)
        return x.tanh().sum()

    call = _batch_call("embedding_perturb", 4)
    weight, ids, delta, inverse = call.args
    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = (delta.clone().requires_grad_(), weight.clone().requires_grad_())
        grads.append(torch.autograd.grad(function(*leaves, ids, inverse), leaves))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_exports_with_a_dynamic_batch() -> None:
    class Step(torch.nn.Module):
        def forward(self, delta: Tensor, grad: Tensor) -> Tensor:
            return ops.pgd_step(delta, grad, step_size=0.1, eps=0.5, group="token")

    batch = torch.export.Dim("batch", min=2)
    args = (torch.randn(4, 3, 5), torch.randn(4, 3, 5))
    program = torch.export.export(Step(), args, dynamic_shapes=({0: batch}, {0: batch}))
    more = (torch.randn(9, 3, 5), torch.randn(9, 3, 5))
    assert torch.equal(program.module()(*more), Step()(*more))


@pytest.mark.parametrize("op", [op for op in ops.__all__ if op != "rowwise_adagrad_"])
def test_meta_tensors_have_the_shapes_of_results(op: str) -> None:
    if op in samples.WRITING:
        return
    for sample in samples.for_op(op)[::7]:
        for dtype in DTYPES:
            call = sample.call(dtype)
            call = Call(call.args, {k: v for k, v in call.kwargs.items() if k != "nonfinite"})
            results = run(op, call)
            shapes = run(op, call.map(lambda t: t.to("meta")))
            for result, shape in zip(results, shapes, strict=True):
                assert shape.is_meta
                assert (shape.shape, shape.dtype) == (result.shape, result.dtype)


# --- autograd -------------------------------------------------------------------------------------


def _with_floats(call: Call, values: Iterable[Tensor]) -> Call:
    """The call with its floating tensors replaced, in order."""
    fresh = iter(values)
    return call.map(lambda t: next(fresh) if t.is_floating_point() else t)


DIFFERENTIABLE = ("project", "clip_and_sum", "embedding_perturb")
_GRADIENT_SAMPLES = {
    "project": (
        [f"{norm}/half/{cut}" for norm in NORMS for cut in ("sample", "token-masked", "ragged")]
        + [f"{norm}/{place}/sample" for norm in NORMS for place in ("x0", "box-tensor", "x0-box")]
        + [f"{norm}/eps-per-group/{cut}" for norm in NORMS for cut in ("sample", "ragged")]
        + ["l2/half/0d", "l2/half/no-samples", "l2/half/transposed", "l2/zeros-1/6x37"]
    ),
    "clip_and_sum": (
        [f"{mode}/mixed" for mode in ("flat", "per_layer", "automatic")]
        + [f"{mode}/weights-normal" for mode in ("flat", "per_layer", "automatic")]
        + ["flat/no-samples", "flat/mixed-zeros", "automatic/mixed-zeros", "flat/bound-0-one-zero"]
        + ["flat/bound-inf-one-zero", "per_layer/bounds"]
    ),
    "embedding_perturb": ["2d", "1d", "0d", "3d", "no-delta", "no-indices", "transposed", "many"],
}


def _gradient_sample(op: str, name: str) -> samples.Sample:
    return next(s for s in samples.for_op(op) if s.name == name)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in _GRADIENT_SAMPLES.items() for name in names]
)
def test_gradient_is_that_of_the_reference(op: str, name: str) -> None:
    """Autograd through the op and through its definition, on the same upstream gradient."""
    for dtype in DTYPES:
        call = _gradient_sample(op, name).call(dtype)
        grads = []
        for source, own in ((ops, call), (reference, call.double())):
            leaves: list[Tensor] = []

            def leaf(t: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
                if not t.is_floating_point():
                    return t
                leaves.append(t.detach().clone().requires_grad_())
                return leaves[-1]

            args = Call(own.args, {}).map(leaf).args
            results = run(op, Call(args, own.kwargs), source)
            g = torch.Generator().manual_seed(3)
            scalar = sum(
                (t.double() * torch.randn(t.shape, generator=g).double()).sum()
                for t in results
                if t.isfinite().all()
            )
            assert isinstance(scalar, Tensor)
            grads.append(torch.autograd.grad(scalar, leaves, materialize_grads=True))
        for index, (a, b) in enumerate(zip(*grads, strict=True)):
            assert a.dtype == leaves_dtype(call, index)
            scale = b.abs().nan_to_num().max() if b.numel() else torch.zeros(())
            assert_close(
                a, b, 4 * scale.double() + 2, max(a.numel(), 2), f"gradient {index}, {dtype}"
            )


def leaves_dtype(call: Call, index: int) -> torch.dtype:
    found = [t for t in _tensors(Call(call.args, {})) if t.is_floating_point()]
    return found[index].dtype


def test_a_nonfinite_sample_has_no_gradient_and_harms_no_other() -> None:
    grads = [torch.randn(3, 4), torch.randn(3, 2, 2)]
    for poison in (math.nan, math.inf):
        leaves = [g.clone().requires_grad_() for g in grads]
        poisoned = [
            leaves[0],
            torch.where(torch.tensor([0, 1, 0]).bool()[:, None, None], poison, leaves[1]),
        ]
        sums, _ = ops.clip_and_sum(poisoned, max_norm=1.0)
        results = torch.autograd.grad(sum(s.sin().sum() for s in sums), leaves)
        others = [g[[0, 2]].requires_grad_() for g in grads]
        sums, _ = ops.clip_and_sum(others, max_norm=1.0)
        wanted = torch.autograd.grad(sum(s.sin().sum() for s in sums), others)
        for result, want in zip(results, wanted, strict=True):
            assert (result[1] == 0).all()
            assert torch.allclose(result[[0, 2]], want, atol=1e-6)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op: str) -> None:
    for name in _GRADIENT_SAMPLES[op]:
        if "zero" in name or "many" in name or "poisoned" in name:
            continue  # not differentiable there, or large; compared with the reference above
        call = _gradient_sample(op, name).call(torch.float64)
        floats = [
            t.detach().clone().requires_grad_()
            for t in _tensors(Call(call.args, {}))
            if t.is_floating_point()
        ]

        def function(*values: Tensor, call: Call = call) -> tuple[Tensor, ...]:
            args = _with_floats(Call(call.args, {}), values).args
            return tuple(run(op, Call(args, call.kwargs)))

        if any(t.numel() for t in function(*floats)):
            assert torch.autograd.gradcheck(function, floats), name


@pytest.mark.parametrize(
    "op", [op for op in ops.__all__ if not op.endswith("_") and op not in DIFFERENTIABLE]
)
def test_other_ops_are_outside_autograd(op: str) -> None:
    """Steps, noise and norms give constants, whatever their inputs require."""
    call = _requiring_grad(_batch_call(op, 3))
    for result in run(op, call):
        assert not result.requires_grad


def test_second_derivatives_are_refused_or_right() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 1])
    assert torch.autograd.gradgradcheck(
        lambda table, x: ops.embedding_perturb(table, ids, x, torch.tensor([0, 2, -1])), (table, x)
    )


# --- vmap -----------------------------------------------------------------------------------------


def _stack(calls: list[Call], dims: Callable[[Tensor], int]) -> tuple[Call, Call]:
    """Calls stacked into one, and the in_dims of its tensors."""
    columns = [_tensors(call) for call in calls]
    stacked = iter([torch.stack(column, dims(column[0])) for column in zip(*columns, strict=True)])
    return calls[0].map(lambda t: next(stacked)), calls[0].map(lambda t: torch.tensor(dims(t)))


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("op", [op for op in ops.__all__ if not op.endswith("_")])
def test_vmap_is_a_loop(op: str, dim: int) -> None:
    calls = [_batch_call(op, 3) for _ in range(4)]
    g = torch.Generator().manual_seed(0)

    def shaken(t: Tensor) -> Tensor:
        return t + 0.1 * torch.randn(t.shape, generator=g) if t.is_floating_point() else t

    calls = [call.map(shaken) for call in calls]
    random = op in ("random_start", "gaussian_noise")
    stacked, _ = _stack(calls, lambda t: dim)
    leaves = _tensors(stacked)

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        fresh = iter(tensors)
        result = getattr(ops, op)(*(own := calls[0].map(lambda t: next(fresh))).args, **own.kwargs)
        if isinstance(result, Tensor):
            return (result,)
        return tuple(t for part in result for t in (part if isinstance(part, list) else [part]))

    torch.manual_seed(SEED)
    results = torch.func.vmap(one, in_dims=dim, randomness="same" if random else "error")(*leaves)
    for i, call in enumerate(calls):
        torch.manual_seed(SEED)
        for result, wanted in zip(results, one(*_tensors(call)), strict=True):
            if random:
                assert result[i].shape == wanted.shape
                assert result[i].isfinite().all()
            else:
                scale = wanted.abs().max().double()
                assert_close(result[i], wanted, scale, 32, f"{op}, call {i}")


@pytest.mark.parametrize("which", [0, 1])
def test_vmap_over_one_argument_alone(which: int) -> None:
    args = [torch.randn(4, 3, 5), torch.randn(4, 3, 5)]
    args[1 - which] = args[1 - which][0]
    dims = [None, None]
    dims[which] = 0  # type: ignore[call-overload]
    options: dict[str, Any] = {"step_size": 0.5, "eps": 1.0}
    results = torch.func.vmap(lambda d, g: ops.pgd_step(d, g, **options), in_dims=tuple(dims))(
        *args
    )
    for i in range(4):
        wanted = ops.pgd_step(*(a[i] if a.dim() == 3 else a for a in args), **options)
        assert torch.equal(results[i], wanted)


def test_projection_differentiates_through_vmap() -> None:
    """Where a transform hides from one level that another one differentiates."""
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    leaf = x.clone().requires_grad_()

    def one(x: Tensor) -> Tensor:
        return ops.project(x, eps=0.7).pow(3).sum()

    expected = torch.autograd.grad(sum(map(one, leaf.unbind())), leaf)[0]
    torch.func.vmap(one)(leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)
    # torch.func.grad knows no gradient rules of custom ops: refused, and not taken for a constant.
    for function in (lambda x: torch.func.vmap(one)(x).sum(), one):
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(function)(x)
    assert not ops.project(x, eps=0.7).requires_grad


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("op", [op for op in ops.__all__ if op.endswith("_")])
def test_vmap_of_an_op_in_place_is_a_loop(op: str, dim: int) -> None:
    g = torch.Generator().manual_seed(0)

    def shaken(t: Tensor) -> Tensor:
        return t + 0.1 * torch.rand(t.shape, generator=g) if t.is_floating_point() else t

    calls = [_batch_call(op, 3).map(shaken) for _ in range(4)]
    stacked, _ = _stack(calls, lambda t: dim)
    random = op == "gaussian_noise_"

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        fresh = [t.clone() for t in tensors]
        left = iter(fresh)
        own = calls[0].map(lambda t: next(left))
        getattr(ops, op)(*own.args, **own.kwargs)
        return tuple(t for t in fresh if t.is_floating_point())

    mapped = torch.func.vmap(one, in_dims=dim, randomness="different" if random else "error")
    results = mapped(*_tensors(stacked))
    for i, call in enumerate(calls):
        for result, wanted in zip(results, one(*_tensors(call)), strict=True):
            if random:
                assert not torch.equal(result[i], _tensors(call)[0])
            else:
                assert_close(result[i], wanted, wanted.abs().max().double(), 32, f"{op}, call {i}")


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ops.__all__)
def test_autocast_changes_nothing(op: str) -> None:
    """The ops accumulate in float32 or better: autocast must not round their inputs."""
    call, again = _batch_call(op, 3), _batch_call(op, 3)
    wanted = run(op, call)
    with torch.autocast(devices.kind, dtype=torch.bfloat16):
        results = run(op, again)
    for result, want in zip(results, wanted, strict=True):
        assert same_bits(result, want)


def test_autocast_gives_halves_to_the_ops() -> None:
    """What a model returns under autocast, a bfloat16 gradient, moves a float32 delta."""
    delta = torch.zeros(3, 4)
    weight = torch.randn(4, 2)
    with torch.autocast(devices.kind, dtype=torch.bfloat16):
        grad = torch.randn(3, 2) @ weight.t()
        assert grad.dtype == torch.bfloat16
        step = ops.pgd_step(delta, grad, step_size=1.0, eps=2.0)
    assert step.dtype == torch.float32
    assert torch.allclose(step.norm(dim=1), torch.ones(3))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_a_view_is_written_and_alignment_does_not_matter(
    dtype: torch.dtype,
) -> None:
    """A view is slid over every offset of a vector; a sentinel stands on both sides."""
    g = torch.Generator().manual_seed(1)
    for shape in ((3, 37), (5, 3), (1, 70)):
        count = math.prod(shape)
        delta = torch.randn(shape, generator=g).to(dtype)
        grad = torch.randn(shape, generator=g).to(dtype)
        for norm in NORMS:
            options: dict[str, Any] = {"step_size": 0.5, "eps": 1.0, "norm": norm}
            wanted = ops.pgd_step(delta, grad, **options)
            for offset in range(33):
                buffer = torch.full((count + 64,), 7.0, dtype=dtype)
                other = torch.full((count + 64,), math.nan, dtype=dtype)
                view = buffer[offset : offset + count].view(shape).copy_(delta)
                gradient = other[33 - offset : 33 - offset + count].view(shape).copy_(grad)
                ops.pgd_step_(view, gradient, **options)
                assert same_bits(view, wanted), f"{norm}, offset {offset}"
                assert (buffer[:offset] == 7).all()
                assert (buffer[offset + count :] == 7).all()


@pytest.mark.parametrize("op", list(samples.WRITING))
def test_in_place_ops_on_strided_views_write_the_view_alone(op: str) -> None:
    call = _batch_call(op, 4)
    wanted = run(op, _batch_call(op, 4))
    written = samples.WRITING[op]
    bases = []
    args = list(call.args)
    for i in range(written):
        base = torch.full((5, 6, 4, 3), 7.0)
        view = base.permute(2, 0, 1, 3)[..., 1]
        view.copy_(args[i])
        bases.append(base)
        args[i] = view
    results = run(op, Call(args, call.kwargs))
    for result, want, base in zip(results, wanted, bases, strict=True):
        assert same_bits(result, want)
        assert (base[..., 0] == 7).all()
        assert (base[..., 2] == 7).all()


def test_in_place_ops_tell_autograd() -> None:
    """Writing a tensor that a graph has saved is caught, as for torch's own in-place ops."""
    weight = torch.randn(3, 4, requires_grad=True)
    delta = torch.randn(3, 4)
    loss = (weight * delta).sum()
    ops.project_(delta, eps=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_ops_write_inference_tensors() -> None:
    with torch.inference_mode():
        delta = torch.ones(3, 4)
        assert ops.project_(delta, eps=1.0).eq(0.5).all()


@pytest.mark.parametrize("op", samples.GROUP_OPS)
def test_results_share_no_memory_with_arguments(op: str) -> None:
    call = _batch_call(op, 3)
    pointers = {t.untyped_storage().data_ptr() for t in _tensors(call)}
    for result in run(op, call):
        assert result.untyped_storage().data_ptr() not in pointers
        assert result.is_contiguous()


DIFFERENTIABLE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "project": lambda where, x: where.project(x, eps=0.5),
    "clip_and_sum": lambda where, x: where.clip_and_sum([x], max_norm=0.5)[0][0],
    "embedding_perturb": lambda where, x: where.embedding_perturb(
        torch.ones_like(x.detach()), torch.arange(3), x, torch.tensor([1, -1, 1])
    ),
}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_tangents_are_refused_and_not_lost(op: str) -> None:
    x, t = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    forward = functools.partial(DIFFERENTIABLE[op], ops)
    plain = functools.partial(DIFFERENTIABLE[op], ops.reference)
    with pytest.raises(NotImplementedError, match=rf"{op}: .*reverse mode.*reference\.{op}"):
        torch.func.jvp(forward, (x,), (t,))
    with pytest.raises(NotImplementedError, match=op):
        torch.func.jacfwd(forward)(x)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=op):
            forward(forward_ad.make_dual(x, t))
        torch.testing.assert_close(forward(x), plain(x))  # without a tangent all is well
    # What the error names does it, and agrees with the rule for reverse mode.
    _, moved = torch.func.jvp(plain, (x,), (t,))
    leaf = x.clone().requires_grad_()
    out = forward(leaf)
    along = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, leaf, along)
    torch.testing.assert_close((grad * t).sum(), (moved * along).sum())
