"""Tests of schedulers."""

import copy
import json
import math
import warnings

import numpy as np
import torch

from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from schedulers import (
    Constant, Cyclic, Plateau, WarmRestarts, WarmupCosine, find_lr, warm_restarts, warmup_cosine)
from tests.helpers import near, raises, refuses, same_bits, sgd


def trajectory(schedule, steps):
    """Rates of the first group in force during the next updates."""
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return rates


CLOSED = [
    lambda o: WarmupCosine(o, 25, warmup_steps=6, warmup_start_lr=1e-4, min_lr=1e-3),
    lambda o: WarmRestarts(o, 4, cycle_mult=2, peak_decay=0.7, warmup_steps=5, min_lr=1e-3),
    lambda o: Cyclic(o, base_lr=0.01, max_lr=0.1, steps_up=3, steps_down=5, mode="triangular2"),
    lambda o: Cyclic(o, base_lr=0.01, max_lr=0.1, steps_up=4, mode="exp_range", gamma=0.9),
]

METRICS = [3, 2, 2, 2, 2, 2, 2, 1.5, 1.5, 1.5, 1.5, 1.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 1, 1, 1, 1]


def plateau(o, **options):
    defaults = dict(factor=0.5, patience=1, cooldown=2, warmup_steps=9, min_lr=0.01)
    return Plateau(o, **defaults | options)


def squared_error(model, batch):
    return (model(batch[0]) - batch[1]).pow(2).mean()


def drive(schedule, start, stop):
    """One update per step and, for Plateau, one evaluation; the rates of all groups after each."""
    rates = []
    for k in range(start, stop):
        schedule.optimizer.step()
        schedule.step()
        if isinstance(schedule, Plateau):
            schedule.step(METRICS[k])
        rates.append([float(group["lr"]) for group in schedule.optimizer.param_groups])
        assert rates[-1] == schedule.get_last_lr()
    return rates


def test_schedulers_warmup_cosine_is_the_formula_at_every_step():
    W, T, start, low, base = 5, 20, 0.01, 0.002, 0.3
    schedule = WarmupCosine(sgd(base), T, warmup_steps=W, warmup_start_lr=start, min_lr=low)
    rates = trajectory(schedule, 30)
    for t, rate in enumerate(rates):
        cosine = low + (base - low) * (1 + math.cos(math.pi * (t - W) / (T - W))) / 2
        want = start + (base - start) * t / W if t < W else cosine if t < T else low
        assert math.isclose(rate, want, rel_tol=1e-12), t


def test_schedulers_warmup_cosine_equals_torch():
    optimizer = sgd(0.3)
    ours = trajectory(WarmupCosine(sgd(0.3), 20, min_lr=0.01), 21)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, 0.01)
    assert near(ours, trajectory(theirs, 21), 1e-9)


def test_schedulers_warmup_cosine_peaks_once_and_never_rises_after():
    for W in 0, 1, 7, 19:
        rates = np.array(trajectory(WarmupCosine(sgd(0.3), 20, warmup_steps=W, min_lr=0.01), 60))
        assert rates[W] == 0.3 and (np.delete(rates, W) < 0.3).all()
        assert (np.diff(rates[:W + 1]) > 0).all() and (np.diff(rates[W:20]) < 0).all()
        assert (rates[20:] == 0.01).all()


def test_schedulers_construction_puts_the_first_rate_into_the_optimizer():
    for build in CLOSED:
        optimizer = sgd(0.1)
        schedule = build(optimizer)
        [rate] = schedule.get_last_lr()
        assert rate == optimizer.param_groups[0]["lr"] == schedule.lr_at(0)
    optimizer = sgd(0.1)
    Plateau(optimizer, warmup_steps=4, warmup_start_lr=0.02)
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.02)


