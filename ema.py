"""Exponential moving average (EMA) of a model's weights: the copy to evaluate during training.

    ema = EMA(model, decay=0.999)
    for batch in batches:
        ...                      # forward, backward, optimizer.step()
        ema.update(model)        # once per optimizer step, and only after a step that was applied
    evaluate(ema.module)         # a model like any other, in eval mode and without gradients

GradScaler skipped a step if scaler.update() lowered scaler.get_scale().
"""

import copy
import warnings

import torch
import torch.nn as nn


def ema_decay(update, decay, warmup=True):
    """Decay of one update. `update` counts the updates before it, so the first is 0.

        warmup=True:     min(decay, (1 + update) / (10 + update))
        warmup=False:    decay

    Without warm-up the random initial weights have the share decay^n of the average after n
    updates: 90 % after 100 updates at 0.999. With warm-up they have 0.001 % after 10 updates.

    Source: TensorFlow, tf.train.ExponentialMovingAverage(num_updates=...)
    Check:  0.1 at update 0, 0.5 at update 8
    """
    if not warmup:
        return decay
    return min(decay, (1 + update) / (10 + update))


class EMA:
    """Shadow copy of a model that moves towards the model at every update.

        shadow = d * shadow + (1 - d) * model        d = ema_decay(n)

        decay     horizon 1 / (1 - d)     half-life ln 2 / -ln d     warm-up reaches it at update
        0.9               10 steps                 6.6 steps                   80
        0.99             100                      69                          890
        0.999          1,000                     693                        8,990
        0.9999        10,000                   6,931                       89,990

    Choose a horizon well below the length of the run; a longer one only lags behind the model.

    Averaged: parameters and, unless average_buffers=False, floating-point buffers (batch-norm
              statistics).
    Copied:   all other buffers.
    Tied weights are one tensor, averaged once. bfloat16 and float16 weights have a float32 shadow,
    because a step of (1 - d) rounds away in half precision; give that shadow float32 inputs. The
    shadow is in eval mode again after every update.

    A checkpoint that holds the averaged weights alone has no count of updates, and the warm-up
    would start again: EMA(model, updates=n), with the n of before, goes on where it was.

    The model may be plain or wrapped, here and in update: DistributedDataParallel, DataParallel,
    torch.compile, in any nesting. The shadow is the plain model. Every update pairs the tensors by
    name, without `module.` and `_orig_mod.`.

    Errors: ValueError for a decay outside [0, 1), updates that are no whole number, a name or a
            shape that only the model or only the shadow has
    Needs:  ema_decay, _unwrap, _named_tensors, copy, warnings, nn, torch
    Check:  after the first update the shadow is 0.1 * initial + 0.9 * model
    """

    def __init__(self, model, decay=0.999, *, warmup=True, average_buffers=True, updates=0):
        if not 0 <= decay < 1 or updates < 0 or updates % 1:
            raise ValueError(f"decay must be in [0, 1), got {decay} (1 never leaves the initial "
                             f"weights), and updates a whole number, got {updates}")
        self.decay, self.warmup, self.updates = decay, warmup, updates
        self.average_buffers = average_buffers
        self.module = copy.deepcopy(_unwrap(model)).eval().requires_grad_(False)
        for tensor in _named_tensors(self.module).values():
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()
        self.built = self._writes()

    def __call__(self, *args, **kwargs):
        """Outputs of the averaged model."""
        return self.module.eval()(*args, **kwargs)

    @torch.no_grad()
    def update(self, model, *, check_finite=False):
        """Move the shadow towards `model`. An update that raises leaves the shadow as it was.

        check_finite=True raises ValueError with the name of the first tensor that holds NaN or inf.
        It reads every weight: for loops that do not already skip non-finite steps.
        """
        shadows, tensors = _named_tensors(self.module), _named_tensors(model)
        self._check(shadows, tensors, check_finite)
        decay = ema_decay(self.updates, self.decay, self.warmup)
        for name, shadow in shadows.items():
            tensor = tensors[name].to(shadow)
            if self._is_averaged(shadow):
                shadow.lerp_(tensor, 1 - decay)
            else:
                shadow.copy_(tensor)
        self.updates += 1
        if self.module.training:  # a loop that sets the mode of all its models
            self.module.eval()

    def _is_averaged(self, shadow):
        real = shadow.is_floating_point() or shadow.is_complex()
        return real and (self.average_buffers or isinstance(shadow, nn.Parameter))

    def _writes(self):
        """Number of times that the weights of the shadow were written to."""
        return sum(parameter._version for parameter in self.module.parameters())

    def _check(self, shadows, tensors, check_finite):
        if shadows.keys() != tensors.keys():
            raise ValueError("the model is not the one averaged: missing "
                             f"{sorted(shadows.keys() - tensors.keys())}, unexpected "
                             f"{sorted(tensors.keys() - shadows.keys())}")
        for name, shadow in shadows.items():
            tensor = tensors[name]
            if tensor.shape != shadow.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its average "
                                 f"{tuple(shadow.shape)}")
            if check_finite and not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or inf; the average was not updated")
        if self.updates == 0 and self.warmup and self._writes() != self.built:
            warnings.warn("the average was loaded, but its count of updates is 0: the warm-up "
                          "begins again, and this update keeps only 10 % of the average; build it "
                          "with EMA(model, updates=n), n as before")

    def state_dict(self):
        """State of an exact resume: plain numbers, and the shadow's own tensors as in nn.Module."""
        return {"module": self.module.state_dict(), "updates": self.updates, "decay": self.decay,
                "warmup": self.warmup}

    def load_state_dict(self, state):
        """Continue from `state`, its decay and warm-up too. A missing or extra name is an error."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"an EMA state has the keys {list(self.state_dict())}, got "
                             f"{list(state)}")
        self.module.load_state_dict(state["module"])
        self.updates, self.decay, self.warmup = state["updates"], state["decay"], state["warmup"]
        self.built = self._writes()


def _unwrap(model):
    """The plain model in any nesting of DistributedDataParallel, DataParallel, torch.compile."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrap(model.module)
    if hasattr(model, "_orig_mod"):
        return _unwrap(model._orig_mod)
    return model


def _named_tensors(model):
    """Parameters and buffers by name, tied ones once, without the prefixes that wrappers add."""
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensors[name.replace("_orig_mod.", "")] = tensor
    # the prefix of a wrapper is on every name
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors
