"""Counts the bytes of live tensors at each operation: on a CPU the peak that CUDA would report."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """with LiveBytes(tensors) as live: ... -> live.peak and live.now, bytes beyond those of `tensors`.

    Tensors that were there before are counted when an operation first meets them, unless they are named.
    """

    def __init__(self, known=()):
        super().__init__()
        self.sizes = {}  # by the address of a storage: tensors that share one count once
        self.now = self.peak = 0
        for tensor in known:
            self.count(tensor)
        self.now = self.peak = 0

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return out
