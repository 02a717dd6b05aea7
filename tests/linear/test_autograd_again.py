"""`lora_linear` differentiated twice, forwards, in a batch, and exported."""

from __future__ import annotations

import functools
import itertools

import oracle
import pytest
import torch
from kernel_cases import PATHS, Case, drawn_mask, make

from lora_kernels import LoRALinear, lora_linear, use_backend

# torch's own forward mode compiles its decompositions by it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`")

NAMES = ("x", "weight", "lora_a", "lora_b", "bias")
SUBSETS = [s for size in range(1, 6) for s in itertools.combinations(NAMES, size)]
SHAPES = {"x": (4, 5), "weight": (3, 5), "lora_a": (2, 5), "lora_b": (3, 2), "bias": (3,)}


def tensors(*trained, dtype=torch.float64):
    made = {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
    return tuple(t.requires_grad_(name in trained) for name, t in made.items())


def seeded(dropout_p, function=lora_linear):
    def call(*inputs):
        torch.manual_seed(8)
        return function(*inputs, scale=0.7, dropout_p=dropout_p, training=True)

    return call


def plain(inputs, dropout_p, backend="reference"):
    """The one-line statement with the very mask that ``seeded`` draws."""
    torch.manual_seed(8)
    keep = drawn_mask(inputs[0].detach(), dropout_p, backend) if dropout_p else None
    return functools.partial(oracle.lora_linear, scale=0.7, keep=keep, dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_gradgradcheck_every_subset(subset, dropout_p):
    assert torch.autograd.gradgradcheck(seeded(dropout_p), tensors(*subset))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_what_a_gradient_does_not_depend_on_is_none(subset, dropout_p):
    """As in plain torch: missing where there is no dependence, and nowhere else."""
    for name in subset:
        inputs = tensors(*subset)
        results = []
        for function in (seeded(dropout_p), plain(inputs, dropout_p)):
            (grad,) = torch.autograd.grad(
                function(*inputs).square().sum(), inputs[NAMES.index(name)], create_graph=True
            )
            wanted = [t for t in inputs if t.requires_grad]
            results.append(torch.autograd.grad(grad.square().sum(), wanted, allow_unused=True))
        for ours, expected in zip(*results, strict=True):
            assert (ours is None) == (expected is None)
            if ours is not None:
                torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "subset",
    [NAMES, ("x", "lora_a", "lora_b"), ("x", "lora_b"), ("lora_a", "lora_b")],
    ids="+".join,
)
def test_a_penalty_on_the_gradient_on_every_path(subset, dropout_p, device, backend):
    """As a WGAN has it: the mask is the forward's own, in the gradient and in its gradient."""
    made = make(Case(12, 8, 16, 4), torch.float32, device)
    inputs = [t.requires_grad_(n in subset) for n, t in zip(NAMES, made[:5], strict=True)]
    wanted = [t for t in inputs if t.requires_grad]
    results = []
    with use_backend(backend):
        for function in (seeded(dropout_p), plain(inputs, dropout_p, backend)):
            grads = torch.autograd.grad(function(*inputs).square().sum(), wanted, create_graph=True)
            penalty = sum(g.square().sum() for g in grads)
            results.append((*grads, *torch.autograd.grad(penalty, wanted)))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_and_wide_factors(dtype):
    made = [t.detach() for t in tensors()]
    inputs = [t.to(dtype if i in (0, 1, 4) else torch.float32) for i, t in enumerate(made)]
    inputs = [t.requires_grad_(i != 1) for i, t in enumerate(inputs)]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    results = []
    for function, given in ((seeded(0.0), inputs), (plain(wide, 0.0), wide)):
        wanted = [t for t in given if t.requires_grad]
        grads = torch.autograd.grad(function(*given).square().sum(), wanted, create_graph=True)
        results.append((grads, torch.autograd.grad(sum(g.sum() for g in grads), wanted)))
    ours, expected = ([*first, *second] for first, second in results)
    dtypes = [t.dtype for t in inputs if t.requires_grad]
    for one, other, own in zip(ours, expected, 2 * dtypes, strict=True):
        assert one.dtype == own
        assert (one.double() - other).norm() < 8 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_functional_hessian(frozen, vectorize):
    layer = LoRALinear(3, 2, rank=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora.B.weight)
    layer.requires_grad_(not frozen)
    whole = layer.weight + layer.delta_weight()
    hessian = torch.autograd.functional.hessian(
        lambda x: layer(x).square().sum(), torch.randn(3).double(), vectorize=vectorize
    )
    torch.testing.assert_close(hessian, (2 * whole.t() @ whole).detach())


def test_several_gradients_in_a_batch():
    inputs = tensors("x", "lora_a", "lora_b")
    y, wanted = seeded(0.4)(*inputs), [inputs[0], inputs[2], inputs[3]]
    dy = torch.randn(6, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, wanted, dy, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, wanted, one, retain_graph=True) for one in dy]
    for together, apart in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(apart))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("subset", [NAMES, *((name,) for name in NAMES)], ids="+".join)
