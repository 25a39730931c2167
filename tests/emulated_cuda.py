"""A CUDA device for tests on machines without one: tensors compute on the CPU, and say that they are on `cuda:0`.

What a GPU would refuse is refused: tensors of two devices in one operation, numpy on a tensor of the device. Autocast
is that of CUDA: float16, and float32 where CUDA's list has it; the gradient scaler is real. What it cannot show is
speed, memory and what CUDA's own kernels do.

    with emulated_cuda():
        torch.zeros(2, device="cuda") + torch.zeros(2)  # RuntimeError
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
MOVES = {aten.copy_.default, aten._to_copy.default}
# Of CUDA's autocast, and not of the CPU's: https://docs.pytorch.org/docs/stable/amp.html
FLOAT32 = (
    "softmax.int log_softmax.int sum sum.dim_IntList cumsum exp expm1 log log10 log1p log2 reciprocal rsqrt "
    "pow.Tensor_Scalar pow.Tensor_Tensor cosine_similarity group_norm layer_norm linalg_vector_norm"
).split()


class CudaTensor(Tensor):
    """Looks like a tensor on `cuda:0`; its values are those of `elem`, on the CPU."""

    @staticmethod
    def __new__(cls, elem: Tensor, requires_grad: bool = False):
        """Wraps a CPU tensor."""
        layout = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "dtype": elem.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, elem.size(), device="cpu", requires_grad=requires_grad, **layout)
        tensor.elem = elem
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = property(lambda self: DEVICE), property(lambda self: True), property(lambda self: False)

    def __repr__(self) -> str:
        return f"CudaTensor({self.elem})"

    def __reduce_ex__(self, protocol):
        return self.detach().elem.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Computes on the CPU, after a look at the devices."""
        kwargs = kwargs or {}
        refuse_mixed(func, args, kwargs)
        out = compute(func, tree_map(unwrapped, args), tree_map(unwrapped, kwargs))
        return return_and_correct_aliasing(func, args, kwargs, tree_map(wrapped, out))


def wrapped(value):
    """Returns a tensor on the device; anything else as it is."""
    return CudaTensor(value) if isinstance(value, Tensor) and not isinstance(value, CudaTensor) else value


def unwrapped(value):
    """Returns the values of a tensor of the device; anything else as it is."""
    return value.elem if isinstance(value, CudaTensor) else value


def refuse_mixed(func, args: tuple, kwargs: dict) -> None:
    """Raises RuntimeError for tensors on two devices; as on CUDA, scalars and indices may be on the CPU."""
    if func in MOVES:
        return
    is_indexing = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
    if is_indexing and isinstance(args[0], CudaTensor):
        args = (args[0], *args[2:])
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    strangers = [x for x in tensors if not isinstance(x, CudaTensor) and x.ndim > 0]
    if torch._C._current_graph_task_id() >= 0:  # autograd puts zeros on the CPU where no gradient came to
        strangers = [x for x in strangers if x.any()]
    if strangers:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found {DEVICE} and cpu: shapes "
            f"{[tuple(x.shape) for x in tensors]}, on the CPU {[tuple(x.shape) for x in strangers]}"
        )


def compute(func, args: tuple, kwargs: dict):
    """Computes on the CPU; what has no float16 kernel there, and convolutions, which are slow, in float32, rounded."""
    is_half = any(isinstance(x, Tensor) and x.dtype == torch.float16 for x in tree_flatten((args, kwargs))[0])
    if not (is_half and "convolution" in func.name()):
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not (is_half and "not implemented for 'Half'" in str(error)):
                raise
    args, kwargs = (tree_map(lambda x: converted(x, torch.float16, torch.float32), x) for x in (args, kwargs))
    return tree_map(lambda x: converted(x, torch.float32, torch.float16), func(*args, **kwargs))


def converted(value, of: torch.dtype, to: torch.dtype):
    """Converts a tensor of one type to another; anything else stays as it is."""
    return value.to(to) if isinstance(value, Tensor) and value.dtype == of else value


