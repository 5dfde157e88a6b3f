"""Exponential moving average of a model's weights: the copy to evaluate while the model itself keeps training.

    ema = EMA(model, decay=0.999)
    for batch in batches:
        ...                      # forward, backward, optimizer.step()
        ema.update(model)        # once per optimizer step, and only after a step that was applied
    evaluate(ema.module)         # a model like any other, in eval mode and without gradients
"""

import copy

import torch
import torch.nn as nn


def ema_decay(update, decay, warmup=True):
    """Decay in force during an update; `update` counts the updates made before it, so the first is 0.

        min(decay, (1 + update) / (10 + update)), or `decay` throughout with warmup=False

    Without the ramp the random initial weights still make up decay^n of the average after n updates: 90 % after 100
    updates at 0.999. With it they make up 0.001 % after 10.

    Source: TensorFlow, tf.train.ExponentialMovingAverage(num_updates=...)
    Check:  0.1 at update 0, 0.5 at update 8
    """
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


class EMA:
    """Shadow copy of a model, moved towards it at every update:  shadow = d * shadow + (1 - d) * model,  d = ema_decay(n).

        decay     horizon 1 / (1 - d)     half-life ln 2 / -ln d     warm-up reaches it at update
        0.9               10 steps                 6.6 steps                   80
        0.99             100                      69                          890
        0.999          1,000                     693                        8,990
        0.9999        10,000                   6,931                       89,990

    Choose a horizon well below the length of the run; a longer one only lags behind the model.

    Averaged: parameters and floating-point buffers (batch-norm statistics). Copied: integer and bool buffers.
    Tied weights are one tensor, averaged once. bfloat16 and float16 weights have a float32 shadow, since in half precision
    a step of (1 - d) rounds away; give that shadow float32 inputs.
    The model may arrive wrapped (DistributedDataParallel, DataParallel, torch.compile, in any nesting) or not, here and in
    update: the shadow is the plain model, and names are compared without `module.` and `_orig_mod.`.

    Errors: ValueError for a decay outside [0, 1); for a name or a shape that model and shadow do not share
    Needs:  ema_decay, _unwrap, _named_tensors, import copy
    Check:  after the first update the shadow is 0.1 * initial + 0.9 * model
    """

    def __init__(self, model, decay=0.999, *, warmup=True):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}: a decay of 1 never leaves the initial weights")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.module = copy.deepcopy(_unwrap(model)).eval().requires_grad_(False)
        for tensor in _named_tensors(self.module).values():
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()

    @torch.no_grad()
    def update(self, model, check_finite=False):
        """Move the shadow towards `model`. An update that raises leaves the shadow as it was.

        check_finite=True raises ValueError with the name of the first tensor that holds NaN or inf. It reads every weight:
        for loops that do not already skip non-finite steps.
        """
        shadow, source = _named_tensors(self.module), _named_tensors(model)
        if shadow.keys() != source.keys():
            raise ValueError(f"the model is not the one averaged: missing {sorted(shadow.keys() - source.keys())}, "
                             f"unexpected {sorted(source.keys() - shadow.keys())}")
        for name, tensor in source.items():
            if tensor.shape != shadow[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its average {tuple(shadow[name].shape)}")
            if check_finite and not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or inf; the average was not updated")

        averaged = [name for name, tensor in shadow.items() if tensor.is_floating_point() or tensor.is_complex()]
        if averaged:
            torch._foreach_lerp_([shadow[name] for name in averaged],
                                 [source[name].to(shadow[name]) for name in averaged],  # its dtype and device
                                 1 - ema_decay(self.updates, self.decay, self.warmup))
        for name in shadow.keys() - averaged:
            shadow[name].copy_(source[name])
        self.updates += 1

    def state_dict(self):
        """Tensors and plain numbers, all that an exact resume needs. The tensors are the shadow's own, as in nn.Module."""
        return {"module": self.module.state_dict(), "updates": self.updates, "decay": self.decay, "warmup": self.warmup}

    def load_state_dict(self, state):
        """Continue from `state`, its decay and warm-up included. A missing or an unexpected name is an error."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"an EMA state has the keys {list(self.state_dict())}, got {list(state)}")
        self.module.load_state_dict(state["module"])
        self.updates, self.decay, self.warmup = state["updates"], state["decay"], state["warmup"]


def _unwrap(model):
    """The plain model inside any nesting of DistributedDataParallel, DataParallel and torch.compile."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrap(model.module)
    return _unwrap(model._orig_mod) if hasattr(model, "_orig_mod") else model


def _named_tensors(model):
    """Parameters and buffers by name, tied ones once, without the prefixes that wrappers add."""
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in named}
    while tensors and all(name.startswith("module.") for name in tensors):  # a wrapper's prefix is on every name
        tensors = {name[len("module."):]: tensor for name, tensor in tensors.items()}
    return tensors
