"""Learning rate as a function of the step: five schedules and a learning-rate range test.

A schedule is one of torch's LRSchedulers. lr(t) is the rate in force during update t; the first is
t = 0. Call step() after each applied update, not after one that GradScaler skipped, nor per epoch.

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)       # its lr is the peak
    schedule = WarmupCosine(optimizer, total_steps=1000, warmup_steps=100)
    optimizer.step()
    schedule.step()                                                  # sets the rate of update 1

    [round(warmup_cosine(t, 1e-3, total_steps=1000, warmup_steps=100), 6) for t in (0, 50, 550)]
    # [0.0, 0.0005, 0.0005]: the formula needs no optimizer

Param groups keep their ratio: every rate here (min_lr, warmup_start_lr, ...) is that of the group
with the largest lr. A group with a tenth of that lr gets a tenth of the rate, and of min_lr.
"""

import contextlib
import copy
import math
import warnings

import torch
from torch.optim.lr_scheduler import LRScheduler


def linear_warmup(step, base_lr, *, warmup_steps, warmup_start_lr=0.0):
    """Rate of update `step`: a line up to base_lr, then base_lr.

        t < W:     start + (base - start) * t / W
        t >= W:    base

    Source: Goyal et al. 2017, arXiv:1706.02677
    Check:  base 1e-3, W=10: 5e-4 at t=5
    """
    if step >= warmup_steps:
        return base_lr
    return warmup_start_lr + (base_lr - warmup_start_lr) * step / warmup_steps


def warmup_cosine(step, base_lr, *, total_steps, warmup_steps=0, warmup_start_lr=0.0, min_lr=0.0,
                  warmup_prefix=True):
    """Rate of update `step`: a line up to base_lr, half a cosine down to min_lr, then min_lr.

        t < W:         start + (base - start) * t / W
        W <= t < T:    min + (base - min) * (1 + cos(pi * (t - W) / (T - W))) / 2
        t >= T:        min

    T = total_steps, warm-up included, W = warmup_steps, start = warmup_start_lr. With
    warmup_prefix=False the cosine begins at update 0, under the warm-up: cos(pi * t / T). Then the
    rate falls at t = W from the line to the cosine (timm's default).

    Source: Loshchilov & Hutter 2017 (SGDR), arXiv:1608.03983, eq. 5 with one cycle
    Needs:  math, linear_warmup
    Check:  T=1000, W=100, base 1e-3: 5e-4 at t=50 and at t=550
    """
    if step < warmup_steps:
        return linear_warmup(step, base_lr, warmup_steps=warmup_steps,
                             warmup_start_lr=warmup_start_lr)
    start = warmup_steps if warmup_prefix else 0
    progress = min(1, (step - start) / (total_steps - start))
    return min_lr + (base_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def warm_restarts(step, base_lr, *, cycle_steps, cycle_mult=1, peak_decay=1.0, warmup_steps=0,
                  warmup_start_lr=0.0, min_lr=0.0):
    """Rate of update `step`: a line up to base_lr, then cosine cycles with a peak each.

        t < W:         start + (base - start) * t / W
        in cycle i:    min + (peak_i - min) * (1 + cos(pi * u / U)) / 2
        peak_i = max(base * peak_decay**i, min)
        U = cycle_steps * cycle_mult**i, the length of cycle i; u = 0 .. U - 1, the place in it

    Source: Loshchilov & Hutter 2017 (SGDR), arXiv:1608.03983, eq. 5
    Needs:  math, linear_warmup
    Check:  cycle_steps=10, cycle_mult=2: peaks at t = 0, 10, 30, 70, 150
    """
    if step < warmup_steps:
        return linear_warmup(step, base_lr, warmup_steps=warmup_steps,
                             warmup_start_lr=warmup_start_lr)
    # Whole numbers only: log(1 + t * (mult - 1) / length, mult) rounds some restarts into the
    # cycle before.
    cycle, place, length = 0, step - warmup_steps, cycle_steps
    if cycle_mult == 1:
        cycle, place = divmod(place, length)
    while place >= length:
        cycle, place, length = cycle + 1, place - length, length * cycle_mult
    peak = max(base_lr * peak_decay**cycle, min_lr)
    return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * place / length)) / 2