def test_forward_mode(subset, dropout_p):
    inputs = tensors()
    moving = [NAMES.index(name) for name in subset]
    tangents = {i: torch.randn_like(inputs[i]) for i in moving}

    def tangent_of(function):
        with torch.autograd.forward_ad.dual_level():
            dual = [
                torch.autograd.forward_ad.make_dual(t, tangents[i]) if i in tangents else t
                for i, t in enumerate(inputs)
            ]
            return torch.autograd.forward_ad.unpack_dual(function(*dual))

    ours, expected = tangent_of(seeded(dropout_p)), tangent_of(plain(inputs, dropout_p))
    torch.testing.assert_close(ours.primal, expected.primal)
    torch.testing.assert_close(ours.tangent, expected.tangent)


TRANSFORMS = {
    "jacrev": torch.func.jacrev,
    "jacfwd": lambda f, argnums: torch.func.jacfwd(f, argnums, randomness="same"),
    "hessian": lambda f, argnums: torch.func.jacfwd(
        torch.func.jacrev(lambda *a: f(*a).square().sum(), argnums), argnums, randomness="same"
    ),
    "grad of grad": lambda f, argnums: torch.func.jacrev(
        torch.func.grad(lambda *a: f(*a).square().sum(), argnums), argnums
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("argnums", [0, 2, 3])
def test_the_transforms_of_torch_func(argnums, transform):
    inputs = tensors()
    ours = TRANSFORMS[transform](seeded(0.4), argnums)(*inputs)
    expected = TRANSFORMS[transform](plain(inputs, 0.4), argnums)(*inputs)
    torch.testing.assert_close(ours, expected)


def test_vmap_over_a_batch_of_adapters():
    """An ensemble, and gradients of each sample by itself."""
    x, weight, _, _, bias = tensors()
    lora_a, lora_b = torch.randn(6, 2, 5).double(), torch.randn(6, 3, 2).double()
    each = torch.vmap(lora_linear, (None, None, 0, 0, None))(x, weight, lora_a, lora_b, bias)
    for i in range(6):
        torch.testing.assert_close(each[i], lora_linear(x, weight, lora_a[i], lora_b[i], bias))


@pytest.mark.interpreted
def test_a_backend_asked_for_by_name_is_not_left_in_silence():
    inputs = tensors(dtype=torch.float32)
    with use_backend("triton"):
        got = torch.func.grad(lambda x: lora_linear(x, *inputs[1:]).sum())(inputs[0])
        torch.testing.assert_close(got, (inputs[1] + inputs[3] @ inputs[2]).sum(0).expand(4, 5))
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(lambda x: lora_linear(x, *inputs[1:]), (inputs[0],), (inputs[0],))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_can_be_trained(strict):
    layer = LoRALinear(5, 3, rank=2, alpha=4)
    torch.nn.init.normal_(layer.lora.B.weight)
    x = torch.randn(4, 5)
    program = torch.export.export(layer, (x,), strict=strict)
    # Nothing of this library is left in it: it loads where that is not installed.
    assert not [n for n in program.graph.nodes if "lora_kernels" in str(n.target)]
    exported = program.module()
    y = exported(x)
    torch.testing.assert_close(y, layer(x))
    y.square().sum().backward()
    layer(x).square().sum().backward()
    grads = {name: p.grad for name, p in exported.named_parameters()}
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_several_dy_in_a_batch(device, backend):
    made = make(Case(12, 8, 16, 4), torch.float32, device)
    inputs = [t.requires_grad_() for t in made[:5]]
    dys = torch.randn(3, 12, 8, device=device)
    with use_backend(backend):
        y = lora_linear(*inputs)
        together = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
        apart = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
    for ours, each in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(each), rtol=1e-4, atol=1e-5)