def test_schedulers_closed_forms_are_functions_of_the_step_alone():
    rates = [warmup_cosine(t, 1e-3, total_steps=1000, warmup_steps=100) for t in (50, 100, 550)]
    assert [round(rate, 6) for rate in rates] == [0.0005, 0.001, 0.0005]
    restarts = [warm_restarts(t, 1.0, cycle_steps=10, cycle_mult=2) for t in range(151)]
    assert [t for t in range(151) if restarts[t] == 1.0] == [0, 10, 30, 70, 150]
    for build in CLOSED:
        ahead = build(sgd(0.1))
        assert trajectory(build(sgd(0.1)), 40) == [ahead.lr_at(t) for t in range(40)]


def test_schedulers_restarts_hit_the_peak_on_every_boundary():
    for length, mult, decay in (
            (1, 3, 1.0), (10, 1, 0.9), (7, 2, 0.8), (1, 10, 1.0), (3, 10, 0.5), (100, 1, 1.0)):
        schedule = WarmRestarts(sgd(0.3), length, cycle_mult=mult, peak_decay=decay,
                                warmup_steps=4)
        boundary, size = 4, length
        for cycle in range(40):
            peak = 0.3 * decay**cycle
            assert math.isclose(schedule.lr_at(boundary), peak), (length, mult, cycle)
            if size > 1:  # one step before a boundary is the lowest rate of the cycle
                low = 0.3 * decay**cycle * (1 + math.cos(math.pi * (size - 1) / size)) / 2
                assert math.isclose(schedule.lr_at(boundary + size - 1), low, rel_tol=1e-6)
            boundary, size = boundary + size, size * mult
    assert warm_restarts(121, 1.0, cycle_steps=1, cycle_mult=3) == 1.0
    assert warm_restarts(10**12, 1.0, cycle_steps=10) == 1.0  # in one division, not in 1e11 rounds


def test_schedulers_restarts_equal_torch():
    for mult in 1, 2, 3:
        optimizer = sgd(0.3)
        ours = trajectory(WarmRestarts(sgd(0.3), 5, cycle_mult=mult, min_lr=0.01), 120)
        theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5, mult, 0.01)
        assert near(ours, trajectory(theirs, 120), 1e-9)


def test_schedulers_restarts_warm_up_once_and_stay_above_min_lr():
    schedule = WarmRestarts(sgd(0.3), 6, peak_decay=0.1, warmup_steps=3, warmup_start_lr=0.03,
                            min_lr=0.02)
    rates = trajectory(schedule, 40)
    assert near(rates[:4], [0.03, 0.12, 0.21, 0.3], 1e-5) and min(rates) >= 0.02 - 1e-15
    assert math.isclose(rates[9], 0.03) and near(rates[15:], 0.02, 1e-5)


def test_schedulers_cyclic_equals_torch():
    for mode, gamma in ("triangular", 1.0), ("triangular2", 1.0), ("exp_range", 0.97):
        for up, down in (4, None), (3, 7), (6, 1), (1, 1):
            optimizer, mine = sgd(0.3), sgd(0.3)
            options = dict(base_lr=0.01, max_lr=0.2, mode=mode, gamma=gamma)
            theirs = torch.optim.lr_scheduler.CyclicLR(
                optimizer, step_size_up=up, step_size_down=down, cycle_momentum=False, **options)
            theirs = trajectory(theirs, 60)
            ours = trajectory(Cyclic(mine, steps_up=up, steps_down=down, **options), 60)
            assert near(ours, theirs, 1e-9), (mode, up)


def test_schedulers_plateau_equals_torch():
    rng = np.random.default_rng(0)
    for trial in range(150):
        mode, threshold_mode = ("min", "max")[trial % 2], ("rel", "abs")[trial // 2 % 2]
        options = dict(mode=mode, threshold_mode=threshold_mode, min_lr=0.003,
                       threshold=[0, 0.01, 0.1][trial % 3], factor=[0.1, 0.5, 0.9][trial % 3],
                       patience=trial % 4, cooldown=trial % 5)
        ours, optimizer = Plateau(sgd(0.3), **options), sgd(0.3)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, eps=0, **options)
        for metric in rng.integers(8, 20, 40) / 8 + 1e-3 * rng.random(40):
            ours.step(metric)
            theirs.step(metric)
            rates = ours.get_last_lr()[0], optimizer.param_groups[0]["lr"]
            assert math.isclose(*rates, rel_tol=1e-12), options