class _Schedule(LRScheduler):
    """Common part of the schedules: writes lr_at(last_epoch) to the optimizer, group by group.

    last_epoch, torch's name, counts the updates. The settings come from the constructor, so
    total_steps may grow when a run is resumed. The state is the counter and the base lrs: a loaded
    optimizer has the lr of the moment it was saved.
    """

    def __init__(self, optimizer, *, warmup_steps=0, warmup_start_lr=0.0, min_lr=0.0):
        self.warmup_steps, self.warmup_start_lr, self.min_lr = warmup_steps, warmup_start_lr, min_lr
        base_lrs = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        top = max(base_lrs)
        _require(all(0 <= lr < math.inf for lr in base_lrs) and top > 0, "optimizer lr", base_lrs,
                 "be >= 0 and not all 0")
        _require_whole("warmup_steps", warmup_steps, 0, " (0 = no warm-up)")
        for name, lr in ("warmup_start_lr", warmup_start_lr), ("min_lr", min_lr):
            _require(0 <= lr <= top, name, lr,
                     f"lie between 0 and the optimizer's largest lr, {top}")
        super().__init__(optimizer)
        self.base_lrs = base_lrs

    def get_lr(self):
        """Rates of update `last_epoch`.

        The schedule is that of the largest base lr, `top`. A group keeps its share of it, base_lr /
        top, and its `lr_scale` where it has one (the layer decay of timm and MAE).
        """
        self._take_in_new_groups()
        rate, top = self.lr_at(self.last_epoch), self.top_lr()
        rates = []
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            share = float(base_lr) / top * group.get("lr_scale", 1.0)
            rates.append(rate * share)
        return rates

    def top_lr(self):
        return float(max(self.base_lrs))

    def set_step(self, step):
        """Set the counter and the rates, for a loop that counts updates itself."""
        self.last_epoch, self._step_count = step, step + 1
        self._write_rates()

    def get_last_lr(self):
        """Rate in force, one per param group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self):
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state):
        """Continue from `state` and set the optimizer's lr, before or after its state is loaded."""
        groups = len(self.optimizer.param_groups)
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state holds {sorted(state)}, expected {sorted(self.state_dict())}: "
                             f"it was not saved by {type(self).__name__}")
        if len(state["base_lrs"]) != groups:
            raise ValueError(f"state is for {len(state['base_lrs'])} param groups, the optimizer "
                             f"has {groups}: build the optimizer as it was when the state was "
                             "saved")
        for name, value in state.items():
            setattr(self, name, value)
        self.base_lrs = list(state["base_lrs"])
        if self.last_epoch >= 0:  # else it waits in a SequentialLR
            self.set_step(self.last_epoch)

    def _write_rates(self):
        for group, lr in zip(self.optimizer.param_groups, self.get_lr()):
            _set_lr(group, lr)

    def _take_in_new_groups(self):
        """The own lr of a group that came by add_param_group becomes its base lr."""
        groups = self.optimizer.param_groups
        if len(groups) < len(self.base_lrs):
            raise ValueError(f"the optimizer has {len(groups)} param groups, the schedule has "
                             f"{len(self.base_lrs)}: build a new one and call its set_step")
        for i in range(len(self.base_lrs), len(groups)):
            base_lr = float(groups[i].setdefault("initial_lr", groups[i]["lr"]))
            self.base_lrs.append(base_lr)
            warnings.warn(f"param group {i} is new to the schedule: {base_lr:g}, its lr, is its "
                          "base lr from here on")


def _require(ok, name, value, bound):
    if not ok or isinstance(value, bool):  # NaN fails every comparison, so it is never ok
        raise ValueError(f"{name}={value!r} must {bound}")


def _require_whole(name, value, least, note=""):
    ok = value >= least and value % 1 == 0
    _require(ok, name, value, f"be a whole number >= {least}{note}")


