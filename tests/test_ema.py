"""Tests of ema."""

import copy
import io
import math
import pickle
import warnings
import weakref

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import ema
from ema import EMA, ema_decay
from tests.helpers import assert_near, near, raises, refuses, seeded


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def training_step(model, step):
    """Change weights and buffers as a training step would: a pure function of the step."""
    generator = seeded(step)
    model.train()(torch.randn(8, 3, generator=generator))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def bit_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_ema_decay_ramps_to_the_decay_and_stays():
    assert ema_decay(0, 0.999) == 0.1 and ema_decay(8, 0.999) == 0.5 and ema_decay(0, 0.05) == 0.05
    assert all(ema_decay(n, 0.999, warmup=False) == 0.999 for n in (0, 1, 10 ** 6))
    share = math.prod(ema_decay(n, 0.999) for n in range(10))
    assert 0.9e-5 < share < 1.1e-5  # the docstring's 0.001 %, and its 90 %
    assert round(0.999 ** 100, 2) == 0.90


def test_ema_docstring_table_is_right():
    for line, decay in zip(EMA.__doc__.splitlines()[5:9], (0.9, 0.99, 0.999, 0.9999)):
        words = [word.replace(",", "") for word in line.split() if word != "steps"]
        shown, horizon, half_life, end = map(float, words)
        assert shown == decay and horizon == round(1 / (1 - decay))
        exact = math.log(2) / -math.log(decay)
        assert abs(half_life - exact) < 0.5 if decay > 0.9 else half_life == 6.6
        assert ema_decay(end - 1, decay) < decay - 1e-9
        assert near(ema_decay(end, decay), decay, 1e-12)


def test_ema_equals_the_written_recurrence():
    for decay, warmup in (0.999, True), (0.3, True), (0.9, False):
        model = small_net()
        average = EMA(model, decay, warmup=warmup)
        want = {name: value.double() for name, value in model.state_dict().items()}
        for n in range(30):
            training_step(model, n)
            average.update(model)
            d = min(decay, (1 + n) / (10 + n)) if warmup else decay
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    value = d * want[name] + (1 - d) * value.double()
                want[name] = value
        for name, value in average.module.state_dict().items():
            assert_near(value.double(), want[name].double())
        assert average.updates == 30


def test_ema_averages_running_statistics_and_copies_counters_and_masks():
    model = nn.BatchNorm1d(2)
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    average = EMA(model)
    model.num_batches_tracked += 7
    model.running_mean += 1
    model.scratch += 1
    model.mask.logical_not_()
    average.update(model)
    assert average.module.num_batches_tracked == 7 and average.module.mask.tolist() == [False, True]
    assert_near(average.module.running_mean, torch.full((2,), 0.9))
    assert_near(average.module.scratch, torch.full((2,), 0.9))


def test_ema_averages_tied_weights_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    average = EMA(model)
    initial = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    average.update(model)
    assert average.module[0].weight is average.module[1].weight
    assert_near(average.module[0].weight, initial + 0.9)


def test_ema_keeps_a_float32_shadow_of_half_precision_weights():
    for dtype in (torch.bfloat16, torch.float16):
        model = nn.Linear(2, 2).to(dtype)
        average = EMA(model, 0.999, warmup=False)
        initial = model.weight.detach().float()
        with torch.no_grad():
            model.weight += 1
        target = model.weight.detach().float()
        for _ in range(100):
            average.update(model)
        assert average.module.weight.dtype == torch.float32
        assert_near(average.module.weight, target + (initial - target) * 0.999 ** 100)
        average.module(torch.zeros(1, 2))


def test_ema_keeps_float64_and_complex_weights_in_their_own_dtype():
    for dtype in (torch.float64, torch.complex64):
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(2, dtype=dtype))
        average = EMA(model)
        model.weight.data += 1
        average.update(model)
        assert_near(average.module.weight.detach(), torch.full((2,), 0.9, dtype=dtype))