def test_schedulers_plateau_tolerates_patience_bad_evaluations():
    for threshold in 1e-4, 0:  # as good as the best is bad, also with threshold 0
        schedule, rates = Plateau(sgd(1.0), patience=2, factor=0.5, threshold=threshold), []
        for metric in 3, 3, 3, 3, 3, 3, 3:
            schedule.step(metric)
            rates += schedule.get_last_lr()
        assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


def test_schedulers_plateau_threshold_is_right_for_a_negative_best():
    for mode, sign in ("min", 1), ("max", -1):
        for threshold_mode, threshold in ("rel", 0.1), ("abs", 1.0):  # a margin of 1 below 10
            schedule = Plateau(sgd(1.0), mode=mode, threshold=threshold,
                               threshold_mode=threshold_mode, patience=0)
            for metric, best in (-10, -10), (-9.5, -10), (-10.5, -10), (-11.5, -11.5):
                schedule.step(sign * metric)
                assert schedule.best == sign * best
            assert schedule.get_last_lr() == [0.25]  # -9.5 and -10.5 were bad
    for threshold, best in (0.1, 2.0), (0.0, 2.0 - 1e-9):  # and for a positive one
        schedule = Plateau(sgd(1.0), threshold=threshold)
        schedule.step(2.0)
        schedule.step(2.0 - 1e-9)
        assert schedule.best == best


def test_schedulers_plateau_refuses_a_metric_that_is_not_finite_and_keeps_its_state():
    for bad in math.nan, math.inf, -math.inf, torch.tensor(math.nan):
        schedule = Plateau(sgd(1.0), patience=0)
        schedule.step(2.0)
        before = schedule.state_dict()
        refuses(schedule.step, "metric=", bad)
        assert schedule.state_dict() == before


def test_schedulers_plateau_and_its_warm_up_advance_apart():
    schedule = Plateau(sgd(1.0), patience=0, factor=0.5, warmup_steps=4, warmup_start_lr=0.2)
    plain = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    schedule.step(1.0)
    assert near(trajectory(schedule, 2), plain[:2], 1e-5)
    schedule.step(1.0)  # a reduction during the warm-up halves what is left of it
    schedule.step(0.5)
    assert near(trajectory(schedule, 4), np.array(plain[2:]) / 2, 1e-5) and schedule.best == 0.5


def test_schedulers_plateau_never_goes_below_min_lr_nor_rises():
    schedule = Plateau(sgd(1.0, 0.1), patience=0, factor=0.3, min_lr=0.05)
    rates = []
    for _ in range(9):
        schedule.step(1.0)
        rates.append(schedule.get_last_lr()[0])
    assert near(rates, [1, 0.3, 0.09] + 6 * [0.05], 1e-5)
    assert near(schedule.get_last_lr()[1], 0.005, 1e-5)


def test_schedulers_groups_keep_their_ratio():
    for build in (*CLOSED, plateau, lambda o: plateau(o, warmup_start_lr=0.03)):
        three = drive(build(sgd(0.02, 0.1, 0.05)), 0, 25)
        alone = drive(build(sgd(0.1)), 0, 25)
        assert np.allclose(three, np.array(alone) * [0.2, 1.0, 0.5], rtol=1e-12, atol=0)


def test_schedulers_resume_is_exact_at_every_step_in_either_order():
    for build in (*CLOSED, plateau, lambda o: plateau(o, warmup_start_lr=0.03)):
        straight = drive(build(sgd(0.1, 0.02)), 0, 25)
        for k in range(25):
            optimizer = sgd(0.1, 0.02)
            schedule = build(optimizer)
            drive(schedule, 0, k)
            saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
            for order in "optimizer first", "schedule first", "schedule only":
                optimizer = sgd(0.5, 0.5)  # what is loaded must win over what it was built with
                schedule = build(optimizer)
                if order == "optimizer first":
                    optimizer.load_state_dict(saved[0])
                schedule.load_state_dict(json.loads(json.dumps(saved[1])))
                if order == "schedule first":
                    optimizer.load_state_dict(saved[0])
                now = [group["lr"] for group in optimizer.param_groups]
                assert now == schedule.get_last_lr() == (straight[k - 1] if k else now)
                assert drive(schedule, k, 25) == straight[k:], (k, order)


def test_schedulers_resume_when_the_schedule_is_built_on_a_loaded_optimizer():
    optimizer = sgd(0.1)
    schedule = WarmupCosine(optimizer, 20, warmup_steps=5)
    trajectory(schedule, 7)
    straight = trajectory(copy.deepcopy(schedule), 20)
    other = sgd(0.3)
    other.load_state_dict(optimizer.state_dict())
    resumed = WarmupCosine(other, 20, warmup_steps=5)
    resumed.load_state_dict(schedule.state_dict())
    assert trajectory(resumed, 20) == straight and max(straight) < 0.1


def test_schedulers_state_is_plain_numbers_and_not_aliased():
    for build in (*CLOSED, plateau):
        schedule = build(sgd(0.1, 0.02))
        schedule.optimizer.step()
        schedule.step()
        state = schedule.state_dict()
        for value in state.values():
            numbers = value if isinstance(value, list) else [value]
            assert all(type(number) in (int, float) for number in numbers)
        before = schedule.get_last_lr()
        schedule.load_state_dict(state)
        state["base_lrs"][0] = schedule.state_dict()["base_lrs"][0] = 77.0
        schedule.load_state_dict(schedule.state_dict())
        assert schedule.get_last_lr() == before


def test_schedulers_refuse_a_foreign_state():
    schedule = WarmupCosine(sgd(0.1), 20)
    state = schedule.state_dict()
    refuses(schedule.load_state_dict, "expected ['base_lrs', 'last_epoch']", {"last_epoch": 3})
    refuses(schedule.load_state_dict, "extra", {**state, "extra": 1})
    refuses(schedule.load_state_dict, "WarmupCosine", Plateau(sgd(0.1)).state_dict())
    refuses(schedule.load_state_dict, "2 param groups, the optimizer has 1",
            WarmupCosine(sgd(0.1, 0.2), 20).state_dict())
    assert schedule.state_dict() == state


def test_schedulers_refuse_bad_settings_by_name():
    def cosine(total_steps=10, lr=0.1, **options):
        return WarmupCosine(sgd(lr), total_steps, **options)

    def restarts(cycle_steps=10, **options):
        return WarmRestarts(sgd(0.1), cycle_steps, **options)

    def cyclic(**options):
        return Cyclic(sgd(0.1), **dict(base_lr=0.1, max_lr=0.2, steps_up=3) | options)

    def reduce(**options):
        return Plateau(sgd(0.1), **options)

    nan, inf = math.nan, math.inf
    for lr in 0.0, inf:
        refuses(cosine, "optimizer lr=", lr=lr)
    for build, name, values in [
        (cosine, "total_steps", [0, -1, 2.5, nan, inf, True]),
        (cosine, "warmup_steps", [-1, 10, 11, 0.5, nan, True]),
        (cosine, "min_lr", [-1e-9, 0.11, nan, inf, False]),
        (cosine, "warmup_start_lr", [-1e-9, 0.11, nan]),
        (restarts, "cycle_steps", [0, 1.5, nan, True]),
        (restarts, "cycle_mult", [0, 1.5, -2, nan, True]),
        (restarts, "peak_decay", [0, -1, 1.01, nan, True]),
        (restarts, "warmup_steps", [-1, inf]),
        (cyclic, "base_lr", [0, -1, 0.21, nan, True]),
        (cyclic, "max_lr", [0, -1, nan, inf, True]),
        (cyclic, "steps_up", [0, -1, 1.5, nan, True]),
        (cyclic, "steps_down", [0, -1, 1.5, nan, True]),
        (cyclic, "mode", ["saw", None]),
        (cyclic, "gamma", [0, -1, 1.1, nan]),
        (reduce, "factor", [0, 1, 1.5, -0.1, nan, True]),
        (reduce, "patience", [-1, 0.5, nan, True]),
        (reduce, "cooldown", [-1, 0.5, nan, True]),
        (reduce, "threshold", [-1e-9, nan, inf, True]),
        (reduce, "mode", ["Min", None]),
        (reduce, "threshold_mode", ["relative"]),
        (reduce, "min_lr", [-1, 0.2, nan]),
    ]:
        for value in values:
            refuses(build, f"{name}=", **{name: value})


def test_schedulers_are_lr_schedulers_and_take_turns_in_a_sequential_lr():
    optimizer, whole = sgd(0.1, 0.02), sgd(0.1, 0.02)
    first = Constant(optimizer, warmup_steps=4)
    second = WarmupCosine(optimizer, 6, min_lr=0.01)
    both = SequentialLR(optimizer, [first, second], milestones=[5])
    rates = trajectory(both, 12)
    assert isinstance(first, LRScheduler)
    assert rates[:5] == trajectory(Constant(whole, warmup_steps=4), 5)
    assert rates[5:] == [warmup_cosine(t, 0.1, total_steps=6, min_lr=0.01) for t in range(7)]
    for steps in range(10):  # killed and resumed at every update, before and after the milestone
        optimizer = sgd(0.1, 0.02)
        parts = Constant(optimizer, warmup_steps=4), WarmupCosine(optimizer, 6, min_lr=0.01)
        both = SequentialLR(optimizer, parts, milestones=[5])
        trajectory(both, steps)
        saved = copy.deepcopy((optimizer.state_dict(), both.state_dict()))
        optimizer = sgd(0.1, 0.02)
        parts = Constant(optimizer, warmup_steps=4), WarmupCosine(optimizer, 6, min_lr=0.01)
        both = SequentialLR(optimizer, parts, milestones=[5])
        optimizer.load_state_dict(saved[0])
        both.load_state_dict(saved[1])
        assert [group["lr"] for group in optimizer.param_groups][0] == rates[steps]
        assert trajectory(both, 12 - steps) == rates[steps:]
    optimizer = sgd(0.1)
    plateau, constant = Plateau(optimizer), Constant(optimizer)
    for parts in (plateau, constant), (constant, plateau):
        raises(ValueError, "Plateau cannot stand in a SequentialLR",
               lambda: SequentialLR(optimizer, parts, milestones=[3]))


def test_schedulers_second_on_an_optimizer_starts_from_the_same_base_lr():
    optimizer = sgd(0.1)
    WarmupCosine(optimizer, 10, warmup_steps=5)  # has set the lr to 0
    assert trajectory(WarmupCosine(optimizer, 10, warmup_steps=5), 6)[5] == 0.1


def test_schedulers_layer_decay_is_a_factor_of_every_rate():
    """`lr_scale`, as timm and MAE have it."""
    optimizer = sgd(0.1, 0.1, 0.1)
    for group, scale in zip(optimizer.param_groups, (0.25, 0.5, 0.75)):
        group["lr_scale"] = scale
    for t, rates in enumerate(drive(WarmupCosine(optimizer, 9, warmup_steps=3, min_lr=0.01), 0, 9)):
        whole = warmup_cosine(t + 1, 0.1, total_steps=9, warmup_steps=3, min_lr=0.01)
        assert np.allclose(rates, [0.25 * whole, 0.5 * whole, 0.75 * whole], rtol=1e-12, atol=0)