def _set_lr(group, lr):
    if isinstance(group["lr"], torch.Tensor):  # a compiled or captured step reads this tensor
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


class WarmupCosine(_Schedule):
    """warmup_cosine as a schedule: linear warm-up to the optimizer's lr, a cosine to min_lr.

    min_lr and warmup_start_lr are those of the group with the largest lr; the others get their
    share of them. Only update W has the peak. With warmup_start_lr=0 update 0 changes nothing but
    the optimizer's moments.

    Needs:  warmup_cosine, linear_warmup, _Schedule, _require, _require_whole, _set_lr, warnings,
            torch, LRScheduler
    Check:  T=1000, W=100, lr 1e-3: 5e-4 at t=50 and at t=550
    """

    def __init__(self, optimizer, total_steps, *, warmup_steps=0, warmup_start_lr=0.0, min_lr=0.0,
                 warmup_prefix=True):
        # as an attribute, total_steps would make accelerate take this for a OneCycleLR
        self.settings = dict(total_steps=total_steps, warmup_steps=warmup_steps, min_lr=min_lr,
                             warmup_start_lr=warmup_start_lr, warmup_prefix=warmup_prefix)
        _require_whole("total_steps", total_steps, 1)
        _require(warmup_steps < total_steps, "warmup_steps", warmup_steps,
                 f"be below total_steps={total_steps}: the peak would never come; train longer or "
                 "warm up less")
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr,
                         min_lr=min_lr)

    def lr_at(self, step):
        """Rate of the group with the largest lr during update `step`."""
        return warmup_cosine(step, self.top_lr(), **self.settings)


class WarmRestarts(_Schedule):
    """warm_restarts as a schedule: one warm-up, then cosine cycles that begin at a peak.

    Rates are those of the group with the largest lr; the others get their share of them. The update
    after the last of a cycle is the next peak, so the rate approaches min_lr and does not reach it.
    The restarts never end: end a run at the end of a cycle, where the rate is lowest.

    Needs:  warm_restarts, linear_warmup, _Schedule, _require, _require_whole, _set_lr, warnings,
            torch, LRScheduler
    Check:  cycle_steps=10, cycle_mult=2: peaks at t = 0, 10, 30, 70, 150
    """

    def __init__(self, optimizer, cycle_steps, *, cycle_mult=1, peak_decay=1.0, warmup_steps=0,
                 warmup_start_lr=0.0, min_lr=0.0):
        self.settings = dict(cycle_steps=cycle_steps, cycle_mult=cycle_mult, min_lr=min_lr,
                             peak_decay=peak_decay, warmup_steps=warmup_steps,
                             warmup_start_lr=warmup_start_lr)
        _require_whole("cycle_steps", cycle_steps, 1)
        _require_whole("cycle_mult", cycle_mult, 1)
        _require(0 < peak_decay <= 1, "peak_decay", peak_decay,
                 "lie in (0, 1] (1 = every peak the same)")
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr,
                         min_lr=min_lr)

    def lr_at(self, step):
        """Rate of the group with the largest lr during update `step`."""
        return warm_restarts(step, self.top_lr(), **self.settings)


class Constant(_Schedule):
    """linear_warmup as a schedule: a line up to the optimizer's lr, then constant.

    Needs:  linear_warmup, _Schedule, _require, _require_whole, _set_lr, math,
            warnings, torch, LRScheduler
    Check:  W=10, lr 1e-3: 5e-4 at t=5, 1e-3 at t=10 and at every later t
    """

    def __init__(self, optimizer, *, warmup_steps=0, warmup_start_lr=0.0):
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr)

    def lr_at(self, step):
        """Rate of the group with the largest lr during update `step`."""
        return linear_warmup(step, self.top_lr(), warmup_steps=self.warmup_steps,
                             warmup_start_lr=self.warmup_start_lr)


