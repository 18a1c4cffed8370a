"""What libraries and users do to a model between two steps: each operation does the same to both sides.

An operation takes a side and a source of random numbers, and may return values to be compared. Those of ``BREAKING``
may raise :class:`normfuse.TuneModeError` at the next call; its advice, to call ``tune_mode`` again, is then followed.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import normfuse
from tests.loops.sides import Side

Draw = random.Random
Operation = Callable[[Side, Draw], "Tensor | None"]


def _noise(tensor: Tensor, draw: Draw, size: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(10**6))
    return size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def _plain_weight(layer: nn.Module) -> bool:
    return isinstance(layer._parameters.get("weight"), nn.Parameter)


# writes


def write_data(side: Side, draw: Draw) -> None:
    """One filter, behind autograd's back."""
    weight = draw.choice(side.products()).weight
    weight.data[draw.randrange(weight.shape[0])] *= draw.choice((0.0, -1.0, 1.5))


def write_without_grad(side: Side, draw: Draw) -> None:
    with torch.no_grad():
        for parameter in side.model.parameters():
            parameter.add_(_noise(parameter, draw, 0.01))


def write_gain(side: Side, draw: Draw) -> None:
    norm = draw.choice(side.norms())
    value = draw.choice((0.0, -0.7, 1e-12))
    if norm.weight is not None:
        norm.weight.data[draw.randrange(norm.num_features)] = value


def write_statistics(side: Side, draw: Draw) -> None:
    norm = draw.choice(side.norms())
    change = _noise(norm.running_mean, draw)
    if draw.random() < 0.5:
        norm.running_mean.add_(change)
        norm.running_var.data.mul_(1.2)
    else:
        norm.running_mean = norm.running_mean + change


def replace_parameter(side: Side, draw: Draw) -> None:
    layer = draw.choice([p for p in side.products() if _plain_weight(p)] or [nn.Linear(1, 1)])
    layer.weight = nn.Parameter(layer.weight.detach() * 0.9, layer.weight.requires_grad)
    side.renew()


def replace_data(side: Side, draw: Draw) -> None:
    weight = draw.choice(side.products()).weight
    weight.data = weight.data.flip(0)


def vector_of_parameters(side: Side, draw: Draw) -> None:
    parameters = [p for p in side.model.parameters() if p.is_contiguous()]  # others it does not take
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).detach() * 0.99, parameters)


def change_eps(side: Side, draw: Draw) -> None:
    draw.choice(side.norms()).eps = draw.choice((1e-4, 1e-2))


# files and copies


def state_dict(side: Side, draw: Draw) -> None:
    file = io.BytesIO()
    torch.save(side.model.state_dict(), file)
    write_without_grad(side, draw)
    file.seek(0)
    side.model.load_state_dict(torch.load(file))


def assign(side: Side, draw: Draw) -> None:
    state = {k: t.clone() * 0.95 if t.is_floating_point() else t.clone() for k, t in side.model.state_dict().items()}
    side.model.load_state_dict(state, assign=True)
    side.renew()


def deepcopy(side: Side, draw: Draw) -> None:
    side.replace(copy.deepcopy(side.model))


def _can_be_pickled(side: Side) -> bool:
    """Whether nothing is on the model that torch does not pickle."""
    modules = list(side.model.modules())
    left = any(m._load_state_dict_pre_hooks for m in modules)  # weight_norm leaves a function of its own behind
    held = any(parametrize.is_parametrized(m) or "forward" in vars(m) for m in modules)
    return not (side.handles or left or held)


def pickled(side: Side, draw: Draw) -> None:
    if _can_be_pickled(side):
        side.replace(pickle.loads(pickle.dumps(side.model)))


def saved(side: Side, draw: Draw) -> None:
    if _can_be_pickled(side):
        file = io.BytesIO()
        torch.save(side.model, file)
        file.seek(0)
        side.replace(torch.load(file, weights_only=False))


# formats


def there_and_back(side: Side, draw: Draw) -> None:
    side.model.to(draw.choice((torch.float32, torch.bfloat16, torch.float16))).double()


def channels_last(side: Side, draw: Draw) -> None:
    if all(p.dim() <= 4 for p in side.model.parameters()):
        side.model.to(memory_format=draw.choice((torch.channels_last, torch.contiguous_format)))  # type: ignore[call-overload]


def shared_memory(side: Side, draw: Draw) -> None:
    side.model.share_memory()


# what is trained, and modes


def toggle(side: Side, draw: Draw) -> None:
    for parameter in side.model.parameters():
        parameter.requires_grad_(draw.random() < 0.6)


def groups(side: Side, draw: Draw) -> None:
    normfuse.parameter_groups(side.model, draw.choice(("all", "norm", "bias", "head", "*.weight")))


