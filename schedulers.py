"""Learning rate as a function of the step: five schedules and a learning-rate range test.

lr(t) is the rate in force during update t; the first is t = 0. Building a schedule sets the
optimizer to lr(0). Call step() after each applied update, not after one that GradScaler skipped.

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)       # its lr is the peak
    schedule = WarmupCosine(optimizer, total_steps=1000, warmup_steps=100)
    optimizer.step()
    schedule.step()                                                  # sets the rate of update 1

    plot = WarmupCosine(None, total_steps=1000, warmup_steps=100)    # lr_at needs no optimizer
    [round(plot.lr_at(t, 1e-3), 6) for t in (0, 50, 100, 1000)]      # [0.0, 0.0005, 0.001, 0.0]

Param groups keep their ratio: every rate here (the optimizer's own, min_lr, warmup_start_lr, ...)
is that of the group with the largest lr. A group with a tenth of that lr gets a tenth of the rate.
"""

import contextlib
import copy
import math

import torch


class _Schedule:
    """Common part of the schedules: counts steps and writes lr_at(steps_done) to the optimizer.

    The settings come from the constructor, so total_steps may grow when a run is resumed. The state
    is the counter and the base lrs: a loaded optimizer has the lr of the moment it was saved.
    """

    def __init__(self, optimizer, *, warmup_steps=0, warmup_start_lr=0.0, min_lr=0.0):
        self.optimizer, self.steps_done = optimizer, 0
        self.base_lrs = [float(group["lr"]) for group in self._groups()]
        self.warmup_steps, self.warmup_start_lr, self.min_lr = warmup_steps, warmup_start_lr, min_lr
        top = max(self.base_lrs, default=math.inf)
        self._require(all(0 <= lr < math.inf for lr in self.base_lrs) and top > 0,
                      "optimizer lr", self.base_lrs, "be >= 0 and not all 0: build one schedule, "
                      "on an optimizer whose state is not loaded yet")
        self._require_whole("warmup_steps", warmup_steps, 0, " (0 = no warm-up)")
        for name, lr in ("warmup_start_lr", warmup_start_lr), ("min_lr", min_lr):
            self._require(0 <= lr <= top, name, lr,
                          f"lie between 0 and the optimizer's largest lr, {top}")

    @staticmethod
    def _require(ok, name, value, bound):
        if not ok or isinstance(value, bool):  # NaN fails every comparison, so it is never ok
            raise ValueError(f"{name}={value!r} must {bound}")

    def _require_whole(self, name, value, least, note=""):
        ok = value >= least and value % 1 == 0
        self._require(ok, name, value, f"be a whole number >= {least}{note}")

    def _groups(self):  # read at every call: optimizer.load_state_dict replaces the list
        return self.optimizer.param_groups if self.optimizer is not None else []

    def _set_lr(self):
        top = max(self.base_lrs, default=1.0)
        # strict: a group that was added later raises
        for group, base_lr in zip(self._groups(), self.base_lrs, strict=True):
            group["lr"] = self.lr_at(self.steps_done, top) * (base_lr / top)

    def _warmup_lr(self, step, base_lr):
        start = self.warmup_start_lr
        return start + (base_lr - start) * step / self.warmup_steps

    def step(self):
        """Call after each applied optimizer step."""
        self.steps_done += 1
        self._set_lr()

    def get_last_lr(self):
        """Rate in force, one per param group."""
        return [float(group["lr"]) for group in self._groups()]

    def state_dict(self):
        return {"steps_done": self.steps_done, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state):
        """Continue from `state` and set the optimizer's lr, before or after its state is loaded."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state holds {sorted(state)}, expected {sorted(self.state_dict())}: "
                             f"it was not saved by {type(self).__name__}")
        if len(state["base_lrs"]) != len(self._groups()):
            raise ValueError(f"state is for {len(state['base_lrs'])} param groups, the optimizer "
                             f"has {len(self._groups())}: build the optimizer as it was when the "
                             "state was saved")
        vars(self).update(state, base_lrs=list(state["base_lrs"]))
        self._set_lr()


class WarmupCosine(_Schedule):
    """Linear warm-up to the optimizer's lr, half a cosine down to min_lr, then constant min_lr.

        t < W:         start + (base - start) * t / W
        W <= t < T:    min + (base - min) * (1 + cos(pi * (t - W) / (T - W))) / 2
        t >= T:        min

    T = total_steps (warm-up included), W = warmup_steps, start = warmup_start_lr. Only update W has
    the peak. With warmup_start_lr=0 update 0 changes nothing but the optimizer's moments.

    Needs:  _Schedule
    Source: Loshchilov & Hutter 2017 (SGDR), arXiv:1608.03983, eq. 5 with one cycle;
            Goyal et al. 2017, arXiv:1706.02677
    Check:  T=1000, W=100, base 1e-3: 5e-4 at t=50 and at t=550
    """

    def __init__(self, optimizer, total_steps, *, warmup_steps=0, warmup_start_lr=0.0, min_lr=0.0):
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr,
                         min_lr=min_lr)
        self.total_steps = total_steps
        self._require_whole("total_steps", total_steps, 1)
        self._require(warmup_steps < total_steps, "warmup_steps", warmup_steps,
                      f"be below total_steps={total_steps}: the peak would never come; train "
                      "longer or warm up less")
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step` for a peak of base_lr; pure."""
        if step < self.warmup_steps:
            return self._warmup_lr(step, base_lr)
        progress = min(1, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_lr + (base_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class WarmRestarts(_Schedule):
    """One warm-up, then cosine cycles of cycle_steps * cycle_mult**i updates with a peak each.

        t < W:         start + (base - start) * t / W
        in cycle i:    min + (peak_i - min) * (1 + cos(pi * u / U)) / 2
        peak_i = max(base * peak_decay**i, min)

    u = 0 .. U - 1 is the place in cycle i, U the length of the cycle. The update after u = U - 1 is
    the next peak, so the rate approaches min_lr and does not reach it. The restarts never end: end
    a run at the end of a cycle, where the rate is lowest.

    Needs:  _Schedule
    Source: Loshchilov & Hutter 2017 (SGDR), arXiv:1608.03983, eq. 5
    Check:  cycle_steps=10, cycle_mult=2: peaks at t = 0, 10, 30, 70, 150
    """

    def __init__(self, optimizer, cycle_steps, *, cycle_mult=1, peak_decay=1.0, warmup_steps=0,
                 warmup_start_lr=0.0, min_lr=0.0):
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr,
                         min_lr=min_lr)
        self.cycle_steps, self.cycle_mult, self.peak_decay = cycle_steps, cycle_mult, peak_decay
        self._require_whole("cycle_steps", cycle_steps, 1)
        self._require_whole("cycle_mult", cycle_mult, 1)
        self._require(0 < peak_decay <= 1, "peak_decay", peak_decay,
                      "lie in (0, 1] (1 = every peak the same)")
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step` for a first peak of base_lr; pure."""
        if step < self.warmup_steps:
            return self._warmup_lr(step, base_lr)
        # Whole numbers only: log(1 + t * (mult - 1) / length, mult) rounds some restarts into the
        # cycle before.
        cycle, place, length = 0, step - self.warmup_steps, self.cycle_steps
        if self.cycle_mult == 1:
            cycle, place = divmod(place, length)
        while place >= length:
            cycle, place, length = cycle + 1, place - length, length * self.cycle_mult
        peak = max(base_lr * self.peak_decay**cycle, self.min_lr)
        return self.min_lr + (peak - self.min_lr) * (1 + math.cos(math.pi * place / length)) / 2


class Constant(_Schedule):
    """Linear warm-up to the optimizer's lr, then constant.

        t < W:         start + (base - start) * t / W
        t >= W:        base

    Needs:  _Schedule
    Check:  W=10, base 1e-3: 5e-4 at t=5, 1e-3 at t=10 and at every later t
    """

    def __init__(self, optimizer, *, warmup_steps=0, warmup_start_lr=0.0):
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr)
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step`; pure."""
        if step < self.warmup_steps:
            return self._warmup_lr(step, base_lr)
        return base_lr


class Cyclic(_Schedule):
    """Triangles between base_lr and max_lr, up in steps_up updates and down in steps_down.

        lr = base + (max - base) * height * scale
        height: 0 -> 1 over steps_up, 1 -> 0 over steps_down (default: steps_up)
        scale = 1 ("triangular"), 0.5**cycle ("triangular2"), gamma**t ("exp_range")

    Equal to torch's CyclicLR without its momentum cycling. Of the optimizer's own lrs only the
    ratio is used.

    Needs:  _Schedule
    Source: Smith 2017, arXiv:1506.01186
    Check:  base 0.1, max 0.5, steps_up=4, "triangular2": 0.1 at t = 0, 8, 16; 0.5 at t = 4;
            0.3 at t = 12
    """

    def __init__(self, optimizer, *, base_lr, max_lr, steps_up, steps_down=None, mode="triangular",
                 gamma=1.0):
        super().__init__(optimizer)
        self.base_lrs = [base_lr * (lr / max(self.base_lrs)) for lr in self.base_lrs]
        self.max_lr, self.steps_up = max_lr, steps_up
        self.steps_down = steps_up if steps_down is None else steps_down
        self.mode, self.gamma = mode, gamma
        self._require(0 < max_lr < math.inf, "max_lr", max_lr, "be above 0 and finite")
        self._require(0 < base_lr <= max_lr, "base_lr", base_lr,
                      f"be above 0 and at most max_lr={max_lr}")
        self._require_whole("steps_up", self.steps_up, 1)
        self._require_whole("steps_down", self.steps_down, 1)
        self._require(mode in ("triangular", "triangular2", "exp_range"), "mode", mode,
                      "be 'triangular', 'triangular2' or 'exp_range'")
        self._require(0 < gamma <= 1, "gamma", gamma,
                      "lie in (0, 1] (read by mode='exp_range' only)")
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step` for a cycle from base_lr up to max_lr; pure."""
        up, down = self.steps_up, self.steps_down
        cycle, place = divmod(step, up + down)
        height = place / up if place <= up else (up + down - place) / down
        scales = {"triangular": 1, "triangular2": 0.5**cycle, "exp_range": self.gamma**step}
        return base_lr + (self.max_lr - base_lr) * height * scales[self.mode]


class Plateau(_Schedule):
    """Multiply the rate by `factor` after more than `patience` evaluations without improvement.

        lr = warmup(t) * scale
        warmup(t) = start + (base - start) * t / W for t < W, then base
        scale <- max(scale * factor, min_lr / base) at each reduction; one during warm-up lasts

    `step()` after each applied update advances only the warm-up. `step(metric)` after each
    evaluation advances only the plateau. With mode="min" a metric improves below
    best - |best| * threshold ("rel") or best - threshold ("abs"); mode="max" mirrors it. During the
    `cooldown` evaluations after a reduction none counts as bad.

    Equal to torch's ReduceLROnPlateau except for three things. torch has best in place of |best|,
    so a worse negative loss can count as better. A NaN or infinite metric is a ValueError here and
    changes nothing; torch would keep -inf as the best for good. torch drops reductions smaller than
    its eps; here every one is made.

    Needs:  _Schedule
    Check:  patience=2, factor=0.5, lr 1.0: the metrics 3, 3, 3, 3 give 1, 1, 1, 0.5
    """

    def __init__(self, optimizer, *, mode="min", factor=0.5, patience=2, threshold=1e-4,
                 threshold_mode="rel", cooldown=0, min_lr=0.0, warmup_steps=0, warmup_start_lr=0.0):
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr,
                         min_lr=min_lr)
        self.mode, self.factor, self.patience, self.cooldown = mode, factor, patience, cooldown
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self._require(mode in ("min", "max"), "mode", mode, "be 'min' or 'max'")
        self._require(threshold_mode in ("rel", "abs"), "threshold_mode", threshold_mode,
                      "be 'rel' or 'abs'")
        self._require(0 < factor < 1, "factor", factor, "lie strictly between 0 and 1")
        self._require(0 <= threshold < math.inf, "threshold", threshold, "be >= 0 and finite")
        self._require_whole("patience", patience, 0, " of evaluations")
        self._require_whole("cooldown", cooldown, 0, " of evaluations")
        self.scale, self.best = 1.0, math.inf if mode == "min" else -math.inf
        self.bad_evaluations = self.cooldown_left = 0
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step` without another reduction. Not pure: reads the scale."""
        if step < self.warmup_steps:
            base_lr = self._warmup_lr(step, base_lr)
        return base_lr * self.scale

    def step(self, metric=None):
        """Call without a metric after an update, with a metric after an evaluation."""
        if metric is None:
            return super().step()
        metric = float(metric)
        self._require(math.isfinite(metric), "metric", metric,
                      "be finite: look for its cause, or skip this evaluation")
        margin = self.threshold * abs(self.best) if self.threshold_mode == "rel" else self.threshold
        better = metric < self.best - margin if self.mode == "min" else metric > self.best + margin
        if better or math.isinf(self.best):  # the first metric: inf - inf is NaN
            self.best, self.bad_evaluations = metric, 0
        else:
            self.bad_evaluations += 1
        if self.cooldown_left > 0:
            self.cooldown_left, self.bad_evaluations = self.cooldown_left - 1, 0
        if self.bad_evaluations > self.patience:
            self.scale = max(self.scale * self.factor, self.min_lr / max(self.base_lrs))
            self.cooldown_left, self.bad_evaluations = self.cooldown, 0
        self._set_lr()

    def state_dict(self):
        return {**super().state_dict(), "scale": self.scale, "best": self.best,
                "bad_evaluations": self.bad_evaluations, "cooldown_left": self.cooldown_left}


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

    Needs:  _restored
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
                group["lr"] = rate * (lr / max(lrs))
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