class Cyclic(_Schedule):
    """Triangles between base_lr and max_lr, up in steps_up updates and down in steps_down.

        lr = base + (max - base) * height * scale
        height: 0 -> 1 over steps_up, 1 -> 0 over steps_down (default: steps_up)
        scale = 1 ("triangular"), 0.5**cycle ("triangular2"), gamma**t ("exp_range")

    Equal to torch's CyclicLR without its momentum cycling; there 2,000 is the default of steps_up.
    Of the optimizer's own lrs only the ratio is used.

    Needs:  _Schedule, _require, _require_whole, _set_lr, math, warnings,
            torch, LRScheduler
    Source: Smith 2017, arXiv:1506.01186
    Check:  base 0.1, max 0.5, steps_up=4, "triangular2": 0.1 at t = 0, 8, 16; 0.5 at t = 4;
            0.3 at t = 12
    """

    def __init__(self, optimizer, *, base_lr, max_lr, steps_up, steps_down=None, mode="triangular",
                 gamma=1.0):
        self.base_lr, self.max_lr, self.steps_up = base_lr, max_lr, steps_up
        self.steps_down = steps_up if steps_down is None else steps_down
        self.mode, self.gamma = mode, gamma
        _require(0 < max_lr < math.inf, "max_lr", max_lr, "be above 0 and finite")
        _require(0 < base_lr <= max_lr, "base_lr", base_lr,
                 f"be above 0 and at most max_lr={max_lr}")
        _require_whole("steps_up", self.steps_up, 1)
        _require_whole("steps_down", self.steps_down, 1)
        _require(mode in ("triangular", "triangular2", "exp_range"), "mode", mode,
                 "be 'triangular', 'triangular2' or 'exp_range'")
        _require(0 < gamma <= 1, "gamma", gamma, "lie in (0, 1] (read by mode='exp_range' only)")
        super().__init__(optimizer)

    def lr_at(self, step):
        """Rate of the group with the largest lr during update `step`."""
        up, down = self.steps_up, self.steps_down
        cycle, place = divmod(step, up + down)
        height = place / up if place <= up else (up + down - place) / down
        scales = {"triangular": 1, "triangular2": 0.5**cycle, "exp_range": self.gamma**step}
        return self.base_lr + (self.max_lr - self.base_lr) * height * scales[self.mode]