def thaw(side: Side, draw: Draw) -> None:
    side.model.requires_grad_(True)


def switch_mode(side: Side, draw: Draw) -> None:
    side.train(draw.random() < 0.6)


def out_and_in(side: Side, draw: Draw) -> None:
    if side.tuned:
        normfuse.tune_mode(side.model, False)
        normfuse.tune_mode(side.model)


def again(side: Side, draw: Draw) -> None:
    if side.tuned:
        normfuse.tune_mode(side.model)


def nested(side: Side, draw: Draw) -> None:
    if side.tuned:
        with normfuse.tuned(side.model):
            pass


# hooks


def forward_hook(side: Side, draw: Draw) -> None:
    layer = draw.choice([*side.products(), *side.norms()])
    side.handles.append(layer.register_forward_hook(lambda m, args, y: side.seen.append(y.detach().clone())))


def forward_pre_hook(side: Side, draw: Draw) -> None:
    layer = draw.choice([*side.products(), *side.norms()])
    side.handles.append(layer.register_forward_pre_hook(lambda m, args: (args[0] * 0.9,)))


def backward_hook(side: Side, draw: Draw) -> None:
    layer = draw.choice([*side.products(), *side.norms()])
    if not any(getattr(m, "inplace", False) for m in side.model.modules()):  # which such a hook's view does not allow
        side.handles.append(layer.register_full_backward_hook(lambda m, given, grads: None))


def gradient_hook(side: Side, draw: Draw) -> None:
    for layer in side.products():
        if layer.weight.requires_grad:
            side.handles.append(layer.weight.register_hook(lambda grad: 0.5 * grad))
            return


def remove_hooks(side: Side, draw: Draw) -> None:
    while side.handles:
        side.handles.pop().remove()


def patch_forward(side: Side, draw: Draw) -> None:
    """As wrappers of instances leave it."""
    layer = draw.choice([*side.products(), *side.norms()])
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs)


# what is put on weights


def weight_norm(side: Side, draw: Draw) -> None:
    layer = draw.choice(side.products())
    if _plain_weight(layer) and bool((layer.weight.flatten(1).norm(dim=1) > 0).all()):
        parametrizations.weight_norm(layer)
        side.renew()


def spectral_norm(side: Side, draw: Draw) -> None:
    layer = draw.choice(side.products())
    if _plain_weight(layer):
        torch.manual_seed(draw.randrange(1000))
        parametrizations.spectral_norm(layer)
        side.renew()


def remove_parametrizations(side: Side, draw: Draw) -> None:
    for layer in side.products():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
            side.renew()


def pruned(side: Side, draw: Draw) -> None:
    layer = draw.choice(side.products())
    if _plain_weight(layer):
        prune.ln_structured(layer, "weight", 0.3, n=2, dim=0)
        if draw.random() < 0.5:
            prune.remove(layer, "weight")
        side.renew()


# other models made of this one


def averaged(side: Side, draw: Draw) -> Tensor | None:
    if any(prune.is_pruned(m) or parametrize.is_parametrized(m) for m in side.model.modules()):
        return None  # deepcopy, and so the average, does not take a weight that is computed
    average = AveragedModel(side.model, use_buffers=draw.random() < 0.5)
    write_without_grad(side, draw)
    average.update_parameters(side.model)
    average.eval()
    return _as_it_is(average, side, draw)


def folded(side: Side, draw: Draw) -> Tensor | None:
    """Both sides fold to the function that they are in eval mode."""
    if side.handles or side.seen:
        return None
    training = side.model.training
    found = _as_it_is(normfuse.fold(side.model, example_inputs=side.inputs(0)), side, draw)
    assert side.model.training == training
    return found


def beginning(side: Side, draw: Draw) -> Tensor:
    """The first block by itself, as features are taken."""
    first = side.model[:3] if isinstance(side.model[0], nn.Linear) else side.model[:1]  # type: ignore[index]
    return _as_it_is(first, side, draw)


def copy_of_the_beginning(side: Side, draw: Draw) -> Tensor | None:
    if any(prune.is_pruned(m) or parametrize.is_parametrized(m) for m in side.model.modules()):
        return None
    first = side.model[:3] if isinstance(side.model[0], nn.Linear) else side.model[:1]  # type: ignore[index]
    return _as_it_is(copy.deepcopy(first), side, draw)


def clone_by_dict(side: Side, draw: Draw) -> Tensor:
    """As libraries for meta-learning copy a model whose parameters stay in the graph."""
    return _as_it_is(_cloned(side.model), side, draw)


def _cloned(module: nn.Module) -> nn.Module:
    made = module.__new__(type(module))
    made.__dict__ = module.__dict__.copy()
    for kept in ("_parameters", "_buffers"):
        values = getattr(module, kept).items()
        made.__dict__[kept] = {name: None if t is None else t.clone() for name, t in values}
    made._modules = {name: child if child is None else _cloned(child) for name, child in module._modules.items()}
    return made


def symbolically_traced(side: Side, draw: Draw) -> Tensor:
    return _as_it_is(torch.fx.symbolic_trace(side.model), side, draw)


def watched(side: Side, draw: Draw) -> Tensor:
    """By a hook on every module of the process."""
    seen: list[Tensor] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(y.detach().flatten()))
    try:
        _as_it_is(side.model, side, draw)
    finally:
        handle.remove()
    return torch.cat(seen)


def forward_mode(side: Side, draw: Draw) -> Tensor | None:
    if side.handles:  # a backward hook does not go with function transforms
        return None
    x = side.inputs(draw.randrange(1000))
    torch.manual_seed(0)
    return torch.func.jvp(lambda x: side.model(x + 0), (x,), (x.flip(0),))[1].detach()


def per_example(side: Side, draw: Draw) -> Tensor | None:
    """Gradients of each example, by vmap."""
    if any(isinstance(m, nn.Dropout) or getattr(m, "inplace", False) for m in side.model.modules()) or side.handles:
        return None
    if any(parametrize.is_parametrized(m) for m in side.model.modules()):  # which write to buffers
        return None
    named = {name: p.detach() for name, p in side.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(side.model, parameters, (x.unsqueeze(0),)).square().mean()

    grads = vmap(grad(loss), (None, 0))(named, side.inputs(draw.randrange(1000)))
    return torch.cat([g.flatten() for g in grads.values()]).detach()


def _as_it_is(model: nn.Module, side: Side, draw: Draw) -> Tensor:
    x = side.inputs(draw.randrange(1000))
    torch.manual_seed(0)
    return model(x + 0).detach()


def fused(side: Side, draw: Draw) -> Tensor | None:
    """A library fuses a convolution with the norm behind it, in copies."""
    copied = copy.deepcopy(side.model).eval()
    for module in copied.modules():
        if isinstance(module, nn.Sequential) and len(module) > 1:
            layer, norm = module[0], module[1]
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and _plain_weight(layer):
                made = nn.utils.fuse_conv_bn_eval(layer, norm)
                return made(_noise(torch.empty(1, layer.in_channels, 6, 6, dtype=torch.float64), draw, 1.0)).detach()
    return None


def fused_in_place(side: Side, draw: Draw) -> None:
    """The same in the model itself, whose norm becomes an identity."""
    if side.handles:
        return
    for module in side.model.modules():
        if isinstance(module, nn.Sequential) and len(module) > 1 and draw.random() < 0.5:
            layer, norm = module[0], module[1]
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and _plain_weight(layer):
                training = layer.training
                layer.eval()
                norm.eval()
                module[0], module[1] = nn.utils.fuse_conv_bn_eval(layer, norm), nn.Identity()
                module[0].train(training)
                side.renew()
                return


def replace_norm(side: Side, draw: Draw) -> None:
    """A frozen norm of its own class takes the place of one."""
    for name, module in list(side.model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._NormBase) and name and draw.random() < 0.5:
            parent = side.model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _made_like(module))
            side.renew()
            return


def synchronized(side: Side, draw: Draw) -> None:
    """As for distributed training."""
    side.model = nn.SyncBatchNorm.convert_sync_batchnorm(side.model)
    side.settle()
    side.renew()


def _made_like(norm: nn.Module) -> nn.Module:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    kind = next(kind for kind in kinds if isinstance(norm, kind))
    made = kind(norm.num_features, norm.eps, affine=norm.affine).double().eval()  # type: ignore[arg-type]
    made.load_state_dict(norm.state_dict())
    return made


BREAKING = (fused_in_place, replace_norm, patch_forward, synchronized)
OPERATIONS: tuple[Operation, ...] = (
    write_data,
    write_without_grad,
    write_gain,
    write_statistics,
    replace_parameter,
    replace_data,
    vector_of_parameters,
    change_eps,
    state_dict,
    assign,
    deepcopy,
    pickled,
    saved,
    there_and_back,
    channels_last,
    shared_memory,
    toggle,
    groups,
    thaw,
    switch_mode,
    out_and_in,
    again,
    nested,
    forward_hook,
    forward_pre_hook,
    backward_hook,
    gradient_hook,
    remove_hooks,
    weight_norm,
    spectral_norm,
    remove_parametrizations,
    pruned,
    averaged,
    folded,
    fused,
    beginning,
    copy_of_the_beginning,
    clone_by_dict,
    symbolically_traced,
    watched,
    forward_mode,
    per_example,
    *BREAKING,
)
