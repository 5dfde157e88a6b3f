"""Exponential moving average of a model's weights: the copy to evaluate while the model itself
keeps training.

    ema = EMA(model, decay=0.999)
    for batch in batches:
        ...                      # forward, backward, optimizer.step()
        ema.update(model)        # once per optimizer step, and only after a step that was applied
    evaluate(ema.module)         # a model like any other, in eval mode and without gradients
"""

import copy
import operator

import torch
import torch.nn as nn


def ema_decay(update, decay, warmup=True):
    """Decay in force during an update; `update` counts the updates made before it, so the first is
    0.

        min(decay, (1 + update) / (10 + update)), or `decay` throughout with warmup=False

    Without the ramp the random initial weights still make up decay^n of the average after n
    updates: 90 % after 100 updates at 0.999. With it they make up 0.001 % after 10.

    Source: TensorFlow, tf.train.ExponentialMovingAverage(num_updates=...)
    Check:  0.1 at update 0, 0.5 at update 8
    """
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


class EMA:
    """Shadow copy of a model, moved towards it at every update.

        shadow = d * shadow + (1 - d) * model        d = ema_decay(n)

        decay     horizon 1 / (1 - d)     half-life ln 2 / -ln d     warm-up reaches it at update
        0.9               10 steps                 6.6 steps                   80
        0.99             100                      69                          890
        0.999          1,000                     693                        8,990
        0.9999        10,000                   6,931                       89,990

    Choose a horizon well below the length of the run; a longer one only lags behind the model.

    Averaged: parameters and floating-point buffers (batch-norm statistics).
    Copied:   integer and bool buffers.
    Tied weights are one tensor, averaged once. bfloat16 and float16 weights have a float32 shadow,
    since in half precision a step of (1 - d) rounds away; give that shadow float32 inputs.
    The model may arrive wrapped (DistributedDataParallel, DataParallel, torch.compile, in any
    nesting) or not, here and in update: the shadow is the plain model, and names are compared
    without `module.` and `_orig_mod.`. They are compared again when it is another model or anything
    in it was replaced, which every update looks for; so the EMA, not its copies, refers to the last
    model.

    Errors: ValueError for a decay outside [0, 1); for a name or a shape that model and shadow do
            not share
    Needs:  ema_decay, _unwrap, _named_tensors, _Matched, import copy, import operator
    Check:  after the first update the shadow is 0.1 * initial + 0.9 * model
    """

    def __init__(self, model, decay=0.999, *, warmup=True):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}: a decay of 1 never leaves the "
                             "initial weights")
        self.decay, self.warmup, self.updates, self._matched = decay, warmup, 0, None
        self.module = copy.deepcopy(_unwrap(model)).eval().requires_grad_(False)
        for tensor in _named_tensors(self.module).values():
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()

    @torch.no_grad()
    def update(self, model, check_finite=False):
        """Move the shadow towards `model`. An update that raises leaves the shadow as it was.

        check_finite=True raises ValueError with the name of the first tensor that holds NaN or inf.
        It reads every weight: for loops that do not already skip non-finite steps.
        """
        if self._matched is None or not self._matched.holds_for(self.module, model):
            self._matched = _Matched(self.module, model)
        matched = self._matched
        for name, shadow, tensor in matched.pairs:
            if tensor.shape != shadow.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its average "
                                 f"{tuple(shadow.shape)}")
            if check_finite and not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or inf; the average was not updated")

        if matched.averaged:
            torch._foreach_lerp_([shadow for _, shadow, _ in matched.averaged],
                                 [tensor.to(shadow) for _, shadow, tensor in matched.averaged],
                                 1 - ema_decay(self.updates, self.decay, self.warmup))
        for _, shadow, tensor in matched.copied:
            shadow.copy_(tensor)
        self.updates += 1

    def __getstate__(self):  # what copy and pickle take: not the model
        return self.__dict__ | {"_matched": None}

    def state_dict(self):
        """Tensors and plain numbers, all that an exact resume needs. The tensors are the shadow's
        own, as in nn.Module."""
        return {"module": self.module.state_dict(), "updates": self.updates, "decay": self.decay,
                "warmup": self.warmup}

    def load_state_dict(self, state):
        """Continue from `state`, its decay and warm-up included. A missing or an unexpected name is
        an error."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"an EMA state has the keys {list(self.state_dict())}, got "
                             f"{list(state)}")
        self.module.load_state_dict(state["module"])
        self.updates, self.decay, self.warmup = state["updates"], state["decay"], state["warmup"]


class _Matched:
    """The tensors of the shadow and of a model, paired by name once: finding names takes several
    times as long as averaging.

    Parameters, buffers and parts of a module hang in three dictionaries of it. As long as those of
    all modules hold the same objects under the same names and no others, nothing was replaced,
    added or removed. What changes in place, values, shapes, types, devices, the update reads anew
    each time. A dictionary that is itself exchanged, which torch does not do, is not seen.

    Needs:  _named_tensors, import operator
    """

    def __init__(self, module, model):
        shadow, source = _named_tensors(module), _named_tensors(model)
        if shadow.keys() != source.keys():
            raise ValueError("the model is not the one averaged: missing "
                             f"{sorted(shadow.keys() - source.keys())}, unexpected "
                             f"{sorted(source.keys() - shadow.keys())}")
        self.pairs = [(name, tensor, source[name]) for name, tensor in shadow.items()]
        averaged = [tensor.is_floating_point() or tensor.is_complex() for tensor in shadow.values()]
        self.averaged = [pair for pair, yes in zip(self.pairs, averaged) if yes]
        self.copied = [pair for pair, yes in zip(self.pairs, averaged) if not yes]
        self.models = module, model
        self.places = [place for each in self.models for part in each.modules()
                       for place in (part._parameters, part._buffers, part._modules)]
        self.holders = [place for place in self.places for _ in place]
        self.names = [name for place in self.places for name in place]
        self.objects = [each for place in self.places for each in place.values()]

    def holds_for(self, *models):
        # a name that is gone finds the dictionary, not None
        found = map(dict.get, self.holders, self.names, self.holders)
        return (all(map(operator.is_, models, self.models))
                and sum(map(len, self.places)) == len(self.objects)
                and all(map(operator.is_, found, self.objects)))


def _unwrap(model):
    """The plain model inside any nesting of DistributedDataParallel, DataParallel and
    torch.compile."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrap(model.module)
    return _unwrap(model._orig_mod) if hasattr(model, "_orig_mod") else model


def _named_tensors(model):
    """Parameters and buffers by name, tied ones once, without the prefixes that wrappers add."""
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in named}
    # a wrapper's prefix is on every name
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name[len("module."):]: tensor for name, tensor in tensors.items()}
    return tensors