class Plateau(_Schedule):
    """Multiply the rate by `factor` after more than `patience` evaluations without improvement.

        lr = linear_warmup(t) * scale
        scale <- max(scale * factor, min_lr / base) at each reduction; one during warm-up lasts

    `step()` after each applied update advances only the warm-up. `step(metric)` after each
    evaluation advances only the plateau. With mode="min" a metric improves below
    best - |best| * threshold ("rel") or best - threshold ("abs"); mode="max" mirrors it. During the
    `cooldown` evaluations after a reduction none counts as bad.

    Equal to torch's ReduceLROnPlateau (whose defaults are factor 0.1, patience 10) except for three
    things. torch has best in place of |best|, so a worse negative loss can count as better. A NaN
    or infinite metric is a ValueError here and changes nothing; torch would keep -inf as the best
    for good. torch drops reductions smaller than its eps; here every one is made.

    Clients call one of the two alone. It warns after `metric_within` updates past the warm-up
    without any metric, and after two metrics without an update where a warm-up is set.
        Lightning      two entries for one schedule, {"scheduler": s, "interval": "step"} and
                       {"scheduler": s, "reduce_on_plateau": True, "monitor": "val_loss"}
        transformers   a TrainerCallback whose on_evaluate calls s.step(metrics["eval_loss"])

    Needs:  linear_warmup, _Schedule, _require, _require_whole, _set_lr, math,
            warnings, torch, LRScheduler
    Errors: ValueError in a SequentialLR, which steps by epoch
    Check:  patience=2, factor=0.5, lr 1.0: the metrics 3, 3, 3, 3 give 1, 1, 1, 0.5
    """

    _UPDATE = object()  # the default of step(); None is a metric that is missing

    def __init__(self, optimizer, mode="min", *, factor=0.5, patience=2, threshold=1e-4,
                 threshold_mode="rel", cooldown=0, min_lr=0.0, warmup_steps=0, warmup_start_lr=0.0,
                 metric_within=1000):
        self.mode, self.factor, self.patience, self.cooldown = mode, factor, patience, cooldown
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.metric_within = metric_within
        _require(mode in ("min", "max"), "mode", mode, "be 'min' or 'max'")
        _require(threshold_mode in ("rel", "abs"), "threshold_mode", threshold_mode,
                 "be 'rel' or 'abs'")
        _require(0 < factor < 1, "factor", factor, "lie strictly between 0 and 1")
        _require(0 <= threshold < math.inf, "threshold", threshold, "be >= 0 and finite")
        _require_whole("patience", patience, 0, " of evaluations")
        _require_whole("cooldown", cooldown, 0, " of evaluations")
        self.scale, self.best = 1.0, math.inf if mode == "min" else -math.inf
        self.evaluations = self.bad_evaluations = self.cooldown_left = 0
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr,
                         min_lr=min_lr)

    def lr_at(self, step):
        """Rate of the group with the largest lr during update `step`, at the scale of now."""
        return self.scale * linear_warmup(step, self.top_lr(), warmup_steps=self.warmup_steps,
                                          warmup_start_lr=self.warmup_start_lr)

    def step(self, metric=_UPDATE):
        """Call without a metric after an update, with a metric after an evaluation."""
        if metric is self._UPDATE:
            super().step()
            if not self.evaluations and self.last_epoch == self.warmup_steps + self.metric_within:
                warnings.warn(f"Plateau had {self.last_epoch} updates and no metric: the rate "
                              "falls only if step(metric) is called after an evaluation")
            return
        self._require_metric(metric)
        metric = float(metric)
        margin = self.threshold * abs(self.best) if self.threshold_mode == "rel" else self.threshold
        better = metric < self.best - margin if self.mode == "min" else metric > self.best + margin
        if better or not self.evaluations:  # the first metric: inf - inf is NaN
            self.best, self.bad_evaluations = metric, 0
        else:
            self.bad_evaluations += 1
        self.evaluations += 1
        if self.cooldown_left > 0:
            self.cooldown_left, self.bad_evaluations = self.cooldown_left - 1, 0
        if self.bad_evaluations > self.patience:
            self.scale = max(self.scale * self.factor, self.min_lr / self.top_lr())
            self.cooldown_left, self.bad_evaluations = self.cooldown, 0
        self._write_rates()

    def _require_metric(self, metric):
        finite = metric is not None and math.isfinite(metric)
        _require(finite, "metric", metric, "be finite: look for its cause, or skip this "
                 "evaluation; step() without an argument counts an update")
        if self.evaluations == 1 and self.last_epoch == 0 and self.warmup_steps:
            warnings.warn("Plateau had 2 metrics and no update: its warm-up of "
                          f"{self.warmup_steps} updates advances only if step() is called after "
                          "each update")

    def state_dict(self):
        return {**super().state_dict(), "scale": self.scale, "best": self.best,
                "evaluations": self.evaluations, "bad_evaluations": self.bad_evaluations,
                "cooldown_left": self.cooldown_left}

    @property
    def last_epoch(self):
        return self._last_epoch

    @last_epoch.setter
    def last_epoch(self, value):
        if value < 0 and hasattr(self, "_last_epoch"):  # taken back: only SequentialLR does that
            raise ValueError("Plateau cannot stand in a SequentialLR, which gives it an epoch "
                             "where it expects a metric: build it alone, with warmup_steps")
        self._last_epoch = value


@contextlib.contextmanager
def _restored(model, optimizer):
    """Restore weights, buffers, gradients, modes, optimizer and random state after a with block."""
    parameters = set(model.parameters())
    for group in optimizer.param_groups:
        parameters.update(group["params"])
    weights = [(p, p.detach().clone(), p.grad) for p in parameters]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    with torch.random.fork_rng({p.device for p in parameters if p.is_cuda}):
        try:
            for p in parameters:
                p.grad = None  # backward would add to the old gradients, which are not copied
            yield
        finally:
            with torch.no_grad():
                for p, value, grad in weights:
                    p.copy_(value)
                    p.grad = grad
                # by name: a forward may replace a buffer by a new tensor
                for name, value in buffers.items():
                    model.get_buffer(name).copy_(value)
            for module, training in modes:
                module.training = training
            optimizer.load_state_dict(optimizer_state)


