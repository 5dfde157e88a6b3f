"""Learning rate as a function of the step: warm-up + cosine, warm restarts, cyclic, plateau, and a
range test.

Convention: lr(t) is the rate in force during update t, t = 0 first. Building a schedule sets the
            optimizer to lr(0);
`step()` after each applied update (not after one that GradScaler skipped) sets it to the next.

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)             # its lr is the peak
    schedule = WarmupCosine(optimizer, total_steps=1000, warmup_steps=100)
    for batch in batches:
        loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    plot = WarmupCosine(None, total_steps=1000, warmup_steps=100)          # lr_at needs no
    optimizer
    [round(plot.lr_at(t, 1e-3), 6) for t in (0, 50, 100, 550, 1000)]       # [0.0, 0.0005, 0.001,
    0.0005, 0.0]

Param groups keep their ratio: every rate here (the optimizer's own, min_lr, warmup_start_lr, ...)
is that of the group with the largest lr, and a group built with a tenth of that lr gets a tenth of
the rate at every step. """

import contextlib
import copy
import math

import torch


class _Schedule:
    """What the four schedules share: a counter, the base lrs, and writing lr_at(steps_done) into
    the optimizer.

    The state is where the run stands; the settings come from the constructor, so total_steps may
    grow on resuming. The base lrs belong to the state, because a loaded optimizer holds the lr of
    the moment it was saved. """

    def __init__(self, optimizer, *, warmup_steps=0, warmup_start_lr=0.0, min_lr=0.0):
        self.optimizer, self.steps_done = optimizer, 0
        self.base_lrs = [float(group["lr"]) for group in self._groups()]
        self.warmup_steps, self.warmup_start_lr, self.min_lr = warmup_steps, warmup_start_lr, min_lr
        top = max(self.base_lrs, default=math.inf)
        self._require(all(0 <= lr < math.inf for lr in self.base_lrs) and top > 0, "optimizer lr",
                      self.base_lrs, "be >= 0 and not all 0: build one schedule, on an optimizer "
                      "whose state is not loaded yet")
        self._require(warmup_steps >= 0 and warmup_steps % 1 == 0, "warmup_steps", warmup_steps,
                      "be a whole number >= 0 (0 = no warm-up)")
        for name, lr in ("warmup_start_lr", warmup_start_lr), ("min_lr", min_lr):
            self._require(0 <= lr <= top, name, lr, "lie between 0 and the optimizer's largest "
                          f"lr, {top}")

    @staticmethod
    def _require(ok, name, value, bound):
        if not ok or isinstance(value, bool):  # NaN fails every comparison, so it never is ok
            raise ValueError(f"{name}={value!r} must {bound}")

    def _groups(self):  # asked anew each time: optimizer.load_state_dict replaces the list
        return self.optimizer.param_groups if self.optimizer is not None else []

    def _set_lr(self):
        top = max(self.base_lrs, default=1.0)
        # a group added later raises
        for group, base_lr in zip(self._groups(), self.base_lrs, strict=True):
            group["lr"] = self.lr_at(self.steps_done, top) * (base_lr / top)

    def step(self):
        """Call after each applied optimizer step."""
        self.steps_done += 1
        self._set_lr()

    def get_last_lr(self):
        """The rate in force, one per param group."""
        return [float(group["lr"]) for group in self._groups()]

    def state_dict(self):
        return {"steps_done": self.steps_done, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state):
        """Continue from `state` and set the optimizer's lr; before or after the optimizer's own
        state is loaded."""
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
    """Linear warm-up to the optimizer's lr, then one half cosine down to min_lr, and min_lr for
    good.

        t < W:         start + (base - start) * t / W
        W <= t < T:    min + (base - min) * (1 + cos(pi * (t - W) / (T - W))) / 2
        t >= T:        min

    with T = total_steps (warm-up included), W = warmup_steps, start = warmup_start_lr. Update W has
    the peak, no other. With warmup_start_lr=0 update 0 changes nothing but the optimizer's moments.

    Needs:  _Schedule
    Source: Loshchilov & Hutter 2017 (SGDR), arXiv:1608.03983, eq. 5 with one cycle; Goyal et al.
            2017, arXiv:1706.02677
    Check:  T=1000, W=100, base 1e-3: 5e-4 at t=50 and at t=550
    """

    def __init__(self, optimizer, total_steps, *, warmup_steps=0, warmup_start_lr=0.0, min_lr=0.0):
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr,
                         min_lr=min_lr)
        self.total_steps = total_steps
        self._require(total_steps >= 1 and total_steps % 1 == 0, "total_steps", total_steps,
                      "be a whole number >= 1")
        self._require(warmup_steps < total_steps, "warmup_steps", warmup_steps,
                      f"be below total_steps={total_steps}: the peak would never come; train "
                      "longer or warm up less")
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step` for a peak of base_lr; pure."""
        if step < self.warmup_steps:
            start = self.warmup_start_lr
            return start + (base_lr - start) * step / self.warmup_steps
        progress = min(1, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_lr + (base_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class WarmRestarts(_Schedule):
    """One warm-up, then cosine cycles of cycle_steps * cycle_mult**i updates, each restarting at a
    peak.

        t < W:         start + (base - start) * t / W
        in cycle i:    min + (peak_i - min) * (1 + cos(pi * u / U)) / 2        peak_i = max(base *
                       peak_decay**i, min)

    with u = 0 .. U - 1 the place in cycle i and U its length. The update after u = U - 1 is the
    next peak, so min_lr is approached and not reached. Restarts go on for ever: end a run on a
    boundary, where the rate is lowest.

    Needs:  _Schedule
    Source: Loshchilov & Hutter 2017 (SGDR), arXiv:1608.03983, eq. 5
    Check:  cycle_steps=10, cycle_mult=2: peaks at t = 0, 10, 30, 70, 150
    """

    def __init__(self, optimizer, cycle_steps, *, cycle_mult=1, peak_decay=1.0, warmup_steps=0,
                 warmup_start_lr=0.0, min_lr=0.0):
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr,
                         min_lr=min_lr)
        self.cycle_steps, self.cycle_mult, self.peak_decay = cycle_steps, cycle_mult, peak_decay
        for name, value in ("cycle_steps", cycle_steps), ("cycle_mult", cycle_mult):
            self._require(value >= 1 and value % 1 == 0, name, value, "be a whole number >= 1")
        self._require(0 < peak_decay <= 1, "peak_decay", peak_decay, "lie in (0, 1] (1 = every "
                      "peak the same)")
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step` for a first peak of base_lr; pure."""
        if step < self.warmup_steps:
            start = self.warmup_start_lr
            return start + (base_lr - start) * step / self.warmup_steps
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
    """Linear warm-up to the optimizer's lr, which then stays.

        t < W:         start + (base - start) * t / W
        t >= W:        base

    Needs:  _Schedule
    Check:  W=10, base 1e-3: 5e-4 at t=5, 1e-3 at t=10 and for good
    """

    def __init__(self, optimizer, *, warmup_steps=0, warmup_start_lr=0.0):
        super().__init__(optimizer, warmup_steps=warmup_steps, warmup_start_lr=warmup_start_lr)
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step`; pure."""
        if step < self.warmup_steps:
            start = self.warmup_start_lr
            return start + (base_lr - start) * step / self.warmup_steps
        return base_lr