def test_schedulers_fill_a_tensor_as_learning_rate_in_place():
    for build in (*CLOSED, plateau):
        rate = torch.tensor(0.1, dtype=torch.float64)
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=rate)
        schedule = build(optimizer)
        assert drive(schedule, 0, 9) == drive(build(sgd(0.1)), 0, 9)
        schedule.load_state_dict(schedule.state_dict())
        assert optimizer.param_groups[0]["lr"] is rate
        assert all(type(lr) is float for lr in schedule.state_dict()["base_lrs"])
    model = torch.nn.Linear(1, 1)
    seen = []

    def loss(model, x):
        seen.append(optimizer.param_groups[0]["lr"])
        return model(x).square().mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    find_lr(model, optimizer, loss, [torch.ones(2, 1)], num_steps=5)
    assert all(lr is rate for lr in seen)


def test_schedulers_take_in_a_group_that_is_added_later_and_say_so_once():
    schedule = WarmupCosine(sgd(0.1), 20, min_lr=0.01)
    schedule.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.05})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rates = drive(schedule, 0, 20)
    assert [str(w.message) for w in caught] == [
        "param group 1 is new to the schedule: 0.05, its lr, is its base lr from here on"]
    assert np.allclose(rates, [[2 * b, b] for _, b in rates]) and near(rates[-1][0], 0.01, 1e-9)
    assert schedule.state_dict()["base_lrs"] == [0.1, 0.05]
    del schedule.optimizer.param_groups[1]
    refuses(schedule.step, "1 param groups, the schedule has 2")


def test_schedulers_plateau_says_when_a_loop_calls_only_one_of_its_two_steps():
    def warned(work):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        return [str(warning.message) for warning in caught]

    schedule = Plateau(sgd(0.1), warmup_steps=4)
    assert warned(lambda: trajectory(schedule, 1003)) == []
    assert "1004 updates and no metric" in warned(lambda: trajectory(schedule, 3000))[0]
    schedule = Plateau(sgd(0.1), warmup_steps=4)
    assert warned(lambda: schedule.step(1.0)) == []
    assert "2 metrics and no update" in warned(lambda: schedule.step(1.0))[0]
    for used in Plateau(sgd(0.1)), Plateau(sgd(0.1), warmup_steps=4):
        trajectory(used, used.warmup_steps)
        assert warned(lambda: [used.step(1.0), used.step(1.0), trajectory(used, 2000)]) == []
    refuses(schedule.step, "metric=None must be finite", None)


def test_schedulers_options_are_keywords_but_for_the_mode_that_torch_has_first():
    assert Plateau(sgd(0.1), "max", patience=5).mode == "max"
    raises(TypeError, "positional", lambda: Plateau(sgd(0.1), "max", 0.1))
    raises(TypeError, "positional", lambda: WarmupCosine(sgd(0.1), 10, 2))


def test_schedulers_cosine_may_run_under_the_warm_up():
    """timm's CosineLRScheduler(t_initial=20, warmup_t=5, warmup_lr_init=0.01, lr_min=0.002)."""
    schedule = WarmupCosine(sgd(0.3), 20, warmup_steps=5, warmup_start_lr=0.01, min_lr=0.002,
                            warmup_prefix=False)
    rates = trajectory(schedule, 25)
    line = [0.01 + t * (0.3 - 0.01) / 5 for t in range(5)]
    cosine = [0.002 + 0.5 * (0.3 - 0.002) * (1 + math.cos(math.pi * t / 20)) for t in range(5, 20)]
    assert np.allclose(rates, [*line, *cosine, *[0.002] * 5], rtol=1e-9, atol=0)


def test_schedulers_follow_a_loop_that_counts_updates_itself():
    for build in CLOSED:
        schedule = build(sgd(0.1, 0.02))
        for step in 7, 3, 19:
            schedule.set_step(step)
            assert schedule.get_last_lr()[0] == schedule.lr_at(step)
        assert drive(schedule, 0, 5) == drive(build(sgd(0.1, 0.02)), 0, 24)[19:]