def find_lr(model, optimizer, loss_fn, batches, *, start_lr=1e-7, end_lr=1.0, num_steps=100):
    """Learning-rate range test: raise the rate exponentially, find where the loss falls fastest.

        rate_i = start_lr * (end_lr / start_lr)**(i / (num_steps - 1))
        smooth_i = (1 - b) * sum_{j <= i} b**(i - j) * loss_j / (1 - b**(i + 1))        b = 0.9

    `loss_fn(model, batch)` returns a scalar. `batches` is read again when it ends; an iterator
    cannot be, which is an error. The test stops at a non-finite loss, and when smooth is above both
    its first value and best + 3 * |best| (4 * best for a positive loss). It trains in train mode.
    Afterwards, also after an error, everything is restored: weights, buffers, gradients, modes,
    optimizer, torch's random state. Call it before building a schedule, which changes the lr of the
    optimizer.

    Returns (rates, smooth, suggestion): two lists of one length, and a rate. The suggestion is the
    start of the ten updates with the largest fall of smooth before its minimum; NaN without a fall.
    It gives the order of magnitude, no more. Each fall is weighted by 1 - b**(i + 1), the share of
    its average that is filled. Without the weight the noise of the first batches often wins where
    there is little to learn, and the suggestion is start_lr.

    Needs:  _restored, _set_lr, contextlib, copy, math, torch
    Errors: ValueError if the first loss is not finite, or not 0 < start_lr < end_lr
    Source: Smith 2017, arXiv:1506.01186, section 3.3
    Check:  smooth_0 = loss_0
    """
    lrs = [float(group["lr"]) for group in optimizer.param_groups]
    if not (0 < start_lr < end_lr < math.inf and num_steps >= 2 and num_steps % 1 == 0):
        raise ValueError(f"start_lr={start_lr}, end_lr={end_lr}, num_steps={num_steps} must "
                         "satisfy 0 < start_lr < end_lr and be a whole number of steps >= 2")
    if not max(lrs) > 0:
        raise ValueError(f"optimizer lr={lrs} must not be all 0: call find_lr before building a "
                         "schedule")

    def endless_batches():
        while True:
            before = len(rates)
            yield from batches
            if len(rates) == before:
                raise ValueError(f"batches ended after {before} of num_steps={num_steps}: pass a "
                                 "list or a DataLoader (an iterator cannot be read again), or "
                                 "lower num_steps")

    rates, smooth, average, b = [], [], 0.0, 0.9
    with _restored(model, optimizer):
        model.train()
        for i, batch in zip(range(num_steps), endless_batches()):
            rate = start_lr * (end_lr / start_lr) ** (i / (num_steps - 1))
            for group, lr in zip(optimizer.param_groups, lrs):
                _set_lr(group, rate * (lr / max(lrs)) * group.get("lr_scale", 1.0))
            loss = loss_fn(model, batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                break
            average = b * average + (1 - b) * value
            rates.append(rate)
            smooth.append(average / (1 - b ** (i + 1)))
            best = min(smooth)
            if smooth[-1] > max(smooth[0], best + 3 * abs(best)):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if not smooth:
        raise ValueError(f"the first loss is {value}, before any update: look at the data and the "
                         "loss function")
    # The first averages are of few batches. So the minimum is sought after them, and their falls
    # count for less.
    lowest = smooth.index(min(smooth[10:], default=min(smooth)))
    falls = [(smooth[i] - smooth[min(i + 10, lowest)]) * (1 - b ** (i + 1)) for i in range(lowest)]
    largest = max(falls, default=0.0)
    suggestion = rates[falls.index(largest)] if largest > 0 else math.nan
    return rates, smooth, suggestion