class Transfer(torch.autograd.Function):
    """Moves a tensor, and its gradient back."""

    @staticmethod
    def forward(ctx, tensor: Tensor, to_device: bool) -> Tensor:
        """Copies, as a transfer does."""
        ctx.from_device = isinstance(tensor, CudaTensor)
        values = unwrapped(tensor).clone()
        return CudaTensor(values) if to_device else values

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """Copies back."""
        values = unwrapped(gradient).clone()
        return CudaTensor(values) if ctx.from_device else values, None


def moved(tensor: Tensor, to_device: bool) -> Tensor:
    """Returns the tensor on the device, or on the CPU."""
    return tensor if isinstance(tensor, CudaTensor) == to_device else Transfer.apply(tensor, to_device)


def is_cuda(device) -> bool:
    """Says whether what an argument names is the device."""
    return torch.device(device).type == "cuda"


class Devices(TorchFunctionMode):
    """Carries out what asks for the device: transfers, and new tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replaces the device by the CPU, and the result by a tensor of the device."""
        kwargs = dict(kwargs or {})
        if func in (Tensor.cuda, Tensor.cpu):
            return moved(args[0], func is Tensor.cuda)
        if func is Tensor.to:
            return self.transfer(*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], CudaTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if func is one_hot and isinstance(args[0], CudaTensor):  # it makes a range where it takes the tensor to be
            return wrapped(func(unwrapped(args[0]), *args[1:], **kwargs))
        if func is Tensor.tolist:
            return unwrapped(args[0]).tolist()
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "meta":
            to_device = is_cuda(kwargs["device"])
            out = func(*args, **{**kwargs, "device": "cpu"})
            needs_gradient = out.requires_grad and out.is_leaf
            out = moved(out.detach() if needs_gradient else out, to_device)
            return out.requires_grad_() if needs_gradient else out
        return func(*args, **kwargs)

    @staticmethod
    def transfer(tensor: Tensor, *args, device=None, dtype=None, other=None, copy=False, **kwargs) -> Tensor:
        """Does `Tensor.to`, in all its forms; `non_blocking` means nothing here."""
        for value in args:
            other = value if isinstance(value, Tensor) else other
            device = value if isinstance(value, (str, torch.device)) else device
            dtype = value if isinstance(value, torch.dtype) else dtype
        if other is not None:
            device, dtype = other.device, other.dtype
        if device is not None:
            tensor = moved(tensor, is_cuda(device))
        return tensor.to(
            dtype or tensor.dtype, copy=copy, memory_format=kwargs.get("memory_format", torch.preserve_format)
        )


def in_float32(name: str) -> Callable:
    """Returns an operation of CUDA's autocast that computes in float32."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")

    def kernel(*args, **kwargs):
        with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastCPU)):
            return operation(*(tree_map(lambda x: converted(x, torch.float16, torch.float32), args)), **kwargs)

    return kernel


def cuda_autocast() -> Callable:
    """Returns an `autocast.__init__` that gives the CPU's autocast CUDA's type."""
    original = torch.autocast.__init__

    def init(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        original(self, device_type, dtype, enabled, cache_enabled)

    return init


def load_onto_device(load: Callable) -> Callable:
    """Returns a `torch.load` that knows the device."""

    def loaded(file, map_location=None, **kwargs):
        if isinstance(map_location, (str, torch.device)) and is_cuda(map_location):
            return tree_map(wrapped, load(file, map_location="cpu", **kwargs))
        return load(file, map_location=map_location, **kwargs)

    return loaded


@contextmanager
def emulated_cuda() -> Iterator[torch.device]:
    """Has the device within the context; yields it."""
    library = torch.library.Library("aten", "IMPL")
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # as tensors of two classes are
    for name in FLOAT32:
        library.impl(name, in_float32(name), "AutocastCPU")
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
            stack.enter_context(patch.object(torch.autocast, "__init__", cuda_autocast()))
            stack.enter_context(patch.object(torch.cuda, "get_device_name", lambda device=None: "emulated"))
            stack.enter_context(patch.object(torch, "load", load_onto_device(torch.load)))
            stack.enter_context(Devices())
            yield DEVICE
    finally:
        library._destroy()
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