class Noisy(torch.nn.Module):
    """All that find_lr puts back: batch norm, dropout, replaced and unsaved buffers, eval mode."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 8), torch.nn.Linear(8, 1)
        self.norm, self.drop = torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2)
        self.register_buffer("centre", torch.zeros(1), persistent=False)

    def forward(self, x):
        x = self.last(self.drop(self.norm(self.first(x)).relu()))
        self.centre = 0.9 * self.centre + 0.1 * x.detach().mean()
        return x


def snapshot(model, optimizer):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = [(name, tensor.detach(), tensor.grad) for name, tensor in tensors.items()]
    modes = [module.training for module in model.modules()]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = tensors, modes, optimizer.state_dict(), torch.get_rng_state(), cuda
    return copy.deepcopy(state)


def range_test_setup(device="cpu"):
    torch.manual_seed(0)
    model = Noisy().to(device)
    model.norm.eval()
    optimizer = torch.optim.AdamW([{"params": model.first.parameters(), "lr": 0.01},
                                   {"params": model.last.parameters()}], lr=0.1)
    batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(4, 16, 3).to(device)]
    squared_error(model, batches[0]).backward()
    optimizer.step()  # moments and gradients that must survive
    return model, optimizer, squared_error, batches


def test_schedulers_find_lr_restores_everything_also_after_an_error():
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        model, optimizer, loss_fn, batches = range_test_setup(device)
        grads, before, calls = [p.grad for p in model.parameters()], snapshot(model, optimizer), []
        first = find_lr(model, optimizer, loss_fn, batches, num_steps=30)
        assert len(first[0]) == len(first[1]) == 30
        assert same_bits(before, snapshot(model, optimizer))
        assert all(p.grad is g for p, g in zip(model.parameters(), grads))

        def breaks(model, batch):
            calls.append(loss_fn(model, batch).backward())
            if len(calls) == 9:
                raise RuntimeError("out of memory")
            return loss_fn(model, batch)
        raises(RuntimeError, "out of memory", lambda: find_lr(model, optimizer, breaks, batches))
        assert same_bits(before, snapshot(model, optimizer))
        refuses(find_lr, "ended after 4", model, optimizer, loss_fn, iter(batches))
        assert same_bits(before, snapshot(model, optimizer))
        again = find_lr(model, optimizer, loss_fn, batches, num_steps=30)
        assert near(again[:2], first[:2], 1e-5) and again[2] == first[2]


def test_schedulers_find_lr_restores_a_fresh_optimizer_and_what_the_loss_learns():
    model, scale = torch.nn.Linear(1, 1), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([*model.parameters(), scale], lr=1e-3)
    find_lr(model, optimizer, lambda m, x: (m(x) * scale).pow(2).sum(), [torch.ones(2, 1)])
    assert not optimizer.state and scale.item() == 1 and scale.grad is None
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_schedulers_find_lr_ramps_exponentially_with_the_groups_in_ratio():
    model, optimizer, loss_fn, batches = range_test_setup()
    seen, modes = [], []

    def spy(model, batch):
        seen.append([group["lr"] for group in optimizer.param_groups])
        modes.append(model.norm.training)
        return loss_fn(model, batch)
    rates, _, _ = find_lr(model, optimizer, spy, batches, start_lr=1e-5, end_lr=1e-2, num_steps=7)
    assert near(rates, np.logspace(-5, -2, 7), 1e-5) and all(modes)
    assert near(seen, np.outer(rates, [0.1, 1.0]), 1e-5)


def fed(losses, **options):
    """find_lr on a model whose loss is exactly this list."""
    w = torch.nn.Linear(1, 1)
    def loss_fn(model, value):
        return value + 0 * model.weight.sum()

    optimizer = torch.optim.SGD(w.parameters(), lr=1)
    return find_lr(w, optimizer, loss_fn, losses, num_steps=len(losses), **options)


def test_schedulers_find_lr_smoothing_is_unbiased_from_the_first_step():
    assert near(fed([2.0] * 20)[1], 2.0, 1e-12)
    values = np.random.default_rng(0).random(30) + 1
    _, smooth, _ = fed(values.tolist())
    for i in range(30):
        weights = 0.9 ** np.arange(i, -1, -1)
        want = (weights * values[:i + 1]).sum() / weights.sum()
        assert math.isclose(smooth[i], want, rel_tol=1e-6)


def test_schedulers_find_lr_stops_when_the_loss_diverges_whatever_its_sign():
    assert len(fed([1.0] * 10 + [10.0] * 40)[1]) < 20
    assert len(fed([1.0] * 10 + [3.9] * 40)[1]) == 50  # not above 4 times the best
    assert len(fed([-1.0] * 10 + [10.0] * 40)[1]) < 20
    assert len(fed([-1.0] * 10 + [1.9] * 40)[1]) == 50  # -1 + 3 * 1 = 2
    assert len(fed(np.linspace(-1, -5, 50).tolist())[1]) == 50
    assert len(fed([1.0] * 5 + [0.0] * 40 + [0.5] * 9)[1]) == 54  # 0.05 is not above 4 * 0.01
    for end in math.nan, -math.inf:
        assert len(fed([1.0] * 9 + [end] * 9)[1]) == 9


def test_schedulers_find_lr_suggests_the_start_of_the_steepest_fall():
    fall = [4.0] * 30 + np.linspace(4, 1, 21).tolist() + [1.0] * 19 + [3.0] * 5
    rates, smooth, suggestion = fed(fall)
    assert 35 <= rates.index(suggestion) <= 42
    spike = [4.0] * 20 + np.linspace(4, 1, 40).tolist() + [1.0] * 10 + [5.3] * 20 + [1.2] * 20
    rates, smooth, suggestion = fed(spike)  # the fall after the spike is steeper, but too late
    assert len(rates) == 110 and 20 <= rates.index(suggestion) < 60
    rates, _, suggestion = fed([4.0, 3.0, 2.0, 1.0, 9.0, 9.0])
    assert rates.index(suggestion) < 3
    for steps in 2, 5, 20:
        assert math.isnan(fed([1.0 + 0.01 * i for i in range(steps)])[2])
        rates, _, suggestion = fed([1.0 - 0.01 * i for i in range(steps)])
        assert suggestion in rates


def test_schedulers_find_lr_suggestion_is_not_fooled_by_the_first_batch():
    for first in 0.5, 6.0:  # below all that follows, or a steeper fall than any later one
        later = [2.0] * 29 + np.linspace(2, 1, 11).tolist() + [1.0] * 10
        rates, _, suggestion = fed([first] + later)
        assert 25 <= rates.index(suggestion) <= 35, first


def test_schedulers_find_lr_suggestion_trains_and_hundred_times_it_does_not():
    torch.manual_seed(0)
    x = torch.randn(512, 10)
    batches = list(zip(x.split(32), (x @ torch.randn(10, 1)).split(32)))

    def start():
        torch.manual_seed(1)
        model = torch.nn.Linear(10, 1)
        return model, torch.optim.SGD(model.parameters(), lr=1.0)

    def after_an_epoch(rate):
        model, optimizer = start()
        optimizer.param_groups[0]["lr"] = rate
        for batch in batches:
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
        return squared_error(model, (x, torch.cat([batch[1] for batch in batches]))).item()

    suggestion = find_lr(*start(), squared_error, batches, end_lr=10.0)[2]
    start_loss = after_an_epoch(1e-9)
    assert after_an_epoch(suggestion) < 0.5 * start_loss < after_an_epoch(100 * suggestion)


def test_schedulers_find_lr_refuses_bad_input_by_name():
    refuses(fed, "the first loss is nan", [math.nan, 1.0])
    refuses(fed, "start_lr=0, end_lr=1.0", [1.0, 1.0], start_lr=0)
    refuses(fed, "start_lr=2, end_lr=1.0", [1.0, 1.0], start_lr=2)
    refuses(fed, "end_lr=nan", [1.0, 1.0], end_lr=math.nan)
    refuses(fed, "num_steps=1 must", [1.0])
    refuses(find_lr, "batches ended after 0", torch.nn.Linear(1, 1), sgd(0.1), None, [])
    refuses(find_lr, "before building a schedule", torch.nn.Linear(1, 1), sgd(0.0), None, [1.0])