def test_ema_moves_while_the_model_is_left_alone():
    model = small_net()
    average, initial = EMA(model), small_net().state_dict()
    training_step(model, 0)
    before = copy.deepcopy(model.state_dict())
    average.update(model)
    assert bit_equal(model.state_dict(), before)
    assert model.training and all(p.requires_grad for p in model.parameters())
    for name, value in average.module.state_dict().items():
        assert not torch.equal(value, initial[name])


def test_ema_module_is_in_eval_mode_without_gradients():
    model = small_net().train()
    average = EMA(model)
    average.update(model)
    assert not any(module.training for module in average.module.modules())
    # One row: in training mode batch norm would refuse it.
    assert not average.module(torch.zeros(1, 3)).requires_grad
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_ema_leaves_a_frozen_weight_bit_equal():
    model = small_net()
    model[0].weight.requires_grad_(False)
    average = EMA(model)
    for _ in range(20):
        average.update(model)
    assert torch.equal(average.module[0].weight, model[0].weight)


def test_ema_interrupted_and_resumed_equals_straight():
    def run(interrupt):
        model = small_net()
        average = EMA(model, 0.95)
        for n in range(20):
            training_step(model, n)
            average.update(model)
            if n == interrupt:
                file = io.BytesIO()
                torch.save({"model": model.state_dict(), "ema": average.state_dict()}, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
                model, average = small_net(seed=1), EMA(small_net(seed=2), 0.5, warmup=False)
                model.load_state_dict(state["model"])
                average.load_state_dict(state["ema"])
        return average.state_dict()
    straight, resumed = run(None), run(6)
    assert bit_equal(straight.pop("module"), resumed.pop("module"))
    assert straight == resumed == {"updates": 20, "decay": 0.95, "warmup": True}


class Compiled(nn.Module):
    """What torch.compile returns, as far as names go; the real one takes seconds to import."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def test_ema_matches_names_through_wrappers_in_any_nesting():
    wrappers = [lambda m: m, nn.DataParallel, Compiled, lambda m: Compiled(nn.DataParallel(m)),
                lambda m: nn.DataParallel(Compiled(nn.DataParallel(m)))]
    want = None
    for at_start in wrappers:
        for at_update in wrappers:
            model = small_net()
            average = EMA(at_start(model))
            training_step(model, 0)
            average.update(at_update(model))
            want = want or average.module.state_dict()
            assert type(average.module) is nn.Sequential
            assert bit_equal(average.module.state_dict(), want)


def test_ema_matches_names_when_only_a_part_was_compiled_later():
    model = small_net()
    average = EMA(model)
    training_step(model, 0)
    model[0] = Compiled(model[0])
    average.update(model)
    want = 0.1 * small_net()[0].weight + 0.9 * model[0]._orig_mod.weight
    assert_near(average.module[0].weight, want)


def test_ema_keeps_apart_a_submodule_that_is_called_module():
    model = nn.Linear(2, 2)
    model.module = nn.Linear(2, 2)
    average = EMA(model)
    model.weight.data += 1
    model.module.weight.data += 2
    average.update(model)
    assert_near(average.module.weight.detach(), model.weight.detach() - 0.1)
    assert_near(average.module.module.weight.detach(), model.module.weight.detach() - 0.2)


def test_ema_refuses_a_missing_extra_or_reshaped_tensor_and_stays_as_it_was():
    average = EMA(small_net())
    before = copy.deepcopy(average.state_dict())
    refuses(average.update, "missing ['2.bias', '2.weight'], unexpected []", small_net()[:2])
    refuses(average.update, "missing [], unexpected ['3.bias', '3.weight']",
            small_net().append(nn.Linear(2, 2)))
    reshaped = small_net()
    reshaped[2] = nn.Linear(4, 3)
    refuses(average.update, "2.weight has shape (3, 4), its average (2, 4)", reshaped)
    assert bit_equal(average.module.state_dict(), before["module"]) and average.updates == 0


def test_ema_warns_where_weights_were_loaded_and_the_count_of_updates_was_not():
    def warnings_of(average):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            average.update(small_net(seed=1))
        return [str(warning.message) for warning in caught]
    saved = EMA(small_net(), 0.9, updates=100)
    resumed = EMA(small_net(seed=2), 0.9)
    resumed.module.load_state_dict(saved.module.state_dict())
    assert "EMA(model, updates=n)" in warnings_of(resumed)[0]
    remedy = EMA(small_net(seed=2), 0.9, updates=100)
    remedy.module.load_state_dict(saved.module.state_dict())
    whole = EMA(small_net(seed=2), 0.9)
    whole.load_state_dict(EMA(small_net(), 0.9).state_dict())
    for average in saved, remedy, whole, EMA(small_net()):
        assert warnings_of(average) == []
    assert bit_equal(remedy.module.state_dict(), saved.module.state_dict())


def test_ema_called_is_the_averaged_model_and_back_in_eval_mode():
    average, x = EMA(small_net()), torch.randn(1, 3, generator=seeded(0))
    want = average.module(x)
    average.module.train()  # a loop that sets the mode of all its models
    assert torch.equal(average(x), want)  # one row: in train mode batch norm would refuse it
    average.module.train()
    average.update(small_net())
    assert not any(module.training for module in average.module.modules())


def test_ema_copies_float_buffers_instead_where_asked():
    model = small_net()
    average = EMA(model, average_buffers=False)
    initial = model[0].weight.detach().clone()
    training_step(model, 0)
    average.update(model)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)
    assert_near(average.module[0].weight, 0.1 * initial + 0.9 * model[0].weight.detach())


def test_ema_of_a_half_precision_model_makes_one_float32_tensor_at_a_time():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)]).bfloat16()
    average, alive, most = EMA(model), [], 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most
            made = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default:
                alive.append(weakref.ref(made))
            most = max(most, sum(reference() is not None for reference in alive))
            return made
    with Count():
        average.update(model)
    assert 1 <= most <= 2, most  # of 8


def test_ema_options_are_keywords_and_checked_when_built():
    average = EMA(small_net())  # other libraries' update takes the step here
    raises(TypeError, "positional", lambda: average.update(small_net(), 7))
    raises(TypeError, "positional", lambda: EMA(small_net(), 0.9, 100))
    refuses(EMA, "got 0.999 (1 never leaves", small_net(), updates=-1)
    refuses(EMA, "a whole number, got 1.5", small_net(), updates=1.5)


def test_ema_copies_and_pickles_without_the_model():
    model = small_net()
    average = EMA(model)
    size = len(pickle.dumps(average))
    training_step(model, 0)
    average.update(model)
    assert abs(len(pickle.dumps(average)) - size) < 20
    twins = copy.deepcopy(average), pickle.loads(pickle.dumps(average)), average
    training_step(model, 1)
    for twin in twins:
        twin.update(model)
        assert twin.updates == 2
        assert bit_equal(twin.module.state_dict(), twins[0].module.state_dict())


def test_ema_check_finite_names_the_tensor_and_leaves_the_shadow_as_it_was():
    for value in math.nan, math.inf:
        model = small_net()
        average = EMA(model)
        before = copy.deepcopy(average.module.state_dict())
        training_step(model, 0)
        model[2].weight.data[0, 0] = value
        refuses(average.update, "2.weight holds NaN or inf", model, check_finite=True)
        assert bit_equal(average.module.state_dict(), before) and average.updates == 0
        model[2].weight.data[0, 0] = 0
        average.update(model, check_finite=True)
        assert average.updates == 1


def test_ema_load_is_strict():
    average = EMA(small_net())
    state = average.state_dict()
    refuses(average.load_state_dict, "updates", {"module": state["module"]})
    refuses(average.load_state_dict, "extra", {**state, "extra": 1})
    without = {name: value for name, value in state["module"].items() if name != "0.bias"}
    raises(RuntimeError, "0.bias", lambda: average.load_state_dict({**state, "module": without}))


def test_ema_refuses_a_decay_that_is_none():
    for decay in (1.0, -0.1, 1.5, math.nan):
        refuses(EMA, str(decay), nn.Linear(1, 1), decay)


def test_ema_works_without_anything_to_average():
    average = EMA(nn.Identity())
    average.update(nn.Identity())
    assert average.updates == 1