class Cyclic(_Schedule):
    """Triangles between base_lr and max_lr: up in steps_up updates, down in steps_down (default:
    the same).

        lr = base + (max - base) * height * scale      height: 0 -> 1 over steps_up, 1 -> 0 over
        steps_down
        scale = 1 ("triangular"), 0.5**cycle ("triangular2"), gamma**t ("exp_range")

    Equal to torch's CyclicLR without its momentum cycling. Of the optimizer's own lrs only the
    ratio is used.

    Needs:  _Schedule
    Source: Smith 2017, arXiv:1506.01186
    Check:  base 0.1, max 0.5, steps_up=4, "triangular2": 0.1 at t = 0, 8, 16; 0.5 at t = 4; 0.3 at
            t = 12
    """

    def __init__(self, optimizer, *, base_lr, max_lr, steps_up, steps_down=None, mode="triangular",
                 gamma=1.0):
        super().__init__(optimizer)
        self.base_lrs = [base_lr * (lr / max(self.base_lrs)) for lr in self.base_lrs]
        self.max_lr, self.steps_up = max_lr, steps_up
        self.steps_down = steps_up if steps_down is None else steps_down
        self.mode, self.gamma = mode, gamma
        self._require(0 < max_lr < math.inf, "max_lr", max_lr, "be above 0 and finite")
        self._require(0 < base_lr <= max_lr, "base_lr", base_lr, "be above 0 and at most "
                      f"max_lr={max_lr}")
        for name, steps in ("steps_up", self.steps_up), ("steps_down", self.steps_down):
            self._require(steps >= 1 and steps % 1 == 0, name, steps, "be a whole number >= 1")
        self._require(mode in ("triangular", "triangular2", "exp_range"), "mode", mode,
                      "be 'triangular', 'triangular2' or 'exp_range'")
        self._require(0 < gamma <= 1, "gamma", gamma, "lie in (0, 1] (read by mode='exp_range' "
                      "only)")
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step` for a cycle from base_lr up to max_lr; pure."""
        up, down = self.steps_up, self.steps_down
        cycle, place = divmod(step, up + down)
        height = place / up if place <= up else (up + down - place) / down
        scale = {"triangular": 1, "triangular2": 0.5**cycle,
                 "exp_range": self.gamma**step}[self.mode]
        return base_lr + (self.max_lr - base_lr) * height * scale


class Plateau(_Schedule):
    """Multiply the rate by `factor` when a metric has not improved for more than `patience`
    evaluations in a row.

        lr = warmup(t) * scale        warmup(t) = start + (base - start) * t / W for t < W, then
                                      base
        scale <- max(scale * factor, min_lr / base) at each reduction, so a reduction during warm-up
        lasts

    `step()` after each applied update advances the warm-up only, `step(metric)` after each
    evaluation the plateau only. With mode="min" an improvement is a metric below best - |best| *
    threshold ("rel") or best - threshold ("abs"); mode="max" mirrors it. In the `cooldown`
    evaluations after a reduction none counts as bad. Equal to torch's ReduceLROnPlateau except for:
    |best| (torch has best, so that a negative loss may get worse and pass for better); a NaN or
    infinite metric, which is a ValueError and changes nothing (torch would keep -inf as the best
    for good); and eps (torch drops reductions smaller than that; here every one is made).

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
        for name, count in ("patience", patience), ("cooldown", cooldown):
            self._require(count >= 0 and count % 1 == 0, name, count, "be a whole number >= 0 of "
                          "evaluations")
        self.scale, self.best = 1.0, math.inf if mode == "min" else -math.inf
        self.bad_evaluations = self.cooldown_left = 0
        self._set_lr()

    def lr_at(self, step, base_lr):
        """Rate during update `step` if no other reduction comes; reads the current scale, so not
        pure."""
        if step < self.warmup_steps:
            start = self.warmup_start_lr
            base_lr = start + (base_lr - start) * step / self.warmup_steps
        return base_lr * self.scale

    def step(self, metric=None):
        """Without a metric: an update was applied. With one: an evaluation was made."""
        if metric is None:
            return super().step()
        metric = float(metric)
        self._require(math.isfinite(metric), "metric", metric, "be finite: look for its cause, or "
                      "skip this evaluation")
        margin = self.threshold * abs(self.best) if self.threshold_mode == "rel" else self.threshold
        better = metric < self.best - margin if self.mode == "min" else metric > self.best + margin
        if better or math.isinf(self.best):  # the first: inf - inf is NaN
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
    """A with block that leaves weights, buffers, gradients, modes, optimizer and random state as it
    found them."""
    parameters = {*model.parameters(), *(p for group in optimizer.param_groups
                                         for p in group["params"])}
    weights = [(p, p.detach().clone(), p.grad) for p in parameters]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    with torch.random.fork_rng({p.device for p in parameters if p.is_cuda}):
        try:
            for p in parameters:
                p.grad = None  # the old gradients are kept by reference and must not be added to
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
    """Learning-rate range test: train while the rate grows exponentially, and see where the loss
    falls fastest.

        rate_i = start_lr * (end_lr / start_lr)**(i / (num_steps - 1))
        smooth_i = (1 - b) * sum_{j <= i} b**(i - j) * loss_j / (1 - b**(i + 1))        b = 0.9,
        smooth_0 = loss_0

    `loss_fn(model, batch)` returns a scalar; `batches` is read again when it ends (an iterator
    cannot be: an error). The test stops at a non-finite loss, and once smooth is above both its
    first value and best + 3 * |best| (4 * best for a positive loss). It trains in train mode.
    Whatever happens, all is put back: weights, buffers, gradients, modes, optimizer, torch's random
    state. Call it before building a schedule, which changes the optimizer's lr.

    Returns (rates, smooth, suggestion): two lists of one length, and the rate at the start of the
    ten updates over which smooth falls most before its minimum; NaN if it never falls. An order of
    magnitude, no more. Each fall is weighted by 1 - b**(i + 1), the share of its average that is
    filled: without, the noise of the first batches often wins where there is little to learn, and
    the suggestion is start_lr.

    Needs:  _restored
    Errors: ValueError if the first loss is not finite, or not 0 < start_lr < end_lr
    Source: Smith 2017, arXiv:1506.01186, section 3.3
    """
    lrs = [float(group["lr"]) for group in optimizer.param_groups]
    if not (0 < start_lr < end_lr < math.inf and num_steps >= 2 and num_steps % 1 == 0):
        raise ValueError(f"start_lr={start_lr}, end_lr={end_lr}, num_steps={num_steps} must "
                         "satisfy 0 < start_lr < end_lr and be a whole number of steps >= 2")
    if not max(lrs) > 0:
        raise ValueError(f"optimizer lr={lrs} must not be all 0: call find_lr before building a "
                         "schedule")

    def endless():
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
        for i, batch in zip(range(num_steps), endless()):
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
            if smooth[-1] > max(smooth[0], min(smooth) + 3 * abs(min(smooth))):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if not smooth:
        raise ValueError(f"the first loss is {value}, before any update: look at the data and the "
                         "loss function")
    # The first averages are of few batches: the minimum is sought after them, and their falls count
    # for less.
    lowest = smooth.index(min(smooth[10:], default=min(smooth)))
    drops = [(smooth[i] - smooth[min(i + 10, lowest)]) * (1 - b ** (i + 1)) for i in range(lowest)]
    steepest = max(drops, default=0.0)
    return rates, smooth, rates[drops.index(steepest)] if steepest > 0 else math.nan
